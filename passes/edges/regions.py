"""Regions of message passing: what is computed on rows of edges between takes and sums, as a program over edges.

A region is found from its end: a sum, a maximum or a minimum over the edges of a node; a sum over the columns of an
edge; a comparison that backward needs. From there it goes back through pointwise ops, and ends at its *leaves*: node
rows that are taken, rows of edges that something else makes, numbers and rows that are the same for all edges. What
several regions compute is computed in each: it is cheap where rows are read anyway, and costs no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from actcompile.kernels.edges.program import INNER, Operand, Output, Program, Step

from ..graph import _torch
from ..graph.split import is_tensor
from .computable import POINTWISE, SHAPES, constant_of, is_handled, is_scaled_mask
from .takes import PRODUCTS, SAME, Index, Take, is_at_most_zero, take_of

aten = torch.ops.aten

KEEPING = ("neg", "abs", "relu", "maximum", "minimum", "where")  # of 16-bit numbers they make others

Axes = tuple[str, ...]
"""Which axes of a row each dimension of a value but the first goes along: "h", "c", "hc", an inner one, or none."""


class Unfit(Exception):
    """A region can't be written as a program; the message says why."""


class _Finer(Exception):
    """The columns have to be taken as heads times columns."""

    def __init__(self, heads: int, columns: int) -> None:
        self.sizes = heads, columns


@dataclass
class Loop:
    """A program, and what it works on.

    Attributes:
        end: the node that it computes.
        operands: nodes, in the order of the program's operands.
        inside: nodes of the graph that the program computes, without `end`.
    """

    end: fx.Node
    heads: int
    columns: int
    program: Program
    operands: list[fx.Node]
    inside: list[fx.Node]


@dataclass
class Region(Loop):
    """A program over edges.

    Attributes:
        by: what edges are grouped by.
        indices: the other ends' nodes.
        masks: comparisons among the operands that have to be made in forward, as programs of their own.
    """

    by: Index
    indices: list[Index]
    masks: list[fx.Node]


