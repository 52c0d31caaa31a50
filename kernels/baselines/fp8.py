"""Eight-bit floats with one scale per tensor: `actcompile::cast_fp8` and `actcompile::restore_fp8`.

The formats are those of "FP8 Formats for Deep Learning" (Micikevicius et al., 2022): e4m3fn has three bits of mantissa
and no infinity, e5m2 has two. The scale is the power of two that brings the largest finite magnitude just within the
format, so scaling rounds nothing. Rounding is to nearest even, hence biased.

Bytes: one per element, and four.
"""

import math

import torch
from torch import Tensor

from ..op import op
from .matrix import check_float, flat_chunks, largest_finite, power_of_two

FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)


def fp8_nbytes(numel):
    """Bytes of `numel` elements, an int or a SymInt, after `cast_fp8`: the scale included."""
    return numel + 4


@op("cast_fp8")
def cast_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Casts `x`, scaled, to an 8-bit float. Biased.

    Args:
        x: any shape and strides, float32, bfloat16 or float16. NaN stays NaN, infinity stays so in e5m2 and becomes
            NaN in e4m3fn; neither touches the scale.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.

    Returns:
        bytes: of the shape of `x`, contiguous, in `dtype`.
        scale: float32 (1,), by which `bytes` is to be multiplied.

    Raises:
        ValueError: `x` or `dtype` is of another dtype.
    """
    found, scale = _empty(x, dtype)
    dense = x.contiguous()
    mantissa, exponent = torch.frexp(largest_finite(dense))
    top_mantissa, top_exponent = math.frexp(torch.finfo(dtype).max)
    shift = (top_exponent - exponent - (mantissa > top_mantissa).int()).clamp(-126, 126)
    for part, place in flat_chunks(dense, found):
        scaled = part.float() * power_of_two(shift)
        if dtype == torch.float8_e4m3fn:
            scaled = torch.where(scaled.isinf(), float("nan"), scaled)  # the cast of torch may saturate it
        place.copy_(scaled)
    return found, scale.copy_(power_of_two(-shift))


@cast_fp8.register_fake
def _empty(x, dtype):
    check_float(x)
    if dtype not in FORMATS:
        raise ValueError(f"dtype must be torch.float8_e4m3fn or torch.float8_e5m2, got {dtype}")
    found = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return found, x.new_empty(1, dtype=torch.float32)


@op("restore_fp8")
def restore_fp8(bytes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts what `cast_fp8` returned to `dtype`, contiguous; no finite element becomes infinite."""
    dense = bytes.contiguous()
    x = torch.empty_like(dense, dtype=dtype)
    most = torch.finfo(dtype).max
    for part, place in flat_chunks(dense, x):
        value = part.float()
        place.copy_(torch.where(value.isinf(), value, (value * scale).clamp(-most, most)))
    return x


@restore_fp8.register_fake
def _(bytes, scale, dtype):
    return torch.empty_like(bytes, dtype=dtype, memory_format=torch.contiguous_format)
