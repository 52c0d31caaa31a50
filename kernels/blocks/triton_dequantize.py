"""`dequantize` as Triton kernels, bit for bit what `dequantize_reference` gives: two launches, as of `quantize`."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .format import BlockFormat
from .levels import decode_map
from .triton_numbers import (
    EXACT,
    INFINITY,
    LARGEST,
    LARGEST_BFLOAT16,
    LARGEST_FLOAT16,
    WIDE,
    bend,
    careful_mask,
    half_range,
    in_row,
    restore,
)
from .triton_tile import (
    LOAD,
    NONE,
    Tile,
    Units,
    constants,
    elements_left,
    on_device,
    plane_mask,
    rows,
    tile_for,
)


@triton.jit
def dequantize_careful(
    words, low, high, x, shift, scale, tile, start, groups, numel,
    BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
    COLUMNS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Decodes a tile whatever is in it."""
    BLOCKS: tl.constexpr = GROUP // BLOCK
    PER_BLOCK: tl.constexpr = 32 // BITS // BLOCKS
    TOP: tl.constexpr = (1 << BITS) - 1
    BETWEEN: tl.constexpr = TOP - 2 if BITS > 1 else TOP
    ENOUGH: tl.constexpr = LARGEST_FLOAT16 if x.dtype.element_ty == tl.float16 else INFINITY
    NARROW: tl.constexpr = LARGEST_FLOAT16 if x.dtype.element_ty == tl.float16 else LARGEST
    STORED: tl.constexpr = LARGEST_BFLOAT16 if x.dtype.element_ty == tl.bfloat16 else NARROW
    MOST: tl.constexpr = STORED if COLUMNS == 0 else LARGEST
    row, exists = rows(tile, groups, GROUPS)
    row = row.to(tl.int64)
    j = tl.arange(0, W).to(tl.int64) + start
    left = tl.minimum(numel - tile * GROUP, GROUPS * GROUP)
    at = tile * WORDS + (row[:, None] * WORDS + j[None, :])
    word = tl.load(words + at, mask=(j < WORDS)[None, :], other=0).to(tl.uint32, bitcast=True)
    for b in range(BLOCKS):
        meta = tile * BLOCKS + (row * BLOCKS + b)
        first, second = tl.load(low + meta).to(tl.float32), tl.load(high + meta).to(tl.float32)
        if BITS > 1:
            marked = first > second
            lowest, highest = tl.where(marked, second, first), tl.where(marked, first, second)
            below, above = tl.where(marked, -INFINITY, first), tl.where(marked, INFINITY, second)
        else:
            marked = (tl.abs(first) == INFINITY) | (tl.abs(second) == INFINITY)
            lowest, highest, below, above = first, second, first, second
        _, half = half_range(lowest, highest)
        wide = half > WIDE
        shrink, grow = tl.where(wide, 0.25, 1.0), tl.where(wide, 4.0, 1.0)
        step, minimum = half * shrink * tl.where(marked, 2.0 / BETWEEN, 2.0 / TOP), lowest * shrink
        for k in range(b * PER_BLOCK, (b + 1) * PER_BLOCK):
            code = ((word >> (BITS * k)) & TOP).to(tl.int32)
            level = bend(code.to(tl.float32), SLOPE, TERMS)
            if BITS > 1:
                level = tl.where(marked[:, None], code.to(tl.float32) - 1.0, level)
            value = (level * step[:, None] + minimum[:, None]) * grow[:, None]
            value = tl.where(value < -MOST, -MOST, tl.where(value > MOST, MOST, value))
            end = tl.where(code == 0, below[:, None], above[:, None])
            value = tl.where(marked[:, None] & ((code == 0) | (code == TOP)), end, value)
            mask = exists[:, None] & careful_mask(row, j, left, k, GROUP, WORDS)
            place = tile * GROUP + (row[:, None] * GROUP + k * WORDS + j[None, :])
            value = restore(value, shift, scale, place, ENOUGH, COLUMNS, SHIFTED)
            tl.store(x + place, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_tile(
    words, low, high, x, shift, scale, tile, start, groups, numel,
    PARTIAL: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
    COLUMNS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = GROUP // BLOCK
    PER_BLOCK: tl.constexpr = 32 // BITS // BLOCKS
    TOP: tl.constexpr = (1 << BITS) - 1
    ENOUGH: tl.constexpr = LARGEST_FLOAT16 if x.dtype.element_ty == tl.float16 else INFINITY
    row, exists = rows(tile, groups, GROUPS)
    j = tl.arange(0, W)
    if W < WORDS:
        j = j + start
    left = elements_left(numel, tile, GROUP, GROUPS, W < WORDS)
    elements = x + tile * GROUP + (row[:, None] * GROUP + j[None, :])
    place = in_row(tile * GROUP, COLUMNS) + row[:, None] * GROUP + j[None, :]
    packed = words + tile * WORDS + (row[:, None] * WORDS + j[None, :])
    if WORDS % W == 0:
        word = tl.load(packed).to(tl.uint32, bitcast=True)
    else:
        word = tl.load(packed, mask=(j < WORDS)[None, :], other=0).to(tl.uint32, bitcast=True)
    for b in tl.static_range(BLOCKS):
        meta = tile * BLOCKS + (row * BLOCKS + b)
        lowest, highest = tl.load(low + meta).to(tl.float32), tl.load(high + meta).to(tl.float32)
        _, half = half_range(lowest, highest)
        step = half * (2.0 / TOP)
        for k in tl.static_range(b * PER_BLOCK, (b + 1) * PER_BLOCK):
            code = ((word >> (BITS * k)) & TOP).to(tl.int32).to(tl.float32)
            value = bend(code, SLOPE, TERMS) * step[:, None] + lowest[:, None]
            value = restore(value, shift, scale, place + k * WORDS, ENOUGH, COLUMNS, SHIFTED)
            mask = exists[:, None] & plane_mask(row, j, left, k, PARTIAL, GROUP, WORDS)
            tl.store(elements + k * WORDS, value.to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first", "groups", "numel"])
def dequantize_kernel(
    words, low, high, x, shift, scale, first: tl.int64, groups: tl.int64, numel: tl.int64,
    PARTIAL: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
    COLUMNS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Decodes `GROUPS` groups by `W` words a program, from group `first` on."""
    tile = first + tl.program_id(0).to(tl.int64) * GROUPS
    start = tl.program_id(1).to(tl.int64) * W
    if PARTIAL:
        if (tile + GROUPS) * GROUP <= numel:
            dequantize_tile(words, low, high, x, shift, scale, tile, start, groups, numel,
                            False, BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W, COLUMNS, SHIFTED)  # fmt: skip
        else:
            dequantize_tile(words, low, high, x, shift, scale, tile, start, groups, numel,
                            True, BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W, COLUMNS, SHIFTED)  # fmt: skip
    else:
        dequantize_tile(words, low, high, x, shift, scale, tile, start, groups, numel,
                        False, BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W, COLUMNS, SHIFTED)  # fmt: skip


@triton.jit(do_not_specialize=["first", "groups", "numel"])
def dequantize_again_kernel(
    words, low, high, x, shift, scale, first: tl.int64, groups: tl.int64, numel: tl.int64,
    BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
    COLUMNS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Decodes the tiles again that have a block which is marked, or not of numbers far from overflow."""
    tile = first + tl.program_id(0).to(tl.int64) * GROUPS
    start = tl.program_id(1).to(tl.int64) * W
    BLOCKS: tl.constexpr = GROUP // BLOCK
    CALM: tl.constexpr = LARGEST_FLOAT16 if x.dtype.element_ty == tl.float16 and COLUMNS == 0 else WIDE
    row, exists = rows(tile, groups, GROUPS)
    calm = row >= 0
    for b in range(BLOCKS):
        meta = tile * BLOCKS + (row * BLOCKS + b)
        lowest = tl.load(low + meta, mask=exists, other=0).to(tl.float32)
        highest = tl.load(high + meta, mask=exists, other=0).to(tl.float32)
        calm = calm & (lowest <= highest) & (lowest >= -CALM) & (highest <= CALM)
    if tl.min(calm.to(tl.int32), 0) == 0:
        dequantize_careful(words, low, high, x, shift, scale, tile, start, groups, numel,
                           BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W, COLUMNS, SHIFTED)  # fmt: skip


def decode_tile(fmt: BlockFormat, itemsize: int) -> Tile:
    """The tile of `dequantize_kernel`: stores of 16 bytes."""
    return tile_for(fmt.words, LOAD // itemsize)


@lru_cache(maxsize=1024)
def decode_constants(fmt: BlockFormat, partial: bool, tile: Tile, units: Units = NONE) -> dict[str, Any]:
    """The compile-time arguments of `dequantize_kernel`."""
    return constants(fmt, decode_map(fmt), tile, units) | {"PARTIAL": partial}


@lru_cache(maxsize=1024)
def again_constants(fmt: BlockFormat, tile: Tile, units: Units = NONE) -> dict[str, Any]:
    """The compile-time arguments of `dequantize_again_kernel`, which is masked throughout."""
    return constants(fmt, decode_map(fmt), tile, units)


def dequantize_into(
    words: Tensor, low: Tensor, high: Tensor, x: Tensor, fmt: BlockFormat, first: int = 0, tile: Tile | None = None,
    shift: Tensor | None = None, scale: Tensor | None = None, columns: int = 0,
) -> None:  # fmt: skip
    """Decodes `words` (int32), `low` and `high` from group `first` on into the flat, contiguous `x`; with `scale`, what
    was standardised by columns, of which there are so many."""
    tile = tile or decode_tile(fmt, x.element_size())
    numel = x.numel()
    groups = fmt.groups(numel)
    programs = tile.programs(groups - first)
    if programs == 0:
        return
    units = Units.of(shift, scale, columns)
    grid = (programs, -(-fmt.words // tile.width))
    by = low if scale is None else scale.contiguous()
    to = by if shift is None else shift.contiguous()
    arguments = (words, low, high, x, to, by, first, groups, numel)
    chosen = decode_constants(fmt, numel % fmt.group != 0, tile, units)
    with on_device(x):
        dequantize_kernel[grid](*arguments, **chosen, num_warps=tile.warps, **EXACT)
        dequantize_again_kernel[grid](*arguments, **again_constants(fmt, tile, units), num_warps=tile.warps, **EXACT)


def dequantize_triton(
    words: Tensor,
    low: Tensor,
    high: Tensor,
    size: Sequence[int],
    dtype: torch.dtype,
    fmt: BlockFormat,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """`dequantize` as two launches; shapes and errors as there."""
    x = torch.empty(list(size), dtype=dtype, device=words.device)
    packed = words.contiguous().view(torch.int32)
    columns = size[-1] if len(size) else 1
    dequantize_into(
        packed, low.contiguous(), high.contiguous(), x.view(-1), fmt, shift=shift, scale=scale, columns=columns
    )
    return x
