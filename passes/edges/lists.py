"""`lists`: every tensor of a step that has a row for each edge and is in memory, and why it is there.

Which axis is that of edges is found by dataflow: two indices of nodes lie along it, as the two rows of an `edge_index`
do.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from actcompile.kernels.edges.program import REDUCTIONS, parse

from ..graph import _torch
from ..graph.axes import Axes, Link, Place
from ..graph.find import maker
from ..graph.origin import op_name
from ..graph.split import Split, is_tensor, is_view, readers_of
from .takes import PRODUCTS, Index, index_of, reduction_of, take_of

aten, ops = torch.ops.aten, torch.ops.actcompile

BATCHED = (aten.bmm.default, aten.baddbmm.default)
CASTS = (ops.narrow.default, ops.widen.default)
DECODING = (ops.dequantize.default, ops.unpack_bits.default, ops.widen.default, ops.bytes_to_mask.default)


def lists(
    split: Split, counted: Counted, made: Iterable[fx.Node], unfused: Mapping[str, str], off: str
) -> dict[fx.Node, str]:
    """Of the nodes of both graphs that have memory of their own, those with a row for each edge, and why they are made.

    Args:
        counted: what rows are counted in.
        made: nodes with memory of their own.
        unfused: from the last node of a region that was not fused to the reason.
        off: why nothing was fused; empty where that was tried.
    """
    why = _Why(split, counted, unfused, off)
    return {node: why.of(node) for node in made if counted.in_edges(node)}


def maker_of(node: fx.Node) -> str:
    """What makes a value, such as `aten.addmm.default`, also where it is one of several results."""
    return maker(_maker(node))


def _maker(node: fx.Node) -> Any:
    """The op that a node is a result of."""
    return node.args[0] if node.target is operator.getitem else node


class Counted:
    """What the rows, or columns, of the tensors of both graphs are counted in: edges, or nodes that edges name."""

    def __init__(self, split: Split) -> None:
        self.axes, self.origin = Axes(), split.origin()
        self.graphs = [split.forward.graph, split.backward.graph]
        self.indices: dict[Index, list[Any]] = {}  # -> the numbers of nodes that it names
        self.into: list[Place] = []  # dimensions that are counted in nodes
        for graph in self.graphs:
            self.axes.read(graph)
            for node in graph.nodes:
                for one, other in self._links(node):
                    self.axes.join(one, other)
        for node, placeholder in split.pairs:
            for dim in range(node.meta["val"].dim() if is_tensor(node) else 0):
                self.axes.join((node, dim), (placeholder, dim))
        self.edges = self._edges()
        self.nodes = {self.axes.of(*place) for place in self.into} - self.edges
        while more := {axis for axis in self._parts() if axis not in self.nodes} - self.edges:
            self.edges |= more

    def in_edges(self, node: fx.Node) -> bool:
        """Whether a node's value has a row, or a column, for each edge."""
        return not self._axes(node).isdisjoint(self.edges)

    def in_nodes(self, node: fx.Node) -> bool:
        """Whether a node's value has a row, or a column, for each node of the model's graph, and none for each edge."""
        return not self.in_edges(node) and not self._axes(node).isdisjoint(self.nodes)

    def _axes(self, node: fx.Node) -> set[Place]:
        return {self.axes.of(node, d) for d in range(node.meta["val"].dim())} if is_tensor(node) else set()

    def _edges(self) -> set[Place]:
        """The axes along which both ends of an edge lie: as the rows of a tensor of two, or as two tensors that name as
        many nodes, unless the axis is that of nodes itself, which have types and graphs as edges have ends."""
        named = {self.axes.of(*place) for place in self.into}
        found = {self.axes.of(i.tensor, -1) for i in self.indices if i.row >= 0 and i.tensor.meta["val"].shape[0] == 2}
        for one, other in itertools.combinations(self.indices, 2):
            axis = self.axes.of(one.tensor, -1)
            if axis not in found | named and axis == self.axes.of(other.tensor, -1):
                numbers = itertools.product(self.indices[one], self.indices[other])
                if any(_torch.known_true(a == b) for a, b in numbers):
                    found.add(axis)
        return found

    def _parts(self) -> Iterator[Place]:
        """The axes of which an axis of edges is put together, or selected."""
        for node in (n for graph in self.graphs for n in graph.nodes if self.in_edges(n)):
            args: Any = node.args
            if node.target is aten.cat.default:
                dim = args[1] if len(args) > 1 else 0
                if self.axes.of(node, dim) in self.edges:
                    yield from (self.axes.of(part, dim) for part in args[0])
            elif node.target is aten.nonzero.default and args[0].meta["val"].dim() == 1:
                yield self.axes.of(args[0], 0)
            elif node.target is aten.index.Tensor:
                for dim, mask in enumerate(args[1]):
                    if mask is not None and mask.meta["val"].dtype is torch.bool and mask.meta["val"].dim() == 1:
                        yield from (self.axes.of(mask, 0), self.axes.of(args[0], dim))

    def _links(self, node: fx.Node) -> Iterable[Link]:
        """What message passing has in common: that of aten, whose indices are taken down, and ours."""
        args: Any = node.args
        if (take := take_of(node)) is not None and not _is_list(node):
            self._index(take.index, take.matrix)
            yield (take.index.tensor, -1), (node, 0)
        elif (reduction := reduction_of(node)) is not None:
            self._index(reduction.index, node)
            yield (reduction.index.tensor, -1), (reduction.value, 0)
        elif node.target is ops.aggregate.default:
            matrix, weight, other, row, by, by_row, *_ = args
            self._index(Index(other, max(row, -1)), matrix)
            self._index(Index(by, by_row), node)
            yield (by, -1), (other, -1)
            if weight is not None:
                yield (by, -1), (weight, 0)
        elif node.target is ops.degree.default:
            self._index(Index(*args[:2]), node)
        elif node.target is ops.edges.default:
            text, by, row, nodes, _, _, indices, rows, operands, grouped = args
            numbers = [max(r, -1) for r in (*rows, row)]  # arranged indices have one row, too
            ends = [Index(*pair) for pair in zip((*indices, by), numbers, strict=True)]  # the last one is -1, too
            number = nodes.meta["val"] if isinstance(nodes, fx.Node) else nodes
            self.indices.setdefault(self._in_forward(ends[-1]), []).append(number)
            for operand, tensor in zip(parse(text).operands, operands, strict=True):
                if operand.where == "edge":
                    yield (by, -1), (tensor, 0)
                elif operand.where == "take":
                    self._index(ends[operand.index], tensor)
            yield from (((by, -1), (index, -1)) for index in (*indices, *grouped[1:]))
        elif node.target is operator.getitem and _maker(node).target is ops.edges.default:
            text, by, *_ = _maker(node).args
            kind = parse(text).outputs[args[1]].kind
            if kind in REDUCTIONS:
                self.into.append((node, 0))
            elif kind not in ("outer", "total"):  # of weights
                yield (by, -1), (node, 0)
        elif node.target is operator.getitem and _maker(node).target is ops.group_edges.default and args[1] == 1:
            yield (_maker(node).args[0], -1), (node, 0)
        elif node.target is ops.arrange_edges.default:
            yield (args[0], -1), (node, 0)

    def _index(self, index: Index, into: fx.Node) -> None:
        self.indices.setdefault(self._in_forward(index), []).append(into.meta["val"].shape[0])
        self.into.append((into, 0))

    def _in_forward(self, index: Index) -> Index:
        """The index of forward's that one of backward's has the value of."""
        node = index.tensor
        while node in self.origin or node.target in CASTS:
            node = self.origin[node] if node in self.origin else node.args[0]  # type: ignore[assignment]
        return (index_of(node) if index.row < 0 else None) or Index(node, index.row)


