"""`quantize` as Triton kernels, bit for bit what `quantize_reference` gives.

Bit-equality rests on the same order of operations in float32: products and sums are never contracted
(`enable_fp_fusion=False`), `scalar / tensor` is the product with the reciprocal, as it is in torch, and minimum,
maximum and the lower bound on the range let NaN pass.

Tiles are worked on as if all their blocks were calm: finite, and not of the largest numbers. A second launch looks at
the blocks' ends alone, and does the tiles again where one is not: a kernel of its own, so that what is rare takes no
registers from what is not.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import random_bits
from .format import BlockFormat
from .levels import encode_map
from .triton_numbers import (
    EXACT,
    INFINITY,
    LARGEST,
    LARGEST_BFLOAT16,
    TINY,
    bend,
    careful_mask,
    greatest,
    half_range,
    in_row,
    least,
    standardise,
)
from .triton_tile import (
    LOAD,
    NONE,
    THREADS,
    Tile,
    Units,
    constants,
    elements_left,
    on_device,
    plane_mask,
    rows,
    tile_for,
)

MIX_1 = tl.constexpr(random_bits.MIX_1)
MIX_2 = tl.constexpr(random_bits.MIX_2)
LCG_MULTIPLIER = tl.constexpr(random_bits.LCG_MULTIPLIER)
LCG_INCREMENT = tl.constexpr(random_bits.LCG_INCREMENT)
KEPT = 64  # elements of a block that a thread keeps in registers
MOST, MOST_STANDARDISED = 128, 64  # elements of a group that a thread works on


@triton.jit
def truncate(x, away):
    """`quantize._truncate`."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(away & (tl.abs(x) < INFINITY), bits + 0xFFFF, bits)
    return tl.where(x != x, x, (bits & -65536).to(tl.float32, bitcast=True))


@triton.jit
def keep_range(low, high, low_out, high_out, stored, TOP: tl.constexpr):
    """Stores a block's range, rounded outward, which makes an infinity of what the dtype can't hold; returns half_low
    and inverse."""
    if low_out.dtype.element_ty == tl.bfloat16:
        low = truncate(low, low < 0)
        high = truncate(high, high > 0)
    tl.store(low_out, low.to(low_out.dtype.element_ty), mask=stored)
    tl.store(high_out, high.to(high_out.dtype.element_ty), mask=stored)
    half_low, half = half_range(low, high)
    return half_low, tl.div_rn(1.0, half) * (TOP * 256.0)


@triton.jit
def first_random(index, seed, salt):
    """The first of `random_bits.random_words`; `index` is uint32."""
    h = index + tl.load(seed + 2 * salt).to(tl.uint32, bitcast=True)
    h = (h ^ (h >> 16)) * MIX_1
    h = h ^ tl.load(seed + 2 * salt + 1).to(tl.uint32, bitcast=True)
    h = (h ^ (h >> 13)) * MIX_2
    return h ^ (h >> 16)


@triton.jit
def next_random(h):
    """The next of `random_bits.random_words`."""
    h = h * LCG_MULTIPLIER + LCG_INCREMENT
    return h ^ (h >> 16)


@triton.jit
def field(x, half_low, inverse, random, k: tl.constexpr, BITS: tl.constexpr, SLOPE: tl.constexpr, TERMS: tl.constexpr):
    """The codes of plane `k`, each in its place in its word; `random` holds the bytes of planes `k // 4 * 4 + 0..3`."""
    TOP: tl.constexpr = (1 << BITS) - 1
    SHIFT: tl.constexpr = BITS * k
    position = bend((x * 0.5 - half_low) * inverse, SLOPE, TERMS)
    fixed = (position + 0.5).to(tl.int32).to(tl.uint32, bitcast=True) + ((random >> (8 * (k % 4))) & 0xFF)
    # The code is `fixed >> 8`, at most TOP: one shift and one mask put it into place and drop the fraction.
    moved = fixed << (SHIFT - 8) if SHIFT >= 8 else fixed >> (8 - SHIFT)
    return moved & (TOP << SHIFT)


