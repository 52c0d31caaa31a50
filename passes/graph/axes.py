"""Axes: which dimensions of a graph's tensors are the same, whatever their sizes: nodes, edges, features.

Sizes alone don't tell: a graph may have as many edges as nodes, or as a layer has columns. So dimensions are followed
op by op, in both directions. A pointwise op has those of its arguments, a matrix product the rows of one and the
columns of the other, taken rows those of their index. An op that is not known has those that stand at the same place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from . import _torch
from .split import is_tensor

aten, ops = torch.ops.aten, torch.ops.actcompile

Place = tuple[fx.Node, int]
"""A dimension of a node's value."""
Link = tuple[Place, Place]

VIEWS = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
)
REDUCING = (
    *(aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.any.dim, aten.argmax.default),
    *(aten.var.correction, aten.var_mean.correction, aten.prod.dim_int, aten.logsumexp.default, aten.argmin.default),
)
LIKE = (  # of our ops, those whose result has the shape of their argument
    *(ops.narrow.default, ops.widen.default, ops.copy.default),
    *(ops.mask_to_bytes.default, ops.bytes_to_mask.default),
)
SCATTERING = (aten.scatter_add.default, aten.scatter_reduce.two, aten.scatter.src, aten.scatter.value)


class Axes:
    """The axes of the nodes of some graphs: sets of dimensions that are the same."""

    def __init__(self) -> None:
        self._above: dict[Place, Place] = {}

    def of(self, node: fx.Node, dim: int) -> Place:
        """What stands for the axis that a dimension is; negative dimensions count from the last."""
        place = node, dim % max(node.meta["val"].dim(), 1)
        while (above := self._above.get(place, place)) != place:
            self._above[place] = self._above.get(above, above)
            place = above
        return place

    def join(self, one: Place, other: Place) -> None:
        self._above[self.of(*one)] = self.of(*other)

    def read(self, graph: fx.Graph) -> None:
        """Takes in what the ops of a graph do."""
        for node in graph.nodes:
            if node.op == "call_function" and is_tensor(node):
                for one, other in links(node):
                    self.join(one, other)


def links(node: fx.Node) -> Iterator[Link]:
    """Dimensions of a node's value and of its arguments that are the same."""
    args: Any = node.args
    op: Any = args[0] if node.target is operator.getitem else node
    match node.target:
        case aten.mm.default | aten.bmm.default:
            yield from _product(node, args[0], args[1])
        case aten.addmm.default | aten.baddbmm.default:
            yield from _product(node, args[1], args[2])
            yield from _from_the_right(node, args[0])
        case aten.permute.default:
            yield from (((node, i), (args[0], d)) for i, d in enumerate(args[1]))
        case aten.t.default:
            yield from (((node, i), (args[0], -1 - i)) for i in range(node.meta["val"].dim()))
        case aten.select.int:
            dim = args[1] % args[0].meta["val"].dim()
            yield from (((node, i), (args[0], i + (i >= dim))) for i in range(node.meta["val"].dim()))
        case aten.select_scatter.default:
            yield from _in_place(node, args[0])
            dim = args[2] % node.meta["val"].dim()
            yield from (((node, i + (i >= dim)), (args[1], i)) for i in range(args[1].meta["val"].dim()))
        case aten.cat.default:
            dim = (args[1] if len(args) > 1 else 0) % node.meta["val"].dim()
            yield from (link for part in args[0] for link in _in_place(node, part, but=dim))
        case aten.index.Tensor | aten._unsafe_index.Tensor:
            yield from _indexed(node, args[0], args[1])
        case aten.index_put.default | aten._unsafe_index_put.default:
            yield from _in_place(node, args[0])
            yield from _indexed(args[2], args[0], args[1])
        case aten.index_select.default:
            yield (node, args[1]), (args[2], 0)
            yield from _in_place(node, args[0], but=args[1])
        case aten.index_add.default:
            yield (args[3], args[1]), (args[2], 0)
            yield from _in_place(node, args[0])
            yield from _in_place(node, args[3], but=args[1])
        case aten.embedding.default:
            yield from (((node, i), (args[1], i)) for i in range(args[1].meta["val"].dim()))
            yield (node, -1), (args[0], -1)
        case aten.embedding_dense_backward.default:
            yield (args[0], 0), (args[1], 0)
            yield (node, -1), (args[0], -1)
        case aten.gather.default:
            yield from _in_place(node, args[2])
            yield from _in_place(node, args[0], but=args[1])
        case target if target in SCATTERING:
            yield from _in_place(node, args[0])
            yield from _in_place(node, args[2], but=args[1])
            if len(args) > 3 and isinstance(args[3], fx.Node):
                yield from _in_place(args[2], args[3])
        case target if target in VIEWS:
            yield from _viewed(node, args[0])
        case target if target in REDUCING:
            yield from _reduced(node, args[0], args[1] if len(args) > 1 else None)
        case target if target is aten.expand.default or torch.Tag.pointwise in getattr(target, "tags", ()):
            yield from (link for a in node.all_input_nodes if is_tensor(a) for link in _from_the_right(node, a))
        case _:
            if op.target in REDUCING:
                yield from _reduced(node, op.args[0], op.args[1] if len(op.args) > 1 else None)
            elif op.target in LIKE or not str(op.target).startswith("actcompile."):
                yield from (link for a in op.all_input_nodes if is_tensor(a) for link in _in_place(node, a))