def _is_list(node: fx.Node) -> bool:
    return is_tensor(node) and not node.meta["val"].is_floating_point()


class _Why:
    def __init__(self, split: Split, counted: Counted, unfused: Mapping[str, str], off: str) -> None:
        self.counted, self.unfused, self.off = counted, unfused, off
        self.returned: Collection[object] = set(split.user_outputs)
        self.gradients: Collection[object] = set(split.backward.graph.output_node().args[0])  # type: ignore[arg-type]

    def of(self, node: fx.Node) -> str:
        """Why a tensor with a row for each edge is made."""
        made_by, readers = _maker(node), readers_of(node)
        held = {node, *(user for user in node.users if is_view(user))}
        if held & set(self.returned):
            return "the model returns it"
        if held & set(self.gradients):
            return "the gradient of an input or a parameter"
        if made_by.target in DECODING:
            return "a saved activation, decoded"
        if made_by.target in (ops.group_edges.default, ops.arrange_edges.default):
            return "the edges in the order of nodes, for fused message passing"
        if made_by.target is ops.edges.default and _is_list(node):
            return "where a comparison holds, for backward"
        if node.meta["val"].dtype in (torch.int64, torch.int32) or any(
            is_tensor(op) and _torch.makes_sizes(op) for op in readers
        ):
            return "a list of edges that the model makes itself"
        if any(op.target is ops.pack_bits.default for op in readers):
            return "a mask that is saved in bits"
        product = next((op for op in (made_by, *readers) if op.target in (*PRODUCTS, *BATCHED)), None)
        if product is not None:
            return f"{'made' if product is made_by else 'read'} by a matrix product ({op_name(product)})"
        if (op := self._product_before(node)) is not None:
            return f"made of a matrix product's result ({op_name(op)})"
        if node.meta["val"].device.type != "cpu":
            return "message passing is fused on the CPU only"
        if self.off:
            return self.off
        if (reason := self._unfused(node)) is not None:
            return f"not fused: {reason}"
        if all(_torch.known_true(size == 1) for size in node.meta["val"].shape[1:]):
            return "one number for each edge"
        if made_by.target is ops.edges.default:
            return f"made by fused message passing for {_named(readers)}"
        ours = [op for op in readers if op.target in (ops.edges.default, ops.aggregate.default)]
        if ours:
            return f"made by {op_name(made_by)}, which is not fused, for fused message passing"
        return f"made by {op_name(made_by)} for {_named(readers)}, which are not fused"

    def _product_before(self, node: fx.Node) -> fx.Node | None:
        """A matrix product of whose result a node is made, element by element."""
        seen, todo = {node}, [node]
        while todo:
            made = todo.pop()
            if made.target in (*PRODUCTS, *BATCHED):
                return made
            if is_view(made) or torch.Tag.pointwise in getattr(made.target, "tags", ()):
                todo += [n for n in made.all_input_nodes if n not in seen and self.counted.in_edges(n)]
                seen.update(todo)
        return None

    def _unfused(self, node: fx.Node) -> str | None:
        """The reason why the region that a node belongs to was not fused."""
        seen, todo = {node}, [node]
        while todo:
            for user in todo.pop(0).users:
                if user.name in self.unfused:
                    return self.unfused[user.name]
                if user not in seen and self.counted.in_edges(user):
                    seen.add(user)
                    todo.append(user)
        return None


def _named(readers: Collection[fx.Node]) -> str:
    return ", ".join(dict.fromkeys(map(op_name, readers))) or "nothing"
