"""What is computed for every edge of a graph, and how it is summed up: a region of message passing as data.

A *program* goes over the edges, grouped by one of their nodes. For each edge it reads rows: of a node at either end, of
the edge, or the same row for all; computes on their elements; and adds the result to its node's row, takes the largest
or the smallest, or writes it down for the edge. Nothing exists for more than one edge at a time.

A row has up to two axes, heads `h` and columns `c`. Every operand and value has some of them, its *level*: `"hc"`,
`"h"`, `"c"` or `""`, and is the same along the others. Their sizes are no part of a program: one program serves all
widths. What is multiplied with a matrix is a row of one *inner* axis, `x`, `y`, ..., whose size the program has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = {"sum": 0.0, "max": -math.inf, "min": math.inf}  # -> what they begin with
INNER = "xyzuvw"  # the inner axes that a program can have


@dataclass(frozen=True)
class Operand:
    """A tensor that is read by rows.

    where: "take", the row of the node that index `index` names; "edge", the row of the edge; "all", the only row;
        "matrix", a matrix to multiply with, of (inner axis, row), whose level begins with the inner axis. An index of
        -1 is the one that edges are grouped by.
    dtype: a name of torch's; or "bits", for rows of edges as uint8, eight elements in each, the first in the lowest.
    """

    where: str
    index: int
    level: str
    dtype: str


@dataclass(frozen=True)
class Step:
    """One operation on numbers. Arguments are numbers, `"o0"` for an operand, or `"v0"` for an earlier step's value.

    "product" multiplies a row of an inner axis with a matrix, which is an operand.
    """

    op: str
    arguments: tuple[str | float, ...]
    level: str


@dataclass(frozen=True)
class Output:
    """What is made of a value.

    kind: one of `REDUCTIONS`, over a node's edges; "edge", written down for each edge; "dot", its sum over columns,
        written down for each edge; "total", its sum over all edges; "outer", the sum over all edges of `other`, a row
        of the inner axis `axis`, times `value`.
    dtype: as of an operand; "bits" for comparisons that are written down.
    """

    kind: str
    value: str
    level: str
    dtype: str
    other: str = ""
    axis: str = ""


@dataclass(frozen=True)
class Program:
    operands: tuple[Operand, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]
    inner: tuple[int, ...] = ()  # the sizes of the axes of `INNER`, in their order

    def dump(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @property
    def is_double(self) -> bool:
        """Whether it is computed in float64, as it is where an operand or a result is of that; else in float32."""
        ends: tuple[Operand | Output, ...] = (*self.operands, *self.outputs)
        return any(part.dtype == "float64" for part in ends)

    def level_of(self, argument: str | float) -> str:
        """The axes of an argument of a step, or of an output's value."""
        if not isinstance(argument, str):
            return ""
        return (self.operands if argument[0] == "o" else self.steps)[int(argument[1:])].level  # type: ignore[attr-defined, no-any-return]


@lru_cache(maxsize=1024)
def parse(text: str) -> Program:
    """The program that `Program.dump` wrote down."""
    data = json.loads(text)
    return Program(
        tuple(Operand(**o) for o in data["operands"]),
        tuple(Step(s["op"], tuple(s["arguments"]), s["level"]) for s in data["steps"]),
        tuple(Output(**o) for o in data["outputs"]),
        tuple(data["inner"]),
    )


def width(level: str, heads: int, columns: int, inner: Sequence[int] = ()) -> int:
    """The number of elements in a row; of a matrix, in all of it."""
    sizes = {"h": heads, "c": columns, **dict(zip(INNER, inner, strict=False))}
    return math.prod(sizes[axis] for axis in level)


