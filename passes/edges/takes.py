"""How message passing is written in aten: rows of nodes taken for every edge, and rows of edges added up by node."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..graph import _torch
from ..graph.split import is_tensor, writes

aten = torch.ops.aten
SAME = (aten.clone.default, aten.alias.default, aten.detach.default)
PRODUCTS = (aten.mm.default, aten.addmm.default)
COPIES = (*SAME, aten.expand.default, aten.view.default)


@dataclass(frozen=True)
class Index:
    """The node at one end of every edge: a row of a tensor of (2, edges), or all of a tensor, with a row of -1."""

    tensor: fx.Node
    row: int

    @property
    def edges(self) -> object:
        """The number of edges."""
        return self.tensor.meta["val"].shape[-1]


@dataclass(frozen=True)
class Take:
    """The rows of `matrix` that an index names."""

    matrix: fx.Node
    index: Index


@dataclass(frozen=True)
class Reduction:
    """The rows of `value`, of (edges, ...), added up by what an index names, or the largest or smallest of them.

    base: what they are added to; None where that is zero.
    nodes: the number of rows of the result: a number, or the node that is it; None where `base` has to be asked.
    """

    kind: str
    index: Index
    value: fx.Node
    base: fx.Node | None
    nodes: object


def index_of(node: object, trailing: int = 0) -> Index | None:
    """The index that a node is: of rows, or with `trailing` dimensions more along which it is the same."""
    if not isinstance(node, fx.Node) or not _is_index(node):
        return None
    column = _unwrapped(node, (aten.expand.default,))
    sizes = column.meta["val"].shape
    if len(sizes) != 1 + trailing or not all(_torch.known_true(size == 1) for size in sizes[1:]):
        return None
    rows = _unwrapped(column, (aten.view.default, aten.unsqueeze.default))
    match rows:
        case fx.Node(target=aten.select.int, args=(fx.Node() as tensor, 0, int() as row)):
            if tensor.meta["val"].dim() == 2 and row >= 0:
                return Index(tensor, row)
    return Index(rows, -1) if rows.meta["val"].dim() == 1 else None


def _unwrapped(node: fx.Node, ops: tuple[object, ...]) -> fx.Node:
    """What a node is made of by some ops that leave the number of rows as it is."""
    while node.target in ops and isinstance(source := node.args[0], fx.Node) and _same_length(node, source):
        node = source
    return node


def original(node: fx.Node) -> fx.Node:
    """What a node is a copy, or a view of the same shape, of; as autograd expands what is of that shape already."""
    while node.target in COPIES and isinstance(source := node.args[0], fx.Node) and same_sizes(node, source, 0):
        node = source
    return node


def size_of(size: object) -> object:
    """The value of a size, which is a number or a node."""
    return size.meta["val"] if isinstance(size, fx.Node) else size


def is_remembered(index: Index) -> bool:
    """Whether edges are grouped by an index once for all steps: it is an input, which nothing changes."""
    return index.tensor.op == "placeholder" and not any(map(writes, index.tensor.users))


def is_transposed(node: object) -> bool:
    """Whether a node is another matrix, transposed."""
    match node:
        case fx.Node(target=aten.permute.default, args=(_, [1, 0] | [-1, -2])):
            return True
    return False


def take_of(node: fx.Node) -> Take | None:
    """What rows a node takes, or None where it does something else."""
    match node:
        case fx.Node(target=aten.index.Tensor, args=(fx.Node() as matrix, [by])):
            index = index_of(by)
        case fx.Node(target=aten.index_select.default, args=(fx.Node() as matrix, 0, by)):
            index = index_of(by)
        case fx.Node(target=aten.gather.default, args=(fx.Node() as matrix, 0, by)):
            trailing = matrix.meta["val"].dim() - 1
            index = index_of(by, trailing) if same_sizes(node, matrix, 1) else None
        case _:
            return None
    return None if index is None or node.kwargs or not _same_device(index.tensor, matrix) else Take(matrix, index)


def reduction_of(node: fx.Node) -> Reduction | None:
    """What a node sums up by an index of rows, or None where it does something else."""
    kind = "sum"
    match node:
        case fx.Node(target=aten.index_put.default, args=(fx.Node() as base, [by], fx.Node() as value, True)):
            index = index_of(by)
        case fx.Node(target=aten.index_add.default, args=(fx.Node() as base, 0, by, fx.Node() as value)):
            index = None if node.kwargs else index_of(by)
        case fx.Node(target=aten.scatter_add.default, args=(fx.Node() as base, 0, by, fx.Node() as value)):
            index = index_of(by, value.meta["val"].dim() - 1) if _all_of(by, value) else None
        case fx.Node(
            target=aten.scatter_reduce.two, args=(fx.Node() as base, 0, by, fx.Node() as value, str() as name)
        ) if name in ("sum", "amax", "amin"):
            kind = name.removeprefix("a")
            index = index_of(by, value.meta["val"].dim() - 1) if _all_of(by, value) else None
            included = node.kwargs.get("include_self", True)
            if (kind != "sum" and included) or not (included or is_zero(base)):
                return None
        case _:
            return None
    if index is None or not _same_device(index.tensor, value):
        return None
    if not same_sizes(node, value, 1) or base.meta["val"].dtype != value.meta["val"].dtype:
        return None
    if not _torch.known_true(value.meta["val"].shape[0] == index.edges):
        return None  # one row, put at several places
    if is_zero(base):
        return Reduction(kind, index, value, None, base.args[0][0])  # type: ignore[index]
    rows = base.meta["val"].shape[0]
    return Reduction(kind, index, value, base, rows if isinstance(rows, int) else None)


def is_at_most_zero(node: object) -> bool:
    """Whether a node is rows of edges less the largest of their node's, as in a softmax: at most zero."""
    match node:
        case fx.Node(target=aten.sub.Tensor, args=(fx.Node() as value, fx.Node() as taken)) if not node.kwargs:
            take = take_of(original(taken))
            largest = reduction_of(original(take.matrix)) if take is not None else None
            return (
                take is not None
                and largest is not None
                and largest.kind == "max"
                and largest.index == take.index
                and original(largest.value) is original(value)
            )
    return False


def _is_index(node: fx.Node) -> bool:
    return is_tensor(node) and node.meta["val"].dtype in (torch.int64, torch.int32)


def _same_device(node: fx.Node, other: fx.Node) -> bool:
    """Rows on CUDA may be taken by an index on the CPU: that is left to torch."""
    return node.meta["val"].device == other.meta["val"].device


def _same_length(node: fx.Node, other: fx.Node) -> bool:
    sizes, others = node.meta["val"].shape, other.meta["val"].shape
    return len(sizes) > 0 and len(others) > 0 and _torch.known_true(sizes[0] == others[0])


def same_sizes(node: fx.Node, other: fx.Node, start: int) -> bool:
    """Whether two tensors have the same sizes from dimension `start` on."""
    sizes, others = node.meta["val"].shape[start:], other.meta["val"].shape[start:]
    return len(sizes) == len(others) and all(_torch.known_true(a == b) for a, b in zip(sizes, others, strict=True))


def _all_of(index: object, value: fx.Node) -> bool:
    """Whether an index of elements says where each element of a value goes."""
    return isinstance(index, fx.Node) and is_tensor(index) and same_sizes(index, value, 0)


def is_zero(node: fx.Node) -> bool:
    """Whether a node is full of zeros."""
    return node.target is aten.full.default and node.args[1] in (0, 0.0)