@triton.jit
def load_plane(x, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(x, mask=mask, other=0).to(tl.float32)
    else:
        return tl.load(x).to(tl.float32)


@triton.jit
def widen(low, high, UNIT: tl.constexpr, LIMIT: tl.constexpr):
    """`quantize.widen`."""
    bits = low.to(tl.int32, bitcast=True)
    above = tl.where(low < TINY, TINY, (bits + UNIT).to(tl.float32, bitcast=True))
    below = (bits - UNIT).to(tl.float32, bitcast=True)
    empty = (low < high) == 0
    topmost = low >= LIMIT
    return tl.where(empty & topmost, below, low), tl.where(empty & (topmost == 0), above, high)


@triton.jit
def nearest_bfloat16(x):
    """Rounded to nearest even, which the interpreter's own cast does not do."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def quantize_careful(
    x, seed, salt, words, low, high, shift, scale, tile, groups, numel,
    BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
    COLUMNS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Encodes a tile whatever is in it, block by block, `W` words of each group at a time; in loops: it is rare."""
    BLOCKS: tl.constexpr = GROUP // BLOCK
    PER_BLOCK: tl.constexpr = 32 // BITS // BLOCKS
    TOP: tl.constexpr = (1 << BITS) - 1
    HALVED: tl.constexpr = low.dtype.element_ty == tl.bfloat16
    LIMIT: tl.constexpr = LARGEST_BFLOAT16 if HALVED else LARGEST
    row, exists = rows(tile, groups, GROUPS)
    left = tl.minimum(numel - tile * GROUP, GROUPS * GROUP)
    row = row.to(tl.int64)
    for b in range(BLOCKS):
        lowest = tl.full((GROUPS, W), INFINITY, tl.float32)
        highest = tl.full((GROUPS, W), -INFINITY, tl.float32)
        nans, positive, negative = tl.zeros_like(lowest), tl.zeros_like(lowest), tl.zeros_like(lowest)
        j = tl.arange(0, W).to(tl.int64)
        for _ in range(tl.cdiv(WORDS, W)):
            for k in range(b * PER_BLOCK, (b + 1) * PER_BLOCK):
                used = careful_mask(row, j, left, k, GROUP, WORDS)
                place = tile * GROUP + (row[:, None] * GROUP + k * WORDS + j[None, :])
                plane = tl.load(x + place, mask=used, other=0).to(tl.float32)
                plane = tl.where(used, standardise(plane, shift, scale, place, COLUMNS, SHIFTED), 0.0)
                finite = tl.abs(plane) < INFINITY
                bounded = tl.minimum(tl.maximum(plane, -LIMIT), LIMIT)
                lowest = tl.minimum(lowest, tl.where(used & finite, bounded, INFINITY))
                highest = tl.maximum(highest, tl.where(used & finite, bounded, -INFINITY))
                nans = tl.where(plane != plane, 1.0, nans)
                positive = tl.where(plane == INFINITY, 1.0, positive)
                negative = tl.where(plane == -INFINITY, 1.0, negative)
            j += W
        lowest, highest = tl.min(lowest, 1), tl.max(highest, 1)
        nan, above, below = tl.max(nans, 1) > 0, tl.max(positive, 1) > 0, tl.max(negative, 1) > 0
        some = lowest <= highest
        lowest, highest = tl.where(some, lowest, 0.0), tl.where(some, highest, 0.0)
        if HALVED:
            lowest, highest = truncate(lowest, lowest < 0), truncate(highest, highest > 0)
        marked = (above | below) & (nan == 0)
        if BITS > 1:
            wide_low, wide_high = widen(lowest, highest, 65536 if HALVED else 1, LIMIT)
            lowest, highest = tl.where(marked, wide_low, lowest), tl.where(marked, wide_high, highest)
            first, second = tl.where(marked, highest, lowest), tl.where(marked, lowest, highest)
            top = tl.where(marked, (TOP - 2) * 256.0, TOP * 256.0)
        else:
            middle = lowest + (highest * 0.5 - lowest * 0.5)
            if HALVED:
                middle = nearest_bfloat16(middle)
            first = tl.where(marked, tl.where(below, -INFINITY, middle), lowest)
            second = tl.where(marked, tl.where(above, INFINITY, middle), highest)
            nan = nan | (marked & above & below)
            top = tl.where(marked, TOP * 256.0, TOP * 256.0)
        meta = tile * BLOCKS + (row * BLOCKS + b)
        tl.store(low + meta, tl.where(nan, float("nan"), first).to(low.dtype.element_ty), mask=exists)
        tl.store(high + meta, tl.where(nan, float("nan"), second).to(high.dtype.element_ty), mask=exists)
        half_low, half = half_range(lowest, highest)
        inverse = tl.div_rn(1.0, half) * top
        j = tl.arange(0, W).to(tl.int64)
        for _ in range(tl.cdiv(WORDS, W)):
            at = tile * WORDS + (row[:, None] * WORDS + j[None, :])
            random = first_random(at.to(tl.uint32), seed, salt)
            word = tl.zeros((GROUPS, W), tl.int32)
            if b > 0:  # what the blocks before have put there
                word = tl.load(words + at, mask=(j < WORDS)[None, :], other=0)
            for k in range((b + 1) * PER_BLOCK):
                random = tl.where((k > 0) & (k % 4 == 0), next_random(random), random)
                if k >= b * PER_BLOCK:
                    used = careful_mask(row, j, left, k, GROUP, WORDS)
                    place = tile * GROUP + (row[:, None] * GROUP + k * WORDS + j[None, :])
                    plane = tl.load(x + place, mask=used, other=0).to(tl.float32)
                    plane = tl.where(used, standardise(plane, shift, scale, place, COLUMNS, SHIFTED), 0.0)
                    finite = tl.abs(plane) < INFINITY
                    value = tl.where(finite, tl.minimum(tl.maximum(plane, -LIMIT), LIMIT), 0.0)
                    position = (value * 0.5 - half_low[:, None]) * inverse[:, None]
                    bent = bend(position, SLOPE, TERMS)
                    if BITS > 1:
                        bent = tl.where(marked[:, None], position + 256.0, bent)
                    byte = ((random >> (8 * (k % 4))) & 0xFF).to(tl.int32)
                    code = ((bent + 0.5).to(tl.int32) + byte) >> 8
                    if BITS > 1:
                        code = tl.where(finite, code, tl.where(plane > 0, TOP, 0))
                    else:
                        end = tl.where(above[:, None], plane == INFINITY, plane != -INFINITY)
                        code = tl.where(marked[:, None], end.to(tl.int32), code)
                    word = word | tl.where(used & (nan == 0)[:, None], code << (BITS * k), 0)
            tl.debug_barrier()
            tl.store(words + at, word, mask=exists[:, None] & (j < WORDS)[None, :])
            j += W
        tl.debug_barrier()


@triton.jit(do_not_specialize=["salt", "first", "groups", "numel"])
def quantize_again_kernel(
    x, seed, salt: tl.int32, words, low, high, shift, scale, first: tl.int64, groups: tl.int64, numel: tl.int64,
    BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
    COLUMNS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Encodes the tiles again that have a block which is not finite, by the ends that were stored."""
    tile = first + tl.program_id(0).to(tl.int64) * GROUPS
    BLOCKS: tl.constexpr = GROUP // BLOCK
    row, exists = rows(tile, groups, GROUPS)
    calm = row >= 0
    for b in range(BLOCKS):
        meta = tile * BLOCKS + (row * BLOCKS + b)
        lowest = tl.load(low + meta, mask=exists, other=0).to(tl.float32)
        highest = tl.load(high + meta, mask=exists, other=0).to(tl.float32)
        calm = calm & (tl.abs(lowest) < INFINITY) & (tl.abs(highest) < INFINITY)
    if tl.min(calm.to(tl.int32), 0) == 0:
        quantize_careful(x, seed, salt, words, low, high, shift, scale, tile, groups, numel,
                         BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W, COLUMNS, SHIFTED)  # fmt: skip


@triton.jit
def quantize_tile(
    x, seed, salt, words, low, high, shift, scale, tile, groups, numel,
    PARTIAL: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
    COLUMNS: tl.constexpr, SHIFTED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = GROUP // BLOCK
    PER_BLOCK: tl.constexpr = 32 // BITS // BLOCKS
    MASKED: tl.constexpr = PARTIAL or W != WORDS or 32 // BITS * WORDS != GROUP
    row, exists = rows(tile, groups, GROUPS)
    j = tl.arange(0, W)
    left = elements_left(numel, tile, GROUP, GROUPS, False)
    elements = x + tile * GROUP + (row[:, None] * GROUP + j[None, :])
    place = in_row(tile * GROUP, COLUMNS) + row[:, None] * GROUP + j[None, :]
    at = row[:, None] * WORDS + j[None, :]
    random = first_random((tile * WORDS).to(tl.uint32) + at.to(tl.uint32), seed, salt)
    word = tl.zeros((GROUPS, W), tl.uint32)
    for b in tl.static_range(BLOCKS):
        lowest = tl.full((GROUPS, W), INFINITY, tl.float32)
        highest = tl.full((GROUPS, W), -INFINITY, tl.float32)
        planes = ()
        for k in tl.static_range(b * PER_BLOCK, (b + 1) * PER_BLOCK):
            used = plane_mask(row, j, left, k, PARTIAL, GROUP, WORDS)
            plane = load_plane(elements + k * WORDS, used, MASKED)
            plane = standardise(plane, shift, scale, place + k * WORDS, COLUMNS, SHIFTED)
            if KEEP:
                planes = planes + (plane,)  # type: ignore[assignment]
            lowest = least(lowest, tl.where(used, plane, INFINITY) if MASKED else plane)
            highest = greatest(highest, tl.where(used, plane, -INFINITY) if MASKED else plane)
        lowest, highest = tl.reduce(lowest, 1, least), tl.reduce(highest, 1, greatest)
        if PARTIAL:
            begun = row * GROUP + b * BLOCK < left
            lowest, highest = tl.where(begun, lowest, 0.0), tl.where(begun, highest, 0.0)
        meta = tile * BLOCKS + (row * BLOCKS + b)
        half_low, inverse = keep_range(lowest, highest, low + meta, high + meta, exists, (1 << BITS) - 1)
        for k in tl.static_range(b * PER_BLOCK, (b + 1) * PER_BLOCK):
            used = plane_mask(row, j, left, k, PARTIAL, GROUP, WORDS)
            if KEEP:
                plane = planes[k - b * PER_BLOCK]
            else:
                plane = load_plane(elements + k * WORDS, used, MASKED)
                plane = standardise(plane, shift, scale, place + k * WORDS, COLUMNS, SHIFTED)
            if k > 0 and k % 4 == 0:
                random = next_random(random)
            code = field(plane, half_low[:, None], inverse[:, None], random, k, BITS, SLOPE, TERMS)
            if MASKED:
                code = tl.where(used, code, 0)
            word = word | code
    word = word.to(tl.int32, bitcast=True)
    tl.store(words + tile * WORDS + at, word, mask=exists[:, None] & (j < WORDS)[None, :])


@triton.jit(do_not_specialize=["salt", "first", "groups", "numel"])
def quantize_kernel(
    x, seed, salt: tl.int32, words, low, high, shift, scale, first: tl.int64, groups: tl.int64, numel: tl.int64,
    PARTIAL: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
    COLUMNS: tl.constexpr, SHIFTED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Encodes `GROUPS` groups a program, from group `first` on; reads elements once where `KEEP`, else twice."""
    tile = first + tl.program_id(0).to(tl.int64) * GROUPS
    if PARTIAL:
        if (tile + GROUPS) * GROUP <= numel:
            quantize_tile(x, seed, salt, words, low, high, shift, scale, tile, groups, numel,
                          False, BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W,
                          COLUMNS, SHIFTED, KEEP)  # fmt: skip
        else:
            quantize_tile(x, seed, salt, words, low, high, shift, scale, tile, groups, numel,
                          True, BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W, COLUMNS, SHIFTED, KEEP)  # fmt: skip
    else:
        quantize_tile(x, seed, salt, words, low, high, shift, scale, tile, groups, numel,
                      False, BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W, COLUMNS, SHIFTED, KEEP)  # fmt: skip


@triton.jit(do_not_specialize=["salt", "first", "groups", "numel"])
def quantize_long_kernel(
    x, seed, salt: tl.int32, words, low, high, shift, scale, first: tl.int64, groups: tl.int64, numel: tl.int64,
    PARTIAL: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
    COLUMNS: tl.constexpr, SHIFTED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Encodes one group a program, `W` words at a time, for groups too long for registers: reads elements twice."""
    PLANES: tl.constexpr = 32 // BITS
    BLOCKS: tl.constexpr = GROUP // BLOCK
    PER_BLOCK: tl.constexpr = PLANES // BLOCKS
    MASKED: tl.constexpr = PARTIAL or WORDS % W != 0 or PLANES * WORDS != GROUP
    group = first + tl.program_id(0).to(tl.int64)
    x += group * GROUP
    words += group * WORDS
    first_place = in_row(group * GROUP, COLUMNS)
    left = tl.minimum(numel - group * GROUP, GROUP)
    lanes = tl.arange(0, W)[None, :].to(tl.int64)
    half_lows, inverses = (), ()
    for b in tl.static_range(BLOCKS):
        lowest = tl.full((1, W), INFINITY, tl.float32)
        highest = tl.full((1, W), -INFINITY, tl.float32)
        j = lanes
        for _ in range(tl.cdiv(WORDS, W)):
            for k in tl.static_range(b * PER_BLOCK, (b + 1) * PER_BLOCK):
                used = (j < WORDS) & (j + k * WORDS < left)
                plane = load_plane(x + k * WORDS + j, used, MASKED)
                plane = standardise(plane, shift, scale, first_place + k * WORDS + j, COLUMNS, SHIFTED)
                lowest = least(lowest, tl.where(used, plane, INFINITY) if MASKED else plane)
                highest = greatest(highest, tl.where(used, plane, -INFINITY) if MASKED else plane)
            j += W
        begun = left > b * BLOCK
        lowest = tl.where(begun, tl.reduce(lowest, 1, least), 0.0)
        highest = tl.where(begun, tl.reduce(highest, 1, greatest), 0.0)
        meta = group * BLOCKS + b + tl.arange(0, 1)
        half_low, inverse = keep_range(lowest, highest, low + meta, high + meta, meta >= 0, (1 << BITS) - 1)
        half_lows = half_lows + (half_low[:, None],)  # type: ignore[assignment]
        inverses = inverses + (inverse[:, None],)  # type: ignore[assignment]
    j = lanes
    for _ in range(tl.cdiv(WORDS, W)):
        random = first_random((group * WORDS + j).to(tl.uint32), seed, salt)
        word = tl.zeros((1, W), tl.uint32)
        for k in tl.static_range(PLANES):
            if k > 0 and k % 4 == 0:
                random = next_random(random)
            used = (j < WORDS) & (j + k * WORDS < left)
            plane = load_plane(x + k * WORDS + j, used, MASKED)
            plane = standardise(plane, shift, scale, first_place + k * WORDS + j, COLUMNS, SHIFTED)
            code = field(plane, half_lows[k // PER_BLOCK], inverses[k // PER_BLOCK], random, k, BITS, SLOPE, TERMS)
            word = word | (tl.where(used, code, 0) if MASKED else code)
        tl.store(words + j, word.to(tl.int32, bitcast=True), mask=j < WORDS)
        j += W


def encode_tile(fmt: BlockFormat, itemsize: int, units: Units = NONE) -> Tile:
    """The tile of `quantize_kernel`: loads of 16 bytes, of 8 where codes of 2-byte elements would spill."""
    return tile_for(
        fmt.words, max(1, min(LOAD // itemsize, (MOST_STANDARDISED if units.columns else MOST) // fmt.planes))
    )


@lru_cache(maxsize=1024)
def encode_constants(fmt: BlockFormat, partial: bool, tile: Tile, units: Units = NONE) -> dict[str, Any]:
    """The compile-time arguments of `quantize_kernel`. Where a thread has too many elements for its registers, it
    reads them again instead, from the nearest cache."""
    elements = fmt.planes // fmt.blocks_per_group * tile.groups * tile.width // (tile.warps * THREADS)
    return constants(fmt, encode_map(fmt), tile, units) | {"PARTIAL": partial, "KEEP": elements <= KEPT}


@lru_cache(maxsize=1024)
def again_constants(fmt: BlockFormat, tile: Tile, units: Units = NONE) -> dict[str, Any]:
    """The compile-time arguments of `quantize_again_kernel`, which is masked throughout."""
    return constants(fmt, encode_map(fmt), tile, units)


def quantize_into(
    x: Tensor, seed: Tensor, salt: int, fmt: BlockFormat, words: Tensor, low: Tensor, high: Tensor,
    first: int = 0, tile: Tile | None = None, shift: Tensor | None = None, scale: Tensor | None = None,
    columns: int = 0,
) -> None:  # fmt: skip
    """Encodes the flat, contiguous `x` from group `first` on into `words` (int32), `low` and `high`; with `scale`, its
    standardised columns, of which there are so many."""
    units = Units.of(shift, scale, columns)
    tile = tile or encode_tile(fmt, x.element_size(), units)
    numel = x.numel()
    groups = fmt.groups(numel)
    programs = tile.programs(groups - first)
    if programs == 0:
        return
    kernel = quantize_kernel if fmt.words <= tile.width else quantize_long_kernel
    by = x if scale is None else scale.contiguous()
    to = by if shift is None else shift.contiguous()
    arguments = (x, seed.contiguous(), salt, words, low, high, to, by, first, groups, numel)
    chosen = encode_constants(fmt, numel % fmt.group != 0, tile, units)
    with on_device(x):
        kernel[(programs,)](*arguments, **chosen, num_warps=tile.warps, **EXACT)
        quantize_again_kernel[(programs,)](
            *arguments, **again_constants(fmt, tile, units), num_warps=tile.warps, **EXACT
        )


def quantize_triton(
    x: Tensor, seed: Tensor, salt: int, fmt: BlockFormat, shift: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize` as two launches; shapes and errors as there."""
    flat = x.contiguous().view(-1)
    groups = fmt.groups(flat.numel())
    words = torch.empty((groups, fmt.words), dtype=torch.int32, device=x.device)
    low = torch.empty((groups, fmt.blocks_per_group), dtype=fmt.metadata, device=x.device)
    high = torch.empty_like(low)
    quantize_into(
        flat, seed, salt, fmt, words, low, high, shift=shift, scale=scale, columns=x.shape[-1] if x.dim() else 1
    )
    return words.view(torch.float32), low, high