def row_size(part: Operand | Output, heads: int, columns: int, inner: Sequence[int] = ()) -> int:
    """The number of elements of its tensor in which a row is kept."""
    size = width(part.level, heads, columns, inner)
    return -(-size // 8) if part.dtype == "bits" else size


def rows_of(program: Program, output: Output, nodes: Any, edges: Any) -> Any:
    """The number of rows of a result."""
    if output.kind == "outer":
        return width(output.axis, 1, 1, program.inner)
    if output.kind == "total":
        return 1
    return nodes if output.kind in REDUCTIONS else edges


def dtype_of(part: Operand | Output) -> torch.dtype:
    """The dtype of its tensor."""
    return torch.uint8 if part.dtype == "bits" else getattr(torch, part.dtype)  # type: ignore[no-any-return]


OPS = {  # name -> C++, with T the type that is computed in; the same in torch; the same in Triton
    "add": ("({0} + {1})", torch.add, "({0} + {1})"),
    "sub": ("({0} - {1})", torch.sub, "({0} - {1})"),
    "mul": ("({0} * {1})", torch.mul, "({0} * {1})"),
    "div": ("({0} / {1})", torch.div, "quotient({0}, {1})"),
    "neg": ("(-{0})", torch.neg, "(-{0})"),
    "abs": ("std::abs({0})", torch.abs, "tl.abs({0})"),
    "exp": ("exp_({0})", torch.exp, "libdevice.exp({0})"),
    "log": ("std::log({0})", torch.log, "libdevice.log({0})"),
    "log1p": ("std::log1p({0})", torch.log1p, "libdevice.log1p({0})"),
    "expm1": ("std::expm1({0})", torch.expm1, "libdevice.expm1({0})"),
    "sqrt": ("std::sqrt({0})", torch.sqrt, "root({0})"),
    "rsqrt": ("(T(1) / std::sqrt({0}))", torch.rsqrt, "quotient(1.0, root({0}))"),
    "reciprocal": ("(T(1) / {0})", torch.reciprocal, "quotient(1.0, {0})"),
    "sin": ("std::sin({0})", torch.sin, "libdevice.sin({0})"),
    "cos": ("std::cos({0})", torch.cos, "libdevice.cos({0})"),
    "erf": ("std::erf({0})", torch.erf, "libdevice.erf({0})"),
    "pow": ("std::pow(T({0}), T({1}))", torch.pow, "libdevice.pow({0}, {1})"),
    "sigmoid": ("(T(1) / (T(1) + exp_(-{0})))", torch.sigmoid, "quotient(1.0, 1.0 + libdevice.exp(-{0}))"),
    "tanh": ("tanh_({0})", torch.tanh, "libdevice.tanh({0})"),
    "relu": ("({0} < T(0) ? T(0) : {0})", torch.relu, "tl.where({0} < 0.0, 0.0, {0})"),
    "maximum": ("larger({0}, {1})", torch.maximum, "greatest({0}, {1})"),
    "minimum": ("smaller({0}, {1})", torch.minimum, "least({0}, {1})"),
    "where": ("({0} ? {1} : {2})", torch.where, "tl.where({0}, {1}, {2})"),
    "gt": ("({0} > {1})", torch.gt, "({0} > {1})"),
    "ge": ("({0} >= {1})", torch.ge, "({0} >= {1})"),
    "lt": ("({0} < {1})", torch.lt, "({0} < {1})"),
    "le": ("({0} <= {1})", torch.le, "({0} <= {1})"),
    "eq": ("({0} == {1})", torch.eq, "({0} == {1})"),
    "ne": ("({0} != {1})", torch.ne, "({0} != {1})"),
    "and": ("({0} && {1})", torch.logical_and, "({0} & {1})"),
    "or": ("({0} || {1})", torch.logical_or, "({0} | {1})"),
    "not": ("(!{0})", torch.logical_not, "({0} == 0)"),
    "bfloat16": ("rounded({0})", lambda x: x.bfloat16().to(x.dtype), "rounded({0}, tl.bfloat16)"),
    "float16": ("", lambda x: x.half().to(x.dtype), "rounded({0}, tl.float16)"),  # on CUDA only
    "float": ("T({0})", torch.Tensor.to, "{0}"),  # the dtype that is computed in
}
COMPARING = frozenset(("gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not"))


def shape(level: str, heads: int, columns: int, inner: Sequence[int] = ()) -> tuple[int, int]:
    """A row's shape, for broadcasting; an inner axis takes the place of the columns."""
    return heads if "h" in level else 1, width(level.replace("h", ""), 1, columns, inner)


def run_reference(
    program: Program,
    operands: Sequence[Tensor],
    by: Tensor,
    indices: Sequence[Tensor],
    nodes: int,
    heads: int,
    columns: int,
) -> list[Tensor]:
    """What a program does, by plain torch ops, with tensors of [edges, heads, columns]. Runs on any device.

    Args:
        operands: contiguous; rows are those of `Operand`.
        by, indices: int64 or int32, (edges,); what is negative counts from the end.

    Returns:
        (nodes, width), (edges, width), (1, width), or (inner axis, width) for each output.
    """
    edges = by.shape[0]
    by = torch.where(by < 0, by + nodes, by)  # torch takes rows from the end, and adds up none there
    inner = program.inner
    real = torch.float64 if program.is_double else torch.float32  # what is computed in
    values: dict[str, Tensor] = {}
    for i, (operand, tensor) in enumerate(zip(program.operands, operands, strict=True)):
        if operand.dtype == "bits":
            tensor = _unpacked(tensor, width(operand.level, heads, columns, inner))
        if operand.where == "matrix":
            values[f"o{i}"] = tensor.to(real)
            continue
        count = 1 if operand.where == "all" else tensor.shape[0]
        rows = tensor.reshape(count, *shape(operand.level, heads, columns, inner))
        if operand.where == "take":
            rows = rows[by if operand.index < 0 else indices[operand.index]]
        values[f"o{i}"] = rows if rows.dtype == torch.bool else rows.to(real)
    for i, step in enumerate(program.steps):
        arguments = [values[a] if isinstance(a, str) else a for a in step.arguments]
        if step.op == "product":
            row, matrix = arguments
            product = row.expand(edges, 1, len(matrix)).flatten(1) @ matrix  # type: ignore[union-attr, arg-type]
            values[f"v{i}"] = product.view(edges, *shape(step.level, heads, columns, inner))
            continue
        if step.op in ("maximum", "minimum", "where"):
            number = torch.zeros(1, 1, 1, dtype=real, device=by.device)
            arguments = [a if isinstance(a, Tensor) else number + a for a in arguments]
        elif not isinstance(arguments[0], Tensor):  # torch.sub(1, x) has no such form
            arguments[0] = torch.tensor(arguments[0], dtype=real, device=by.device)
        dtype = (real,) if step.op == "float" else ()
        values[f"v{i}"] = OPS[step.op][1](*arguments, *dtype)  # type: ignore[operator]
    results = []
    for output in program.outputs:
        value = values[output.value]
        level = output.level + "c" if output.kind == "dot" else output.level
        value = value.expand(edges, *shape(level, heads, columns, inner))
        if output.kind == "outer":
            size = width(output.axis, heads, columns, inner)
            value = values[output.other].expand(edges, 1, size).flatten(1).T @ value.flatten(1)
        elif output.kind == "dot":
            value = value.sum(2, keepdim=True)
        elif output.kind == "total":
            value = value.sum(0, keepdim=True)
        elif output.kind in REDUCTIONS:
            value = value.to(real) if value.dtype == torch.bool else value
            start = value.new_zeros(nodes, *value.shape[1:])
            if output.kind == "sum":
                value = start.index_add(0, by.long(), value)
            else:
                index = by.long().view(-1, 1, 1).expand_as(value)
                value = start.scatter_reduce(0, index, value, f"a{output.kind}", include_self=False)
        value = value.reshape(value.shape[0], width(output.level, heads, columns, inner))
        results.append(packed(value) if output.dtype == "bits" else value.to(dtype_of(output)))
    return results


def packed(mask: Tensor) -> Tensor:
    """Rows of bools as bytes, eight in each."""
    rows = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).view(
        mask.shape[0], -(-mask.shape[1] // 8), 8
    )
    return (rows << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(2, dtype=torch.uint8)


def _unpacked(packed: Tensor, size: int) -> Tensor:
    """The inverse of `packed`, for rows of `size` bools."""
    bits = packed.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(1)[:, :size].bool()
