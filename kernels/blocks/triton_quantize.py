"""`quantize` and `dequantize` as Triton kernels, bit for bit what `quantize_reference` and `dequantize_reference` give.

Bit-equality rests on the same order of operations in float32: products and sums are never contracted
(`enable_fp_fusion=False`), `scalar / tensor` is the product with the reciprocal, as it is in torch, and minimum,
maximum and the lower bound on the range let NaN pass.

Tiles are worked on as if all their blocks were calm: finite, and not of the largest numbers. A second launch looks at
the blocks' ends alone, and does the tiles again where one is not: a kernel of its own, so that what is rare takes no
registers from what is not.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import random_bits
from .format import BlockFormat
from .levels import decode_map, encode_map
from .quantize import LARGEST as LARGEST_FLOAT32
from .quantize import SMALLEST_HALF_RANGE, SMALLEST_NORMAL, WIDE_HALF_RANGE
from .triton_tile import LOAD, THREADS, Tile, elements_left, on_device, plane_mask, rows, tile_for

MIX_1 = tl.constexpr(random_bits.MIX_1)
MIX_2 = tl.constexpr(random_bits.MIX_2)
LCG_MULTIPLIER = tl.constexpr(random_bits.LCG_MULTIPLIER)
LCG_INCREMENT = tl.constexpr(random_bits.LCG_INCREMENT)
SMALLEST = tl.constexpr(SMALLEST_HALF_RANGE)
WIDE = tl.constexpr(WIDE_HALF_RANGE)
INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(LARGEST_FLOAT32)
LARGEST_BFLOAT16 = tl.constexpr(torch.finfo(torch.bfloat16).max)
LARGEST_FLOAT16 = tl.constexpr(torch.finfo(torch.float16).max)
TINY = tl.constexpr(SMALLEST_NORMAL)
KEPT = 64  # elements of a block that a thread keeps in registers
MOST = 128  # elements of a group that a thread works on
EXACT = {"enable_fp_fusion": False}


@triton.jit
def least(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def greatest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bend(t, SLOPE: tl.constexpr, TERMS: tl.constexpr):
    """`levels.apply_map`."""
    if SLOPE == 1.0 and len(TERMS) == 0:
        return t
    result = t * SLOPE
    for i in tl.static_range(len(TERMS)):
        result = result + (tl.minimum(tl.maximum(t, TERMS[i][0]), TERMS[i][1]) - TERMS[i][0]) * TERMS[i][2]
    return result


@triton.jit
def truncate(x, away):
    """`quantize._truncate`."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(away & (tl.abs(x) < INFINITY), bits + 0xFFFF, bits)
    return tl.where(x != x, x, (bits & -65536).to(tl.float32, bitcast=True))


@triton.jit
def half_range(low, high):
    """`quantize.half_range`."""
    half_low = low * 0.5
    return half_low, greatest(high * 0.5 - half_low, SMALLEST)


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
def careful_mask(row, j, left, k, GROUP: tl.constexpr, WORDS: tl.constexpr):
    """`plane_mask` of a plane that is known when the kernel runs only."""
    within = k * WORDS + j[None, :]
    return (j < WORDS)[None, :] & (within < GROUP) & (row[:, None] * GROUP + within < left)


