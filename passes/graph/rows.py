"""Linear maps of rows, as message passing applies them: taking neighbours' rows, weighing them, adding them up.

A map is read from the graph, op by op, forward's or backward's. Two maps are the same if they are the same sum of the
same products of factors, by the same indices and weights; each factor's transpose is a factor, too.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from . import _torch
from .split import Split, is_tensor, writes

aten, ops = torch.ops.aten, torch.ops.actcompile

TRANSPOSED = {
    "take": "sum",
    "sum": "take",
    "mul": "mul",
    "div": "div",
    "spmm": "spmm_transposed",
    "spmm_transposed": "spmm",
}
Map = Counter[tuple[tuple[str, object], ...]]
"""A map of rows as a sum of products. The factors of each, first to last, are kinds of `RowOp` and what they go by."""


class Names:
    """The same name for all nodes, of both graphs, that have the same value."""

    def __init__(self, split: Split) -> None:
        self.origin = split.origin()
        self.known: dict[fx.Node, str] = {}
        self.short: dict[str, str] = {}

    def of(self, value: object) -> object:
        if not isinstance(value, fx.Node):
            return value
        if value not in self.known:
            self.known[value] = self._find(value)
        return self.known[value]

    def maker(self, value: object) -> object:
        """The forward node that a backward input has the value of; others as they are."""
        return self.origin.get(value, value) if isinstance(value, fx.Node) else value

    def of_rows(self, by: object) -> object:
        """The name of an index, whether it is a column or not; those of other values as they are."""
        if isinstance(by, tuple):
            return tuple(self.of(value) for value in by)
        maker = self.maker(by)
        match maker:
            case fx.Node(target=aten.view.default | aten.unsqueeze.default, args=(rows, *_)) if _index(rows):
                return self.of(rows)
        return self.of(maker)

    def _find(self, node: fx.Node) -> str:
        if node in self.origin:
            return str(self.of(self.origin[node]))
        target = node.target
        own = f"%{id(node)}"
        if not isinstance(target, torch._ops.OpOverload) or writes(node):
            return own  # an input, say
        if torch.Tag.nondeterministic_seeded in target.tags:
            return own
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _Verbatim(self.of(n)))
        return self.short.setdefault(f"{target} {args} {kwargs}", own)


class _Verbatim(str):
    """A name among arguments: printed without quotes, unlike strings that are arguments themselves."""

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class RowOp:
    """A node that maps the rows of a matrix.

    kind: "take", for the rows that the index `by` names; "sum", where row k is added to row `by[k]` of zeros; "mul" and
        "div", with one number for each row or one for all; "aggregate", a take, a mul and a sum in one; "spmm" and
        "spmm_transposed", with the sparse matrix of three arrays. An index may be a column.
    """

    kind: str
    matrix: fx.Node
    by: fx.Node | float | tuple[object, ...]


def row_op(node: fx.Node, names: Names) -> RowOp | None:
    """How a node maps the rows of a matrix, or None where it does something else."""
    found: tuple[str, object, fx.Node | float | None] | None = None
    match node:
        case fx.Node(target=ops.spmm.default, args=(pointer, index, value, fx.Node() as matrix)):
            return RowOp("spmm", matrix, (pointer, index, value))
        case fx.Node(target=ops.spmm_transposed.default, args=(pointer, index, value, fx.Node() as matrix, _)):
            return RowOp("spmm_transposed", matrix, (pointer, index, value))
        case fx.Node(target=ops.aggregate.default, args=(fx.Node() as matrix, weight, take, row, by, by_row, *_)):
            return RowOp("aggregate", matrix, (weight, (take, row), (by, by_row))) if _is_matrix(matrix) else None
        case fx.Node(target=aten.index.Tensor, args=(matrix, [index])):
            found = "take", matrix, _index(index)
        case fx.Node(target=aten.index_select.default, args=(matrix, 0, index)):
            found = "take", matrix, _index(index)
        case fx.Node(target=aten.gather.default, args=(matrix, 0, index)):
            found = "take", matrix, _unexpanded(index)
        case fx.Node(target=aten.index_put.default, args=(zeros, [index], matrix, True)) if _is_zero(zeros, names):
            found = "sum", matrix, _index(index)
        case fx.Node(target=aten.index_add.default, args=(zeros, 0, index, matrix)) if _is_zero(zeros, names):
            found = "sum", matrix, _index(index)
        case fx.Node(target=aten.scatter_add.default, args=(zeros, 0, index, matrix)) if _is_zero(zeros, names):
            found = "sum", matrix, _unexpanded(index) if _same_shape(index, matrix) else None
        case fx.Node(target=aten.mul.Tensor, args=(a, b)):
            matrix, factor = (a, b) if _factor(b) is not None else (b, a)
            found = "mul", matrix, _factor(factor)
        case fx.Node(target=aten.div.Tensor, args=(matrix, factor)):
            found = "div", matrix, _factor(factor)
    if found is None or node.kwargs or not _is_matrix(node):
        return None
    kind, mapped, by = found
    if by is None or not isinstance(mapped, fx.Node) or not _is_matrix(mapped):
        return None
    if not _torch.known_true(node.meta["val"].shape[1] == mapped.meta["val"].shape[1]):
        return None  # a gather of some columns, say
    if kind in ("mul", "div") and not _same_shape(node, mapped):
        return None
    if kind == "sum" and not _torch.known_true(by.meta["val"].shape[0] == mapped.meta["val"].shape[0]):  # type: ignore[union-attr]
        return None  # one row, put at several places
    return RowOp(kind, mapped, by)


def _same_shape(*values: object) -> bool:
    """Whether tensors have the same shape, at all sizes; makes no guards."""
    shapes = [v.meta["val"].shape for v in values if isinstance(v, fx.Node) and is_tensor(v)]
    if len(shapes) < len(values) or len({len(shape) for shape in shapes}) > 1:
        return False
    return all(_torch.known_true(a == b) for shape in shapes[1:] for a, b in zip(shapes[0], shape, strict=True))


def _is_matrix(value: object) -> bool:
    return isinstance(value, fx.Node) and is_tensor(value) and value.meta["val"].dim() == 2


def _index(value: object) -> fx.Node | None:
    """An index of rows."""
    if not isinstance(value, fx.Node) or not is_tensor(value):
        return None
    index = value.meta["val"]
    return value if index.dim() == 1 and index.dtype in (torch.int64, torch.int32) else None


def _unexpanded(value: object) -> fx.Node | None:
    """The index of rows that was expanded to one of elements, as a column."""
    column = _before_expand(value)
    if not isinstance(column, fx.Node) or not is_tensor(column):
        return None
    shape = column.meta["val"].shape
    return column if len(shape) == 2 and _torch.known_true(shape[1] == 1) else None


def _factor(value: object) -> fx.Node | float | None:
    """One number for each row, or one for all."""
    value = _before_expand(value)
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node) or not is_tensor(value) or not value.meta["val"].is_floating_point():
        return None
    shape = value.meta["val"].shape
    return value if len(shape) <= 2 and (not shape or _torch.known_true(shape[-1] == 1)) else None


def _before_expand(value: object) -> object:
    while isinstance(value, fx.Node) and value.target is aten.expand.default:
        value = value.args[0]
    return value


def _is_zero(value: object, names: Names) -> bool:
    match names.maker(value):
        case fx.Node(target=aten.full.default, args=(_, 0 | 0.0)):
            return True
    return False


def terms(node: fx.Node, names: Names) -> list[tuple[fx.Node, tuple[tuple[str, object], ...]]]:
    """The matrices that a node is the sum of, each with how it maps it; none where it does something else."""
    if node.target in (aten.add.Tensor, aten.expand.default) and not node.kwargs:
        matrices = [a for a in node.args if _is_matrix(a) and _same_shape(a, node)]
        expected = 2 if node.target is aten.add.Tensor else 1
        return [(a, ()) for a in matrices] if len(matrices) == expected else []  # type: ignore[misc]
    op = row_op(node, names)
    return [] if op is None else [(op.matrix, steps(op, names))]


def steps(op: RowOp, names: Names) -> tuple[tuple[str, object], ...]:
    """The factors of what an op does; those of `aggregate` are to take rows, weigh them, and add them up."""
    if op.kind != "aggregate":
        return ((op.kind, names.of_rows(op.by)),)
    weight, take, by = cast(Any, op.by)
    take, by = ((names.of(tensor), row) for tensor, row in (take, by))
    weighed = () if weight is None else (("mul", names.of_rows(weight)),)
    return ("take", take), *weighed, ("sum", by)


def extend(maps: dict[fx.Node, Map], node: fx.Node, names: Names) -> None:
    """Adds the map of a node to those of its summands."""
    maps[node] = Map()
    for term, steps in terms(node, names):
        for product, times in maps[term].items():
            maps[node][product + steps] += times