@dataclass
class Builder:
    """Writes the program of one region.

    Args:
        by: what edges are grouped by; None for rows of something else, on the CPU, of which none are taken.
        nodes: the number of nodes that `by` names.
        taken: whether a node is computed from taken rows, op by op, within regions; or, of rows of edges alone, whether
            it is computed there from narrower ones.
        exact: whether a comparison may not be made here, for what it compares may be rounded: it is an operand.
    """

    by: Index | None
    nodes: object
    heads: int
    columns: int
    taken: Callable[[fx.Node], bool]
    exact: Callable[[fx.Node], bool]
    operands: list[Operand] = field(default_factory=list)
    nodes_read: list[fx.Node] = field(default_factory=list)
    indices: list[Index] = field(default_factory=list)
    rows: list[object] = field(default_factory=list)  # of the matrices that each of `indices` takes rows of
    steps: list[Step] = field(default_factory=list)
    inside: list[fx.Node] = field(default_factory=list)
    masks: list[fx.Node] = field(default_factory=list)
    inner: dict[fx.Node, int] = field(default_factory=dict)  # what is multiplied: the sizes of inner axes, in order
    known: dict[tuple[fx.Node, Axes], str | float] = field(default_factory=dict)
    dtypes: set[torch.dtype] = field(default_factory=set)

    def value(self, node: fx.Node, axes: Axes) -> str | float:
        """The argument that stands for a node of (edges, ...), whose dimensions go along `axes`."""
        key = node, axes
        if key not in self.known:
            self.known[key] = self._value(node, axes)
        return self.known[key]

    def _value(self, node: fx.Node, axes: Axes) -> str | float:
        number = constant_of(node)
        if number is not None:
            return number
        dtype = self._dtype(node)
        take = take_of(node) if self.by is not None else None
        if take is not None:
            self.inside.append(node)
            return self._take(take, axes)
        if dtype is torch.bool and self.exact(node):
            if self.taken(node):
                self.masks.append(node)
            return self._operand("edge", -1, node, axes)
        if not self.taken(node) and not is_scaled_mask(node):
            return self._operand("edge", -1, node, axes)
        if node.target in SHAPES or node.target is aten.expand.default:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            result = self.value(source, self._before(node, source, axes))
        elif node.target in SAME:
            result = self.value(node.args[0], axes)  # type: ignore[arg-type]
        elif node.target in PRODUCTS:
            result = self._product(node, axes)
        else:
            op = POINTWISE[node.target]  # type: ignore[index]
            count = 1 if op in ("float", "neg") else len(node.args)
            arguments = tuple(self._argument(a, node, axes) for a in node.args[:count])
            if not any(isinstance(a, str) for a in arguments):
                raise Unfit("a number computed of numbers")
            level = _join(*(self._level(a) for a in arguments))
            if op == "exp" and is_at_most_zero(node.args[0]):  # also where both were rounded apart, in backward
                self.steps.append(Step("minimum", (*arguments, 0.0), level))
                arguments = (f"v{len(self.steps) - 1}",)
            self.steps.append(Step(op, arguments, level))
            if dtype.itemsize == 2 and op not in KEEPING:  # as torch does: a maximum is compared with its messages
                self.steps.append(Step(str(dtype)[6:], (f"v{len(self.steps) - 1}",), level))
            result = f"v{len(self.steps) - 1}"
        self.inside.append(node)
        return result

    def row(self, node: fx.Node) -> tuple[str, str] | None:
        """The argument that stands for rows of an inner axis, and that axis; None where there is none left."""
        if node not in self.inner:
            if len(self.inner) == len(INNER):
                return None
            self.inner[node] = node.meta["val"].shape[1]
        axis = INNER[list(self.inner).index(node)]
        made = self.value(node, (axis if self.inner[node] != 1 else "",))
        if not isinstance(made, str):
            raise Unfit("a product of the same number for all edges")
        return made, axis

    def _product(self, node: fx.Node, axes: Axes) -> str:
        """Rows times a matrix, perhaps with a bias, which is added before 16-bit numbers are rounded."""
        *bias, rows, weights = node.args
        found = self.row(rows)  # type: ignore[arg-type]
        if found is None:
            return self._operand("edge", -1, node, axes)
        row, axis = found
        matrix = self._operand("matrix", -1, weights, (axis, *axes))  # type: ignore[arg-type]
        level = _join(*axes)
        self.steps.append(Step("product", (row, matrix), level))
        if bias:
            added = self._operand("all", -1, bias[0], axes)  # type: ignore[arg-type]
            self.steps.append(Step("add", (f"v{len(self.steps) - 1}", added), level))
        if node.meta["val"].dtype.itemsize == 2:
            self.steps.append(Step(str(node.meta["val"].dtype)[6:], (f"v{len(self.steps) - 1}",), level))
        return f"v{len(self.steps) - 1}"

    def _argument(self, argument: object, user: fx.Node, axes: Axes) -> str | float:
        """An argument of a pointwise op, broadcast to its user's dimensions."""
        if isinstance(argument, bool | int | float):
            return float(argument)
        if not isinstance(argument, fx.Node) or not is_tensor(argument):
            raise Unfit("an argument that is a symbolic number")
        sizes, whole = argument.meta["val"].shape, user.meta["val"].shape
        trailing = min(len(sizes), len(axes))
        own = tuple(
            "" if _torch.known_true(size == 1) else axis
            for size, axis in zip(sizes[len(sizes) - trailing :], axes[len(axes) - trailing :], strict=True)
        )
        if len(sizes) == len(whole) and not _torch.known_true(sizes[0] == 1):
            return self.value(argument, own)
        number = constant_of(argument)
        if number is not None:
            return number
        return self._operand("all", -1, argument, own)

    def _take(self, take: Take, axes: Axes) -> str:
        rows = take.matrix.meta["val"].shape[0]
        if take.index == self.by and _torch.known_true(rows == self.nodes):
            return self._operand("take", -1, take.matrix, axes)
        known = zip(self.indices, self.rows, strict=True)  # a negative index counts from the end of its matrix
        i = next((i for i, (n, r) in enumerate(known) if n == take.index and _torch.known_true(r == rows)), None)
        if i is None:
            i = len(self.indices)
            self.indices.append(take.index)
            self.rows.append(rows)
        return self._operand("take", i, take.matrix, axes)

    def _operand(self, where: str, index: int, node: fx.Node, axes: Axes) -> str:
        device = torch.device("cpu") if self.by is None else self.by.tensor.meta["val"].device
        if node.meta["val"].device != device:
            raise Unfit("a number on another device")
        level = "".join(axes) if where == "matrix" else _join(*axes)
        operand = Operand(where, index, level, str(self._dtype(node))[6:])
        for i, (known, other) in enumerate(zip(self.operands, self.nodes_read, strict=True)):
            if known == operand and other is node:
                return f"o{i}"
        self.operands.append(operand)
        self.nodes_read.append(node)
        return f"o{len(self.operands) - 1}"

    def _dtype(self, node: fx.Node) -> torch.dtype:
        """The dtype of a node that a program reads or computes.

        A program computes in float32, or all in float64: where both meet, what was rounded between would not be, and a
        maximum would differ from the message that it is.
        """
        dtype = node.meta["val"].dtype
        if not is_handled(node):
            raise Unfit(f"{dtype} is not handled")
        self.dtypes |= {dtype} - {torch.bool}
        if torch.float64 in self.dtypes and len(self.dtypes) > 1:
            raise Unfit("float64 beside other floats")
        return dtype  # type: ignore[no-any-return]

    def _level(self, argument: str | float) -> str:
        if not isinstance(argument, str):
            return ""
        return (self.operands if argument[0] == "o" else self.steps)[int(argument[1:])].level  # type: ignore[attr-defined, no-any-return]

    def _before(self, node: fx.Node, source: fx.Node, axes: Axes) -> Axes:
        """The axes of what a view, or an expanded tensor, is made of."""
        sizes = source.meta["val"].shape
        if not sizes or not _torch.known_true(sizes[0] == node.meta["val"].shape[0]):
            raise Unfit("a view across edges")
        if node.target is aten.expand.default:
            if len(sizes) != len(axes) + 1:
                raise Unfit("an expanded tensor of other dimensions")
            return tuple("" if _torch.known_true(s == 1) else a for s, a in zip(sizes[1:], axes, strict=True))
        extents = {"h": self.heads, "c": self.columns, **dict(zip(INNER, self.inner.values(), strict=False))}
        atoms = [axis for group in axes for axis in group]
        result = []
        for size in sizes[1:]:
            group = ""
            while math.prod(extents[a] for a in group) != size and atoms:
                group += atoms.pop(0)
            if math.prod(extents[a] for a in group) != size:
                if axes == ("c",) and self.heads == 1 and len(sizes) == 3 and isinstance(sizes[1], int):
                    raise _Finer(sizes[1], sizes[2])
                raise Unfit("a view that cuts an axis")
            result.append(group)
        if atoms:
            raise Unfit("a view that cuts an axis")
        return tuple(result)


