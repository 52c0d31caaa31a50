"""What the Triton kernels that encode and those that decode compute alike. Bit for bit what the references do."""

import torch
import triton
import triton.language as tl

from .quantize import LARGEST as LARGEST_FLOAT32
from .quantize import SMALLEST_HALF_RANGE, SMALLEST_NORMAL, WIDE_HALF_RANGE

SMALLEST = tl.constexpr(SMALLEST_HALF_RANGE)
WIDE = tl.constexpr(WIDE_HALF_RANGE)
INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(LARGEST_FLOAT32)
LARGEST_BFLOAT16 = tl.constexpr(torch.finfo(torch.bfloat16).max)
LARGEST_FLOAT16 = tl.constexpr(torch.finfo(torch.float16).max)
TINY = tl.constexpr(SMALLEST_NORMAL)
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
def half_range(low, high):
    """`quantize.half_range`."""
    half_low = low * 0.5
    return half_low, greatest(high * 0.5 - half_low, SMALLEST)


@triton.jit
def careful_mask(row, j, left, k, GROUP: tl.constexpr, WORDS: tl.constexpr):
    """`plane_mask` of a plane that is known when the kernel runs only."""
    within = k * WORDS + j[None, :]
    return (j < WORDS)[None, :] & (within < GROUP) & (row[:, None] * GROUP + within < left)


@triton.jit
def in_row(first, COLUMNS: tl.constexpr):
    """An element that has the column of element `first` of a tensor, and is one of the first row."""
    if COLUMNS == 0:
        return 0
    else:
        return (first % COLUMNS).to(tl.int32)


@triton.jit
def units(shift, scale, place, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr):
    """`quantize.columns` of the elements at these places of rows."""
    by = tl.load(scale + place % COLUMNS)
    sound = (tl.abs(by) >= TINY) & (tl.abs(by) < INFINITY)
    if SHIFTED:
        to = tl.load(shift + place % COLUMNS)
        sound = sound & (tl.abs(to) < INFINITY)
    else:
        to = tl.zeros_like(by)
    return tl.where(sound, to, 0.0), tl.where(sound, by, 1.0)


@triton.jit
def standardise(x, shift, scale, place, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr):
    """`quantize.standardised`, where there are `COLUMNS`."""
    if COLUMNS == 0:
        return x
    else:
        to, by = units(shift, scale, place, COLUMNS, SHIFTED)
        return (x - to) * by


@triton.jit
def restore(x, shift, scale, place, LIMIT: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr):
    """`quantize.unstandardised`, where there are `COLUMNS`; finite numbers stay within `LIMIT`."""
    if COLUMNS == 0:
        return x
    else:
        to, by = units(shift, scale, place, COLUMNS, SHIFTED)
        y = x * tl.div_rn(1.0, by) + to
        bounded = tl.where(y < -LIMIT, -LIMIT, tl.where(y > LIMIT, LIMIT, y))
        return tl.where(tl.abs(y) == INFINITY, y, bounded)
