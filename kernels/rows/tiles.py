"""`row_sums`: sums over rows of what is computed from rows, tile by tile: what is summed never exists as a whole.

A weight's gradient is such a sum, `x^T g`, and so is a bias's. Where `x` has to be made first, decoded, normalised and
masked, it is as large as all nodes' features, and dead a moment later. A tile of it stays in the cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor

from ..blocks.format import BlockFormat
from ..cpu import decoder, unpack_bits_on_cpu
from ..edges.ops import prepare_edges
from ..op import op
from .loops import loop
from .threads import in_threads

Arg = Any
"""A constant; or a dict: {"operand": i}, {"step": i}, {"rows": null}, the rows of a tile, or {"dtype": name}."""


DECODE = "actcompile.dequantize.default"
LOOP = "loop"  # a step that is many pointwise ops: its arguments are those of `loop`


@dataclass(frozen=True)
class Step:
    """One op on a tile: its name in torch.ops, or `LOOP`, and its arguments."""

    op: str
    args: list[Arg]
    kwargs: dict[str, Arg]


@dataclass(frozen=True)
class Sum:
    """One result: `left^T right`, or the sum of `left` over rows where there is no `right`."""

    left: Arg
    right: Arg | None
    size: list[int]
    dtype: str


@dataclass(frozen=True)
class Tiled:
    """What is done for each tile.

    rows: of a tile; the last one has fewer.
    operands: for each, how a tile of it is taken: None, it is read as a whole; (1, 1), its rows are those of the tile;
        (columns, group), it holds `group` elements in a row, of a tensor with so many columns.
    """

    rows: int
    operands: list[tuple[int, int] | None]
    steps: list[Step]
    sums: list[Sum]

    def dump(self) -> str:
        return json.dumps(self, default=vars)


@lru_cache
def parse(text: str) -> Tiled:
    """The inverse of `Tiled.dump`."""
    made = json.loads(text)
    steps, sums = [Step(**s) for s in made["steps"]], [Sum(**s) for s in made["sums"]]
    return Tiled(made["rows"], [o and tuple(o) for o in made["operands"]], steps, sums)


def prepare_loops(program: str) -> None:
    """Begins to compile what a program's loops need."""
    for step in parse(program).steps:
        if step.op == LOOP:
            text, heads, columns, *_ = step.args
            prepare_edges(text, torch.device("cpu"), heads, columns)


def _call(step: Step, operands: Sequence[Tensor]) -> tuple[Callable[..., Any], list[Arg], dict[str, Arg]]:
    """What a step calls for each tile, and with what.

    Our own ops by themselves: their way through torch's dispatcher takes as long as a tile.
    """
    if step.op == DECODE:
        words, low, high, size, *fixed = step.args
        dtype, bits, block, levels, *units = (_value(a, operands, (), 0) for a in fixed)
        metadata, width = (operands[part["operand"]] for part in (low, words))
        fmt = BlockFormat(bits, block, levels, metadata.dtype, width.shape[1])
        return decoder(fmt, dtype, *(units or (None, None))), [words, low, high, size], {}
    return _OWN.get(step.op) or _op(step.op), step.args, step.kwargs


@lru_cache
def _op(name: str) -> Any:
    return reduce(getattr, name.split("."), torch.ops)


@op("row_sums")
def row_sums(program: str, rows: int, operands: Sequence[Tensor]) -> list[Tensor]:
    """Runs a program over tiles of rows.

    Args:
        program: as `Tiled.dump` writes it.
        rows: how many there are.
        operands: what the program reads.

    Returns:
        the program's sums. They are added up in float32 at least.
    """
    tiled = parse(program)
    parts = in_threads(rows, tiled.rows, lambda tiles: _run(tiled, rows, operands, tiles))
    return [sum(p).to(getattr(torch, s.dtype)) for s, *p in zip(tiled.sums, *parts, strict=True)]


def _run(tiled: Tiled, rows: int, operands: Sequence[Tensor], tiles: range) -> list[Tensor]:
    """The sums over some tiles, which start at these rows."""
    sums = [torch.zeros(s.size, dtype=_wide(getattr(torch, s.dtype))) for s in tiled.sums]
    calls = [_call(step, operands) for step in tiled.steps]
    made: list[Any] = [None] * len(tiled.steps)  # of the last tile, too: what is freed is not given back at once
    for first in tiles:
        number = min(tiled.rows, rows - first)
        taken = zip(operands, tiled.operands, strict=True)
        parts = [operand if how is None else _tile(operand, first, number, *how) for operand, how in taken]
        for i, (call, args, kwargs) in enumerate(calls):
            args, kwargs = (_value(a, parts, made, number) for a in (args, kwargs))
            made[i] = call(*args, **kwargs)
        for result, total in zip(tiled.sums, sums, strict=True):
            _add(total, *(_value(a, parts, made, number) for a in (result.left, result.right)))
    return sums


@row_sums.register_fake
def _(program, rows, operands):
    return [operands[0].new_empty(s.size, dtype=getattr(torch, s.dtype)) for s in parse(program).sums]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _tile(operand: Tensor, first: int, rows: int, columns: int, group: int) -> Tensor:
    return operand[first * columns // group : -(-(first + rows) * columns // group)]


def _value(arg: Arg, operands: Sequence[Tensor], made: Sequence[Any], rows: int) -> Any:
    match arg:
        case {"operand": i}:
            return operands[i]
        case {"step": i}:
            return made[i]
        case {"rows": None}:
            return rows
        case {"dtype": name}:
            return getattr(torch, name)
        case dict():
            return {k: _value(v, operands, made, rows) for k, v in arg.items()}
        case list():
            return [_value(a, operands, made, rows) for a in arg]
    return arg


def _add(total: Tensor, left: Tensor, right: Tensor | None) -> None:
    if right is None:
        total += left.sum(0, dtype=total.dtype).view(total.shape)
    elif total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right


_OWN: dict[str, Callable[..., Any]] = {
    LOOP: loop,
    "actcompile.unpack_bits.default": unpack_bits_on_cpu,
    "actcompile.bytes_to_mask.default": lambda byte: byte.view(torch.bool),
}