def _same(a: object, b: object) -> bool:
    return _torch.known_true(a == b)


def _product(node: fx.Node, a: fx.Node, b: fx.Node) -> Iterator[Link]:
    yield (a, -1), (b, -2)
    yield (node, -2), (a, -2)
    yield (node, -1), (b, -1)
    if node.meta["val"].dim() == 3:
        yield (node, 0), (a, 0)
        yield (node, 0), (b, 0)


def _from_the_right(node: fx.Node, argument: fx.Node) -> Iterator[Link]:
    """As broadcasting has it."""
    sizes, others = node.meta["val"].shape, argument.meta["val"].shape
    for i in range(1, min(len(sizes), len(others)) + 1):
        if _same(sizes[-i], others[-i]):
            yield (node, -i), (argument, -i)


def _in_place(node: object, argument: object, but: int | None = None) -> Iterator[Link]:
    """Dimensions at the same place, and of the same size, of tensors with as many."""
    if isinstance(node, fx.Node) and isinstance(argument, fx.Node):
        sizes, others = node.meta["val"].shape, argument.meta["val"].shape
        if len(sizes) == len(others):
            for i, (a, b) in enumerate(zip(sizes, others, strict=True)):
                if _same(a, b) and (but is None or i != but % len(sizes)):
                    yield (node, i), (argument, i)


def _indexed(rows: fx.Node, matrix: fx.Node, indices: Sequence[fx.Node | None]) -> Iterator[Link]:
    """What `matrix[indices]` has of the matrix and of one index of one dimension, or of masks of none of its own."""
    given = [(i, index) for i, index in enumerate(indices) if index is not None]
    if len(given) == 1 and given[0][1].meta["val"].dim() == 1 and is_tensor(rows):
        dim, index = given[0]
        if index.meta["val"].dtype is not torch.bool:
            yield (rows, dim), (index, 0)
        yield from _in_place(rows, matrix, but=dim)


def _viewed(node: fx.Node, argument: fx.Node) -> Iterator[Link]:
    """Dimensions of the same size with as many elements before them."""
    befores: Any = 1
    places: list[tuple[int, Any, Any]] = []
    for i, size in enumerate(argument.meta["val"].shape):
        places.append((i, befores, size))
        befores = befores * size
    before: Any = 1
    for i, size in enumerate(node.meta["val"].shape):
        for j, known, other in places:
            if not _same(size, 1) and _same(size, other) and _same(before, known):
                yield (node, i), (argument, j)
        before = before * size


def _reduced(node: fx.Node, argument: fx.Node, dims: object) -> Iterator[Link]:
    """The dimensions that are left when those of `dims` are summed up."""
    count = argument.meta["val"].dim()
    gone = {d % max(count, 1) for d in ([dims] if isinstance(dims, int) else dims or range(count))}  # type: ignore[union-attr, attr-defined]
    keeps = node.meta["val"].dim() == count
    left = [d for d in range(count) if d not in gone]
    yield from (((node, d if keeps else i), (argument, d)) for i, d in enumerate(left))