@triton.jit
def quantize_careful(
    x, seed, salt, words, low, high, tile, groups, numel,
    BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
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
                place = x + tile * GROUP + (row[:, None] * GROUP + k * WORDS + j[None, :])
                plane = tl.load(place, mask=used, other=0).to(tl.float32)
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
                    place = x + tile * GROUP + (row[:, None] * GROUP + k * WORDS + j[None, :])
                    plane = tl.load(place, mask=used, other=0).to(tl.float32)
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
    x, seed, salt: tl.int32, words, low, high, first: tl.int64, groups: tl.int64, numel: tl.int64,
    BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
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
        quantize_careful(x, seed, salt, words, low, high, tile, groups, numel,
                         BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W)  # fmt: skip


@triton.jit
def quantize_tile(
    x, seed, salt, words, low, high, tile, groups, numel,
    PARTIAL: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = GROUP // BLOCK
    PER_BLOCK: tl.constexpr = 32 // BITS // BLOCKS
    MASKED: tl.constexpr = PARTIAL or W != WORDS or 32 // BITS * WORDS != GROUP
    row, exists = rows(tile, groups, GROUPS)
    j = tl.arange(0, W)
    left = elements_left(numel, tile, GROUP, GROUPS, False)
    elements = x + tile * GROUP + (row[:, None] * GROUP + j[None, :])
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
            plane = planes[k - b * PER_BLOCK] if KEEP else load_plane(elements + k * WORDS, used, MASKED)
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
    x, seed, salt: tl.int32, words, low, high, first: tl.int64, groups: tl.int64, numel: tl.int64,
    PARTIAL: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Encodes `GROUPS` groups a program, from group `first` on; reads elements once where `KEEP`, else twice."""
    tile = first + tl.program_id(0).to(tl.int64) * GROUPS
    if PARTIAL:
        if (tile + GROUPS) * GROUP <= numel:
            quantize_tile(x, seed, salt, words, low, high, tile, groups, numel,
                          False, BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W, KEEP)  # fmt: skip
        else:
            quantize_tile(x, seed, salt, words, low, high, tile, groups, numel,
                          True, BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W, KEEP)  # fmt: skip
    else:
        quantize_tile(x, seed, salt, words, low, high, tile, groups, numel,
                      False, BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W, KEEP)  # fmt: skip


@triton.jit(do_not_specialize=["salt", "first", "groups", "numel"])
def quantize_long_kernel(
    x, seed, salt: tl.int32, words, low, high, first: tl.int64, groups: tl.int64, numel: tl.int64,
    PARTIAL: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Encodes one group a program, `W` words at a time, for groups too long for registers: reads elements twice."""
    PLANES: tl.constexpr = 32 // BITS
    BLOCKS: tl.constexpr = GROUP // BLOCK
    PER_BLOCK: tl.constexpr = PLANES // BLOCKS
    MASKED: tl.constexpr = PARTIAL or WORDS % W != 0 or PLANES * WORDS != GROUP
    group = first + tl.program_id(0).to(tl.int64)
    x += group * GROUP
    words += group * WORDS
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
            code = field(plane, half_lows[k // PER_BLOCK], inverses[k // PER_BLOCK], random, k, BITS, SLOPE, TERMS)
            word = word | (tl.where(used, code, 0) if MASKED else code)
        tl.store(words + j, word.to(tl.int32, bitcast=True), mask=j < WORDS)
        j += W


@triton.jit
def dequantize_careful(
    words, low, high, x, tile, start, groups, numel,
    BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Decodes a tile whatever is in it."""
    BLOCKS: tl.constexpr = GROUP // BLOCK
    PER_BLOCK: tl.constexpr = 32 // BITS // BLOCKS
    TOP: tl.constexpr = (1 << BITS) - 1
    BETWEEN: tl.constexpr = TOP - 2 if BITS > 1 else TOP
    NARROW: tl.constexpr = LARGEST_FLOAT16 if x.dtype.element_ty == tl.float16 else LARGEST
    MOST: tl.constexpr = LARGEST_BFLOAT16 if x.dtype.element_ty == tl.bfloat16 else NARROW
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
            place = x + tile * GROUP + (row[:, None] * GROUP + k * WORDS + j[None, :])
            tl.store(place, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_tile(
    words, low, high, x, tile, start, groups, numel,
    PARTIAL: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = GROUP // BLOCK
    PER_BLOCK: tl.constexpr = 32 // BITS // BLOCKS
    TOP: tl.constexpr = (1 << BITS) - 1
    row, exists = rows(tile, groups, GROUPS)
    j = tl.arange(0, W)
    if W < WORDS:
        j = j + start
    left = elements_left(numel, tile, GROUP, GROUPS, W < WORDS)
    elements = x + tile * GROUP + (row[:, None] * GROUP + j[None, :])
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
            mask = exists[:, None] & plane_mask(row, j, left, k, PARTIAL, GROUP, WORDS)
            tl.store(elements + k * WORDS, value.to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first", "groups", "numel"])
def dequantize_kernel(
    words, low, high, x, first: tl.int64, groups: tl.int64, numel: tl.int64,
    PARTIAL: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Decodes `GROUPS` groups by `W` words a program, from group `first` on."""
    tile = first + tl.program_id(0).to(tl.int64) * GROUPS
    start = tl.program_id(1).to(tl.int64) * W
    if PARTIAL:
        if (tile + GROUPS) * GROUP <= numel:
            dequantize_tile(words, low, high, x, tile, start, groups, numel,
                            False, BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W)  # fmt: skip
        else:
            dequantize_tile(words, low, high, x, tile, start, groups, numel,
                            True, BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W)  # fmt: skip
    else:
        dequantize_tile(words, low, high, x, tile, start, groups, numel,
                        False, BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W)  # fmt: skip


@triton.jit(do_not_specialize=["first", "groups", "numel"])
def dequantize_again_kernel(
    words, low, high, x, first: tl.int64, groups: tl.int64, numel: tl.int64,
    BITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SLOPE: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Decodes the tiles again that have a block which is marked, or not of numbers far from overflow."""
    tile = first + tl.program_id(0).to(tl.int64) * GROUPS
    start = tl.program_id(1).to(tl.int64) * W
    BLOCKS: tl.constexpr = GROUP // BLOCK
    CALM: tl.constexpr = LARGEST_FLOAT16 if x.dtype.element_ty == tl.float16 else WIDE
    row, exists = rows(tile, groups, GROUPS)
    calm = row >= 0
    for b in range(BLOCKS):
        meta = tile * BLOCKS + (row * BLOCKS + b)
        lowest = tl.load(low + meta, mask=exists, other=0).to(tl.float32)
        highest = tl.load(high + meta, mask=exists, other=0).to(tl.float32)
        calm = calm & (lowest <= highest) & (lowest >= -CALM) & (highest <= CALM)
    if tl.min(calm.to(tl.int32), 0) == 0:
        dequantize_careful(words, low, high, x, tile, start, groups, numel,
                           BITS, BLOCK, WORDS, GROUP, SLOPE, TERMS, GROUPS, W)  # fmt: skip


def constants(fmt: BlockFormat, numel: int, mapping: tuple, tile: Tile) -> dict[str, Any]:
    """The compile-time arguments of all three kernels but `KEEP`; `mapping` is an `encode_map` or `decode_map`."""
    slope, terms = mapping
    return {
        "PARTIAL": numel % fmt.group != 0,
        "BITS": fmt.bits,
        "BLOCK": fmt.block,
        "WORDS": fmt.words,
        "GROUP": fmt.group,
        "SLOPE": slope,
        "TERMS": terms,
        "GROUPS": tile.groups,
        "W": tile.width,
    }


def again_constants(fmt: BlockFormat, mapping: tuple, tile: Tile) -> dict[str, Any]:
    """The compile-time arguments of the kernels that do tiles again, which are masked throughout."""
    chosen = constants(fmt, 0, mapping, tile)
    chosen.pop("PARTIAL")
    return chosen


def encode_tile(fmt: BlockFormat, itemsize: int) -> Tile:
    """The tile of `quantize_kernel`: loads of 16 bytes, of 8 where 1-bit codes of 2-byte elements would spill."""
    return tile_for(fmt.words, min(LOAD // itemsize, MOST // fmt.planes))


def decode_tile(fmt: BlockFormat, itemsize: int) -> Tile:
    """The tile of `dequantize_kernel`: stores of 16 bytes."""
    return tile_for(fmt.words, LOAD // itemsize)


def encode_constants(fmt: BlockFormat, numel: int, tile: Tile) -> dict[str, Any]:
    """The compile-time arguments of `quantize_kernel`. Where a thread has too many elements for its registers, it
    reads them again instead, from the nearest cache."""
    elements = fmt.planes // fmt.blocks_per_group * tile.groups * tile.width // (tile.warps * THREADS)
    return constants(fmt, numel, encode_map(fmt), tile) | {"KEEP": elements <= KEPT}


def quantize_into(
    x: Tensor, seed: Tensor, salt: int, fmt: BlockFormat, words: Tensor, low: Tensor, high: Tensor,
    first: int = 0, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Encodes the flat, contiguous `x` from group `first` on into `words` (int32), `low` and `high`."""
    tile = tile or encode_tile(fmt, x.element_size())
    programs = tile.programs(fmt.groups(x.numel()) - first)
    if programs == 0:
        return
    kernel = quantize_kernel if fmt.words <= tile.width else quantize_long_kernel
    arguments = (x, seed.contiguous(), salt, words, low, high, first, fmt.groups(x.numel()), x.numel())
    with on_device(x):
        kernel[(programs,)](*arguments, **encode_constants(fmt, x.numel(), tile), num_warps=tile.warps, **EXACT)
        quantize_again_kernel[(programs,)](
            *arguments, **again_constants(fmt, encode_map(fmt), tile), num_warps=tile.warps, **EXACT
        )


def quantize_triton(x: Tensor, seed: Tensor, salt: int, fmt: BlockFormat) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize` as two launches; shapes and errors as there."""
    flat = x.contiguous().view(-1)
    groups = fmt.groups(flat.numel())
    words = torch.empty((groups, fmt.words), dtype=torch.int32, device=x.device)
    low = torch.empty((groups, fmt.blocks_per_group), dtype=fmt.metadata, device=x.device)
    high = torch.empty_like(low)
    quantize_into(flat, seed, salt, fmt, words, low, high)
    return words.view(torch.float32), low, high


def dequantize_into(
    words: Tensor, low: Tensor, high: Tensor, x: Tensor, fmt: BlockFormat, first: int = 0, tile: Tile | None = None
) -> None:
    """Decodes `words` (int32), `low` and `high` from group `first` on into the flat, contiguous `x`."""
    tile = tile or decode_tile(fmt, x.element_size())
    programs = tile.programs(fmt.groups(x.numel()) - first)
    if programs == 0:
        return
    grid = (programs, triton.cdiv(fmt.words, tile.width))
    arguments = (words, low, high, x, first, fmt.groups(x.numel()), x.numel())
    with on_device(x):
        dequantize_kernel[grid](
            *arguments, **constants(fmt, x.numel(), decode_map(fmt), tile), num_warps=tile.warps, **EXACT
        )
        dequantize_again_kernel[grid](
            *arguments, **again_constants(fmt, decode_map(fmt), tile), num_warps=tile.warps, **EXACT
        )


def dequantize_triton(
    words: Tensor, low: Tensor, high: Tensor, size: Sequence[int], dtype: torch.dtype, fmt: BlockFormat
) -> Tensor:
    """`dequantize` as two launches; shapes and errors as there."""
    x = torch.empty(list(size), dtype=dtype, device=words.device)
    packed = words.contiguous().view(torch.int32)
    dequantize_into(packed, low.contiguous(), high.contiguous(), x.view(-1), fmt)
    return x