def region(
    end: fx.Node,
    value: fx.Node,
    kind: str,
    by: Index,
    nodes: object,
    taken: Callable[[fx.Node], bool],
    exact: Callable[[fx.Node], bool],
    other: fx.Node | None = None,
) -> Region:
    """Writes the region that ends with `end`, which is made of the rows of `value`.

    Args:
        kind, other: as in `Output`.
        by, nodes, taken, exact: as in `Builder`.

    Raises:
        Unfit: it can't be written as a program.
    """
    builder, program = _write(
        end, value, kind, other, lambda heads, columns: Builder(by, nodes, heads, columns, taken, exact)
    )
    return Region(
        end, builder.heads, builder.columns, program, builder.nodes_read, builder.inside, by, builder.indices,
        builder.masks,
    )  # fmt: skip


def loop(end: fx.Node, taken: Callable[[fx.Node], bool]) -> Loop:
    """Writes the loop over rows that computes `end` on the CPU, of nothing that is read by an index.

    Args:
        taken: whether a node is computed inside.

    Raises:
        Unfit: it can't be written as a program.
    """
    builder, program = _write(
        end, end, "edge", None, lambda heads, columns: Builder(None, None, heads, columns, taken, lambda _: False)
    )
    return Loop(end, builder.heads, builder.columns, program, builder.nodes_read, builder.inside)


def _write(
    end: fx.Node, value: fx.Node, kind: str, other: fx.Node | None, begin: Callable[[int, int], Builder]
) -> tuple[Builder, Program]:
    """Writes the program that ends with `end`, by what begins one with heads and columns."""
    sizes = value.meta["val"].shape[1:]
    if not is_handled(end):
        raise Unfit(f"{end.meta['val'].dtype} is not handled")
    if not all(isinstance(size, int) for size in sizes):
        raise Unfit("the number of columns is symbolic")
    if 0 in sizes:
        raise Unfit("rows of no columns")
    if kind == "dot" and sizes[-1] == 1:
        raise Unfit("a sum over one column")
    wide = [size for size in sizes if size != 1]
    if len(wide) > 2:
        raise Unfit("rows of three dimensions")
    heads, columns = (1, *wide)[-2:] if wide else (1, 1)
    names = iter(("h", "c") if len(wide) == 2 else ("c",))
    axes = tuple(next(names) if size != 1 else "" for size in sizes)
    try:
        return _written(end, value, axes, kind, other, begin(heads, columns))
    except _Finer as finer:
        if kind == "dot":
            raise Unfit("a sum over heads and columns") from None
        axes = tuple("hc" if axis else "" for axis in axes)
        return _written(end, value, axes, kind, other, begin(*finer.sizes))


def _written(
    end: fx.Node, value: fx.Node, axes: Axes, kind: str, other: fx.Node | None, builder: Builder
) -> tuple[Builder, Program]:
    made = builder.value(value, axes)
    if not isinstance(made, str):
        raise Unfit("the same number for all edges")
    level = _join(*axes)
    if builder.heads > 1 and "h" not in level:
        raise Unfit("rows without heads in a region with heads")
    left = builder.row(other) if other is not None else None
    if other is not None and left is None:
        raise Unfit("too many products")
    level = level.replace("c", "") if kind == "dot" else level
    output = Output(kind, made, level, str(end.meta["val"].dtype)[6:], *(left or ()))
    return builder, Program(tuple(builder.operands), tuple(builder.steps), (output,), tuple(builder.inner.values()))


def _join(*levels: str) -> str:
    """The axes that any of some levels has."""
    return "".join(axis for axis in "hc" + INNER if any(axis in level for level in levels))
