"""`edges`: message passing on the joint graph becomes ops that hold nothing of [edges, features].

PyG's layers take rows of nodes for every edge, compute on them, and add them up. Autograd does the same in the other
direction. In the graph of both, before torch cuts it, every such region becomes one op that goes over the edges grouped
by node (`actcompile.kernels.edges`). It reads node rows and leaves node rows, so those are what the cut can choose
from: what is saved for backward has a row for each node, and where backward needs a message or an attention weight, its
region computes it again.

A comparison of forward's values in backward (which neighbour was the largest, where a ReLU was at work) is taken in
forward, where the values are exact, and handed on as a mask.

On CUDA, sums of taken rows in float32 and float64 are left to Inductor, which adds each edge's row to its node's by
atomics, and holds no messages for it either.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from actcompile.kernels.edges.ops import aggregation, prepare

from ..graph import _torch
from ..graph.bodies import BODY, PARTIAL
from ..graph.split import Split, call, inherit_origin, is_tensor, writes
from .regions import LARGEST, Region, Unfit, is_float, product_of, region
from .rows import Rows, width
from .takes import COPIES, Index, Reduction, Take, is_transposed, original, reduction_of, size_of, take_of

aten, ops = torch.ops.aten, torch.ops.actcompile
BY = {ops.edges.default: 1, ops.aggregate.default: 4}  # the position of the index that edges are grouped by
EQUALITIES = (aten.eq.Tensor, aten.ne.Tensor)


@dataclass(frozen=True)
class Fused:
    """A region that became one op, or the reason why it did not.

    end: name of the node that it ended with; the op's result has it now.
    inside: names of the nodes that it computes.
    nbytes: bytes of the largest tensor of a row for each edge that is not made any more, or still is.
    """

    end: str
    inside: tuple[str, ...]
    nbytes: int
    reason: str = ""


def edges(joint: fx.Graph, num_fwd_outputs: int, parameters: Collection[str]) -> list[Fused]:
    """Fuses the message passing of a joint graph, on the CPU and on CUDA, in place.

    Args:
        num_fwd_outputs: number of the graph's outputs that forward returns.
        parameters: names of the inputs that live from step to step.
    """
    return _Fusing(joint, num_fwd_outputs, parameters).run()


def inputs_grouped(split: Split) -> list[fx.Node]:
    """The inputs of forward whose edges are grouped by node at the first step, which is remembered for the next."""
    origin = split.origin()
    calls = (n for n in (*split.forward.graph.nodes, *split.backward.graph.nodes) if n.target in BY and not n.args[-1])
    edges = [call.args[BY[call.target]] for call in calls]
    return [n for n in dict.fromkeys(origin.get(by, by) for by in edges) if n.op == "placeholder"]


class _Fusing:
    def __init__(self, graph: fx.Graph, num_fwd_outputs: int, parameters: Collection[str]) -> None:
        self.graph = graph
        outputs = graph.output_node().args[0]
        self.forward = _ancestors(n for n in outputs[:num_fwd_outputs] if isinstance(n, fx.Node))  # type: ignore[index, union-attr]
        placeholders = graph.find_nodes(op="placeholder")
        self.of_tangents = _descendants(n for n in placeholders if "tangents" in n.name)
        self.of_parameters = _descendants(n for n in placeholders if n.name in parameters)
        self.rows = Rows(graph)
        self.grouped: dict[tuple[Index, str], tuple[fx.Node, fx.Node]] = {}
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.swapped: set[fx.Node] = set()  # products along edges that are made the other way round
        self.matrices: dict[fx.Node, fx.Node] = {}  # for regions that end with no sum by node: rows of those nodes
        self.fused: list[Fused] = []

    def run(self) -> list[Fused]:
        found: dict[fx.Node, Region | tuple[Take, fx.Node | None, Reduction]] = {}
        masks: set[fx.Node] = set()
        for node in self.graph.nodes:
            if not is_tensor(node) or node.meta["val"].device.type not in ("cpu", "cuda"):
                continue
            try:
                made = self._written(node)
            except (Unfit, RecursionError) as reason:  # or thousands of ops, each on what the one before made
                self.fused.append(Fused(node.name, (), _nbytes(node), str(reason)))
                continue
            if made is not None:
                found[node] = made
                masks.update(made.masks if isinstance(made, Region) else ())
        for mask in masks:
            try:
                found[mask] = self._apart(mask, mask, "edge", exact=lambda _: False)
            except (Unfit, RecursionError) as reason:  # it stays as it is, and `masks` has it made in forward
                self.fused.append(Fused(mask.name, (), _nbytes(mask), str(reason)))
        self._agree(found)
        self._multiply(found)
        self._pack(masks & found.keys(), found)
        bodies = {node: _body(made) for node, made in found.items() if isinstance(made, Region)}
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        for node in sorted(found, key=order.__getitem__):
            made = found[node]
            result = self._call(made, bodies[node]) if isinstance(made, Region) else self._aggregate(node, *made)
            result = self._added(node, result)
            inside = made.inside if isinstance(made, Region) else [made[2].value]
            nbytes = max(map(_nbytes, inside), default=0)
            self.fused.append(Fused(node.name, tuple(n.name for n in inside), nbytes))
            node.replace_all_uses_with(result)
            self.graph.erase_node(node)
            self.replaced[node] = result
            result.name = node.name
        self.graph.eliminate_dead_code()
        return self.fused

    def _written(self, node: fx.Node) -> Region | tuple[Take, fx.Node | None, Reduction] | None:
        """The region that a node ends, if it ends one."""
        reduction = reduction_of(node)
        if reduction is not None:
            if not self.rows.taken(reduction.value) and width(reduction.value) == 1 and not _is_short(node):
                return None  # degrees and the like
            linear = self._linear(reduction)
            if linear is not None:
                return None if _adds_atomically(node) else (*linear, reduction)
            nodes, exact = node.meta["val"].shape[0], self._exact(node)
            return region(node, reduction.value, reduction.kind, reduction.index, nodes, self.rows.computed, exact)
        match node:
            case fx.Node(target=aten.mm.default, args=(fx.Node() as one, fx.Node() as other)) if is_transposed(one):
                return self._outer(node, one, other)
            case fx.Node(target=aten.sum.dim_IntList, args=(fx.Node() as value, [*dims], *_)) if not node.kwargs:
                if width(value) == 1 or not self.rows.of_edges(value):
                    return None
                if dims == [0]:
                    return self._apart(node, value, "sum")
                if (
                    all(d % value.meta["val"].dim() for d in dims)
                    and len(dims) == 1
                    and dims[0] in (-1, value.meta["val"].dim() - 1)
                ):  # type: ignore[operator]
                    return self._apart(node, value, "dot")
        return None

    def _apart(
        self,
        node: fx.Node,
        value: fx.Node,
        kind: str,
        exact: Callable[[fx.Node], bool] | None = None,
        other: fx.Node | None = None,
    ) -> Region:
        """A region that does not end with a sum by node: it goes by what most of its rows are taken by."""
        seen: set[fx.Node] = set()
        found = [take for rows in (value, other) if rows is not None for take in self.rows.takes(rows, seen)]
        take = max(found, key=lambda t: width(t.matrix)) if found else self.rows.take_beside(value)
        if take is None:
            raise Unfit("edges without nodes")
        by, nodes = take.index, take.matrix.meta["val"].shape[0]
        self.matrices[node] = take.matrix
        return region(node, value, kind, by, nodes, self.rows.computed, exact or self._exact(node), other)

    def _multiply(self, found: dict[fx.Node, Any]) -> None:
        """Has products of taken rows that are read outside of regions made by regions of their own."""
        read = {n for n in self.graph.output_node().all_input_nodes}
        for node in reversed(self.graph.nodes):
            if node not in read:
                continue
            if node not in found and self.rows.taken(node) and product_of(node) is not None:
                try:
                    found[node] = self._apart(node, node, "edge")
                except (Unfit, RecursionError) as reason:
                    self.fused.append(Fused(node.name, (), _nbytes(node), str(reason)))
            made = found.get(node)
            if isinstance(made, Region):
                read.update(made.operands)
                read.update(index.tensor for index in (made.by, *made.indices))
                if (reduction := reduction_of(node)) is not None:
                    read.update(n for n in (reduction.base, reduction.nodes) if isinstance(n, fx.Node))
            else:
                read.update(node.all_input_nodes)

    def _outer(self, node: fx.Node, transposed: fx.Node, other: fx.Node) -> Region | None:
        """A product along edges: one of its matrices is made of taken rows, the other may be."""
        rows = transposed.args[0]
        if node.meta["val"].device.type != "cpu" or not isinstance(rows, fx.Node):
            return None
        sizes = node.meta["val"].shape
        if not (self.rows.of_edges(rows) or self.rows.of_edges(other)):
            return None
        if not all(isinstance(size, int) for size in sizes) or not 0 < sizes[0] * sizes[1] <= LARGEST:
            return None
        try:
            made = self._apart(node, other, "outer", other=rows)
        except Unfit:  # the rows of one inner axis have heads, perhaps
            made = self._apart(node, rows, "outer", other=other)
            self.swapped.add(node)
        made.inside.append(transposed)
        return made

    def _agree(self, found: dict[fx.Node, Any]) -> None:
        """Leaves an extremum as it is where what compares messages with it is not fused, and the other way round.

        Which neighbour was the largest is known only where both compute its message alike, to the last bit.
        """
        left = None
        while left != len(found):
            left = len(found)
            for node, made in list(found.items()):
                steps = {step.op for step in made.program.steps} if isinstance(made, Region) else set()
                if steps <= {"eq", "ne"}:
                    continue  # messages are read, not computed
                alike = self._compared_with(node) <= found.keys()
                if steps & {"eq", "ne"}:
                    sums = {m for m in map(original, made.operands) if m in found or reduction_of(m) is not None}
                    alike &= bool(sums) and sums <= found.keys()  # what else they may equal is computed elsewhere
                if not alike:
                    del found[node]
                    self.fused.append(Fused(node.name, (), _nbytes(node), "compared with what is not fused"))

    def _compared_with(self, node: fx.Node) -> set[fx.Node]:
        """The comparisons of rows of edges with an extremum; none for other nodes."""
        todo, found = [node] if node.target is aten.scatter_reduce.two else [], set()
        seen = set(todo)
        while todo:
            for user in set(todo.pop().users) - seen:
                seen.add(user)
                if user in self.rows.taken_of and user.target in EQUALITIES:
                    found.add(user)
                elif user in self.rows.taken_of or user.target in COPIES:
                    todo.append(user)
        return found

    def _pack(self, masks: Collection[fx.Node], found: dict[fx.Node, Any]) -> None:
        """Has masks that nothing but regions reads written and read as bits."""
        regions = [made for made in found.values() if isinstance(made, Region)]
        read: set[fx.Node | None] = {node for made in regions for node in made.operands}
        for made in found.values():
            read |= {made[0].matrix, made[1]} if not isinstance(made, Region) else set()
        read |= {reduction.base for end in found if (reduction := reduction_of(end)) is not None}
        gone: set[fx.Node] = set(found)  # what nobody computes any more
        for node in reversed(self.graph.nodes):
            if node.users and node not in read and all(user in gone for user in node.users):
                gone.add(node)
        packed = {mask for mask in masks if all(user in gone for user in mask.users)}
        for made in regions:
            program = made.program
            operands = tuple(
                replace(o, dtype="bits") if node in packed else o
                for o, node in zip(program.operands, made.operands, strict=True)
            )
            outputs = tuple(replace(o, dtype="bits") if made.end in packed else o for o in program.outputs)
            made.program = replace(program, operands=operands, outputs=outputs)

    def _exact(self, end: fx.Node) -> Callable[[fx.Node], bool]:
        """Whether a comparison that backward needs is one of forward's values."""
        backward = end not in self.forward

        def exact(comparison: fx.Node) -> bool:
            return backward and comparison not in self.of_tangents

        return exact

    def _linear(self, reduction: Reduction) -> tuple[Take, fx.Node | None] | None:
        """Rows that are summed up as they are taken, or times one number for each edge, which is another node."""
        if reduction.kind != "sum":
            return None
        value = original(reduction.value)
        take, weight = take_of(value), None
        if take is None and value.target is aten.mul.Tensor:
            for row, factor in (value.args, value.args[::-1]):
                if isinstance(row, fx.Node) and isinstance(factor, fx.Node) and take_of(row) is not None:
                    take, weight = take_of(row), factor
                    if self._is_weight(factor, row):
                        break
            else:
                return None
        if take is None or value.meta["val"].dtype != take.matrix.meta["val"].dtype:
            return None
        if not is_float(take.matrix) or (weight is not None and not is_float(weight)):
            return None
        sizes = zip(take.matrix.meta["val"].shape[1:], value.meta["val"].shape[1:], strict=False)
        dims = take.matrix.meta["val"].dim(), value.meta["val"].dim()
        fits = dims[0] == dims[1] and all(_torch.known_true(a == b) for a, b in sizes)
        return (take, weight) if fits else None

    def _is_weight(self, factor: fx.Node, row: fx.Node) -> bool:
        """Whether a factor is one number for each edge that is held anyway: no attention, which is computed again."""
        value = factor.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() == 0:
            return False
        sizes = value.shape
        edges = row.meta["val"].shape[0]
        alone = _torch.known_true(sizes[0] == edges) and all(_torch.known_true(size == 1) for size in sizes[1:])
        return (
            alone
            and len(sizes) == row.meta["val"].dim()
            and not (factor in self.of_parameters and self.rows.taken(factor))
        )

    def _aggregate(self, node: fx.Node, take: Take, weight: fx.Node | None, reduction: Reduction) -> fx.Node:
        with self.graph.inserting_before(node):
            by, row = reduction.index.tensor, reduction.index.row
            nodes = self._nodes(reduction)
            grouped = self._grouped(reduction.index, nodes, node)
            matrix, other = self._now(take.matrix), take.index
            dtypes = (str(n.meta["val"].dtype)[6:] if n else None for n in (matrix, weight))
            prepare(aggregation(*dtypes), matrix.meta["val"].device)  # type: ignore[arg-type]
            return call(
                self.graph, ops.aggregate.default, matrix, weight and self._now(weight), other.tensor, other.row, by,
                row, nodes, grouped, like=node,
            )  # fmt: skip

    def _now(self, node: fx.Node) -> fx.Node:
        """What stands for a node now."""
        return self.replaced.get(node, node)

    def _call(self, made: Region, body: fx.Graph) -> fx.Node:
        """Inserts the call of a region's program before the node that it ends with; returns the result in its shape."""
        graph, end = self.graph, made.end
        kind = made.program.outputs[0].kind
        reduction = reduction_of(end)
        program = made.program.dump()
        prepare(program, end.meta["val"].device)  # while the rest is compiled
        with graph.inserting_before(end):
            nodes = self._nodes(reduction) if reduction is not None else self._rows(end)
            result = call(
                graph, ops.edges.default, program, made.by.tensor, made.by.row, nodes, made.heads,
                made.columns, [i.tensor for i in made.indices], [i.row for i in made.indices],
                [self._now(n) for n in made.operands], self._grouped(made.by, nodes, end), like=end,
            )  # fmt: skip
            result.meta[BODY] = body
            inherit_origin(part := call(graph, operator.getitem, result, 0), end)
            value = end.meta["val"]
            if made.program.outputs[0].dtype == "bits":
                return part
            if kind == "outer":
                return call(graph, aten.permute.default, part, [1, 0], like=end) if end in self.swapped else part
            if kind == "sum" and reduction is None:  # over all edges: over those of each node, then over nodes
                part = call(graph, aten.sum.dim_IntList, part, [0], like=end)
                part.meta[PARTIAL] = True
                return call(graph, aten.view.default, part, list(value.shape), like=end)
            if value.dim() == 2 and _torch.known_true(value.shape[1] == part.meta["val"].shape[1]):
                return part
            return call(graph, aten.view.default, part, [-1, *value.shape[1:]], like=end)

    def _nodes(self, reduction: Reduction) -> object:
        """The number of rows of a sum by node."""
        if reduction.nodes is not None:
            return reduction.nodes
        base = self._now(reduction.base)  # type: ignore[arg-type]
        return call(self.graph, aten.sym_size.int, base, 0, like=base)

    def _added(self, node: fx.Node, result: fx.Node) -> fx.Node:
        """What stands for `node`, given its sums: with what they are added to."""
        reduction = reduction_of(node)
        if reduction is None or reduction.base is None:
            return result
        with self.graph.inserting_before(node):
            return call(self.graph, aten.add.Tensor, self._now(reduction.base), result, like=node)

    def _rows(self, end: fx.Node) -> object:
        """The number of nodes that edges are grouped by, where no sum says it: of the rows that are taken by it."""
        matrix = self._now(self.matrices[end])
        size = matrix.meta["val"].shape[0]
        return size if isinstance(size, int) else call(self.graph, aten.sym_size.int, matrix, 0, like=matrix)

    def _grouped(self, index: Index, nodes: object, before: fx.Node) -> list[fx.Node]:
        """The grouping of edges the graph makes, once for all layers; none for inputs, where it is remembered."""
        tensor = index.tensor
        if tensor.op == "placeholder" and not any(writes(user) for user in tensor.users):
            return []
        key = index, str(size_of(nodes))
        if key not in self.grouped:
            both = call(self.graph, ops.group_edges.default, tensor, index.row, nodes, like=before)
            parts = [call(self.graph, operator.getitem, both, i, like=before) for i in range(2)]
            for node in (both, *parts):
                _torch.must_recompute(node)  # backward rather sorts again than reads what was saved
            self.grouped[key] = parts[0], parts[1]
        return list(self.grouped[key])


def _is_short(node: fx.Node) -> bool:
    """Whether a node's floats have 16 bits: sums that torch takes of such, by node, stop at some hundred of them."""
    return is_float(node) and node.meta["val"].dtype.itemsize == 2


def _adds_atomically(node: fx.Node) -> bool:
    """Whether Inductor makes one loop of a sum by node and of what is summed up."""
    value = node.meta["val"]
    if value.device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return False
    return value.dtype in (torch.float32, torch.float64)


def _body(made: Region) -> fx.Graph:
    """What a region computes as a graph: its first inputs are the operands, its output is the end."""
    nodes = sorted({*made.inside, made.end})
    inputs = [n for node in nodes for n in node.all_input_nodes if n not in nodes]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in (*made.operands, *dict.fromkeys(n for n in inputs if n not in made.operands)):
        placeholder = graph.placeholder(node.name)
        placeholder.meta["val"] = node.meta.get("val")
        copies.setdefault(node, placeholder)
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[made.end])
    return graph


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found, todo = set(), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def _descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found, todo = set(), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.users)
    return found


def _nbytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return _torch.size_hint(value.shape[0]) * width(node) * value.dtype.itemsize if value.dim() else 0
