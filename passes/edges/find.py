"""What of a joint graph are regions of message passing: found, and made to agree with each other."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..graph import _torch
from ..graph.split import ancestors, descendants, is_tensor
from .computable import LARGEST, constant_of, is_float, product_of
from .regions import Region, Unfit, region
from .rows import Rows, width
from .takes import COPIES, Reduction, Take, is_remembered, is_transposed, original, reduction_of, take_of

aten = torch.ops.aten
EQUALITIES = (aten.eq.Tensor, aten.ne.Tensor)


@dataclass(frozen=True)
class Sums:
    """Rows that are summed up as they are taken, or times one number for each edge, which is another node."""

    take: Take
    weight: fx.Node | None
    reduction: Reduction


@dataclass(frozen=True)
class Count:
    """The same number for each edge, summed up by node: the number of a node's edges, times it."""

    number: float
    reduction: Reduction


Found = dict[fx.Node, Region | Sums | Count]
"""By the node that each of them ends with."""


class Finder:
    """Looks for regions in a graph.

    Attributes:
        refused: nodes that end no region although they look like it, with the reason.
        matrices: for regions that end with no sum by node: rows of those nodes.
        swapped: products along edges that are made the other way round.
    """

    def __init__(self, graph: fx.Graph, num_fwd_outputs: int, parameters: Collection[str]) -> None:
        self.graph = graph
        outputs = graph.output_node().args[0]
        self.forward = ancestors(n for n in outputs[:num_fwd_outputs] if isinstance(n, fx.Node))  # type: ignore[index, union-attr]
        placeholders = graph.find_nodes(op="placeholder")
        self.of_tangents = descendants(n for n in placeholders if "tangents" in n.name)
        self.of_parameters = descendants(n for n in placeholders if n.name in parameters)
        self.rows = Rows(graph)
        self.refused: list[tuple[fx.Node, str]] = []
        self.matrices: dict[fx.Node, fx.Node] = {}
        self.swapped: set[fx.Node] = set()

    def find(self) -> Found:
        """All regions of the graph, in its order."""
        found: Found = {}
        masks: set[fx.Node] = set()
        for node in self.graph.nodes:
            if not is_tensor(node) or node.meta["val"].device.type not in ("cpu", "cuda"):
                continue
            try:
                made = self._ended_by(node)
            except (Unfit, RecursionError) as reason:  # or thousands of ops, each on what the one before made
                self.refused.append((node, str(reason)))
                continue
            if made is not None:
                found[node] = made
                masks.update(made.masks if isinstance(made, Region) else ())
        for mask in masks:
            try:
                found[mask] = self._apart(mask, mask, "edge", exact=lambda _: False)
            except (Unfit, RecursionError) as reason:  # it stays as it is, and `masks` has it made in forward
                self.refused.append((mask, str(reason)))
        self._agree(found)
        self._multiply(found)
        self._pack(masks & found.keys(), found)
        self._count(found)
        return {node: found[node] for node in sorted(found)}

    def _ended_by(self, node: fx.Node) -> Region | Sums | None:
        """The region that a node ends, if it ends one."""
        reduction = reduction_of(node)
        if reduction is not None:
            if not self.rows.taken(reduction.value) and width(reduction.value) == 1 and not _is_short(node):
                return None  # degrees and the like
            linear = self._linear(reduction)
            if linear is not None:
                return Sums(*linear, reduction)
            nodes, exact = node.meta["val"].shape[0], self._exact(node)
            return region(node, reduction.value, reduction.kind, reduction.index, nodes, self.rows.computed, exact)
        match node:
            case fx.Node(target=aten.mm.default, args=(fx.Node() as one, fx.Node() as other)) if is_transposed(one):
                return self._outer(node, one, other)
            case fx.Node(target=aten.sum.dim_IntList, args=(fx.Node() as value, [*dims], *_)) if not node.kwargs:
                if width(value) == 1 or not self.rows.of_edges(value):
                    return None
                if dims == [0]:
                    return self._apart(node, value, "total")
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

    def _multiply(self, found: Found) -> None:
        """Has products of taken rows that are read outside of regions made by regions of their own."""
        read = {n for n in self.graph.output_node().all_input_nodes}
        for node in reversed(self.graph.nodes):
            if node not in read:
                continue
            if node not in found and self.rows.taken(node) and product_of(node) is not None:
                try:
                    found[node] = self._apart(node, node, "edge")
                except (Unfit, RecursionError) as reason:
                    self.refused.append((node, str(reason)))
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
        if self.rows.has_nodes(rows) or not (self.rows.of_edges(rows) or self.rows.of_edges(other)):
            return None
        if not all(isinstance(size, int) for size in sizes) or not 0 < sizes[0] * sizes[1] <= LARGEST:
            return None
        value, inner = other, rows
        if self.rows.taken(rows) and not self.rows.taken(other):
            value, inner = rows, other  # the inner axis is of what is read: regions that compute the same can be merged
        try:
            made = self._apart(node, value, "outer", other=inner)
        except Unfit:  # the rows of one inner axis have heads, perhaps
            value, inner = inner, value
            made = self._apart(node, value, "outer", other=inner)
        if value is rows:
            self.swapped.add(node)
        made.inside.append(transposed)
        return made

    def _agree(self, found: Found) -> None:
        """Leaves an extremum as it is where what compares messages with it is not fused, and the other way round.

        Which neighbour was the largest is known only where both compute its message alike, to the last bit.
        """
        left = None
        while left != len(found):
            left = len(found)
            for node, made in list(found.items()):
                if not isinstance(made, Region):
                    continue
                steps = {step.op for step in made.program.steps}
                if steps <= {"eq", "ne"}:
                    continue  # messages are read, not computed
                if not (self._compared_with(node) <= found.keys() and _equals_only(made, found)):
                    del found[node]
                    self.refused.append((node, "compared with what is not fused"))

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

    def _pack(self, masks: Collection[fx.Node], found: Found) -> None:
        """Has masks that nothing but regions reads written and read as bits."""
        regions = [made for made in found.values() if isinstance(made, Region)]
        read: set[fx.Node | None] = {node for made in regions for node in made.operands}
        for made in found.values():
            read |= {made.take.matrix, made.weight} if isinstance(made, Sums) else set()
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

    def _count(self, found: Found) -> None:
        """Has the edges of a node counted by how they are grouped, where they are, and that is remembered."""
        grouped = set()
        for node, made in found.items():
            reduction = reduction_of(node)
            rows = node if reduction is not None else self.matrices[node]
            index = made.by if isinstance(made, Region) else made.reduction.index
            grouped.add((index, str(rows.meta["val"].shape[0])))
        for node in self.graph.nodes:
            reduction = reduction_of(node) if is_tensor(node) and width(node) == 1 else None
            if reduction is None or reduction.kind != "sum" or not is_remembered(reduction.index):
                continue
            number = constant_of(original(reduction.value))
            if number is not None and (reduction.index, str(node.meta["val"].shape[0])) in grouped:
                found[node] = Count(number, reduction)

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


def _equals_only(made: Region, found: Collection[fx.Node]) -> bool:
    """Whether what a region computes is looked up only in what is fused, too: elsewhere it is computed otherwise."""
    for step in made.program.steps:
        computed = [a for a in step.arguments if isinstance(a, str) and a[0] == "v"]
        if step.op in ("eq", "ne") and computed and not any(isinstance(a, float) for a in step.arguments):
            read = [made.operands[int(a[1:])] for a in step.arguments if isinstance(a, str) and a[0] == "o"]
            if not any(original(node) in found for node in read):
                return False
    return True


def _is_short(node: fx.Node) -> bool:
    """Whether a node's floats have 16 bits: sums that torch takes of such, by node, stop at some hundred of them."""
    return is_float(node) and node.meta["val"].dtype.itemsize == 2
