"""Block-wise quantisation with stochastic rounding: `actcompile::quantize` and `actcompile::dequantize`.

An element `x` of a block with minimum `low` and maximum `high` has the code-axis position
`t = (x - low) / (high - low) * (2**bits - 1)`, bent by the format's levels; it is rounded to one of its two neighbours
with a probability that keeps the mean, and comes back as `low + level(code) * scale` (EXACT, eq. 2; i-EXACT,
eq. 3 to 5).

Here stand the reference, which is the specification, and the ops' schemas and fakes; `cpu` and `cuda` have the kernels,
which agree with it bit for bit. What all do:

- `low` and `high` are rounded outward to the metadata's dtype before they are used, so nothing is clamped but float32
  elements beyond bfloat16's largest number;
- differences are taken of halves, so a block may span more than the largest float32;
- the position has eight fractional bits; a half is added before they are cut, a random byte before the code is cut;
- unused fields of the last group are zero;
- a block with NaN has NaN as both ends, zeros as words, and decodes to NaN.

Infinities come back as they are, and leave the other elements of their block alone: `low` and `high` are those of the
finite ones, and stored the other way round, which marks the block. In a marked block the first code is minus infinity,
the last is infinity, and finite elements have the codes between, evenly spaced. One bit has no codes between: there
an infinite end says which code is infinity, and the other end is the middle of the finite elements, which all become
that; with infinities of both signs such a block is NaN.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..op import op
from .format import BlockFormat
from .levels import apply_map, decode_map, encode_map
from .random_bits import random_words

SMALLEST_HALF_RANGE = 2.0**-100  # keeps 1 / range finite; a constant block still decodes exactly, all its codes being 0
WIDE_HALF_RANGE = 2.0**125
SMALLEST_NORMAL = 2.0**-126
LARGEST = torch.finfo(torch.float32).max
RUN = 1 << 20  # elements whose temporaries stay in a CPU's cache
INFINITY = float("inf")


def round_outward(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounds float32 minima down and maxima up to values that `dtype` holds; returns float32. NaN and Inf stay."""
    if dtype == torch.float32:
        return low, high
    return _truncate(low, low < 0), _truncate(high, high > 0)


def _truncate(x: Tensor, away: Tensor) -> Tensor:
    """Cuts float32 to bfloat16's bits, away from zero where `away`."""
    bits = x.view(torch.int32)
    bits = torch.where(away & (x.abs() < INFINITY), bits + 0xFFFF, bits)
    return torch.where(x != x, x, (bits & -65536).view(torch.float32))


def half_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the minimum, and half of the range, the latter bounded below so that its inverse is finite."""
    half_low = low * 0.5
    return half_low, (high * 0.5 - half_low).clamp_min(SMALLEST_HALF_RANGE)


def widen(low: Tensor, high: Tensor, metadata: torch.dtype) -> tuple[Tensor, Tensor]:
    """Makes empty ranges one unit of `metadata` wide, so that their ends can be told apart.

    The minimum stays, as it is what the first level decodes to; unless there is nothing above it.
    """
    unit = 1 if metadata == torch.float32 else 1 << 16
    bits = low.view(torch.int32)
    above = torch.where(low < SMALLEST_NORMAL, SMALLEST_NORMAL, (bits + unit).view(torch.float32))
    below = (bits - unit).view(torch.float32)
    empty, largest = ~(low < high), low >= torch.finfo(metadata).max
    return torch.where(empty & largest, below, low), torch.where(empty & ~largest, above, high)


# ---- reference -----------------------------------------------------------------------------------------------------


def quantize_reference(
    x: Tensor,
    seed: Tensor,
    salt: int,
    fmt: BlockFormat,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    first_group: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `quantize`; `first_group` is the number of groups before `x`."""
    flat = standardised(x, shift, scale).reshape(-1).float()
    groups = fmt.groups(flat.numel())
    shape = (groups, fmt.blocks_per_group, fmt.block)
    padding = (0, groups * fmt.group - flat.numel())
    used = torch.nn.functional.pad(torch.ones_like(flat, dtype=torch.bool), padding).view(shape)
    values = torch.nn.functional.pad(flat, padding).view(shape)

    infinite = used & values.isinf()
    finite = used & ~infinite
    bound = torch.finfo(fmt.metadata).max
    values = torch.where(infinite, values, values.clamp(-bound, bound))
    low = torch.where(finite, values, INFINITY).amin(2, keepdim=True)
    high = torch.where(finite, values, -INFINITY).amax(2, keepdim=True)
    some = finite.any(2, keepdim=True)
    low, high = round_outward(torch.where(some, low, 0.0), torch.where(some, high, 0.0), fmt.metadata)
    marked = infinite.any(2, keepdim=True) & (low == low)
    if fmt.bits == 1:
        return _one_bit(values, used, low, high, marked, seed, salt, fmt, first_group)

    wide_low, wide_high = widen(low, high, fmt.metadata)
    low, high = torch.where(marked, wide_low, low), torch.where(marked, wide_high, high)
    code = _round(values, low, high, fmt.top - 2 * marked.float(), marked, seed, salt, fmt, first_group)
    code = torch.where(values == INFINITY, fmt.top, torch.where(values == -INFINITY, 0, code))
    code = torch.where(used & (low == low), code, 0)
    return _packed(code, fmt), *_ends(torch.where(marked, high, low), torch.where(marked, low, high), fmt)


def _one_bit(values, used, low, high, marked, seed, salt, fmt, first_group):
    code = _round(values, low, high, torch.ones_like(low), torch.zeros_like(marked), seed, salt, fmt, first_group)
    middle = low + (high * 0.5 - low * 0.5)
    above, below = ((used & (values == end)).any(2, keepdim=True) for end in (INFINITY, -INFINITY))
    code = torch.where(marked, torch.where(above, values == INFINITY, values != -INFINITY).int(), code)
    low = torch.where(marked, torch.where(below, -INFINITY, middle), low)
    high = torch.where(marked, torch.where(above, INFINITY, middle), high)
    low, high = (torch.where(marked & above & below, float("nan"), end) for end in (low, high))
    code = torch.where(used & (low == low), code, 0)
    return _packed(code, fmt), *_ends(low, high, fmt)


def _round(values, low, high, top, marked, seed, salt, fmt, first_group) -> Tensor:
    """The codes of finite elements, int32."""
    half_low, half = half_range(low, high)
    position = (values * 0.5 - half_low) * (half.reciprocal() * (top * 256.0))
    position = torch.where(marked, position + 256.0, apply_map(position, encode_map(fmt)))
    return ((position + 0.5).to(torch.int32) + _random_bytes(values, seed, salt, fmt, first_group)) >> 8


def _random_bytes(values: Tensor, seed: Tensor, salt: int, fmt: BlockFormat, first_group: int) -> Tensor:
    groups = len(values)
    index = torch.arange(groups * fmt.words, device=values.device) + first_group * fmt.words
    index = ((index + 2**31) % 2**32 - 2**31).to(torch.int32).view(groups, fmt.words)
    noise = list(random_words(index, seed, salt, -(-fmt.planes // 4)))
    planes = [(noise[k // 4] >> (8 * (k % 4))) & 0xFF for k in range(fmt.planes)]
    return torch.stack(planes, 1).flatten(1)[:, : fmt.group].reshape(values.shape)


def _packed(code: Tensor, fmt: BlockFormat) -> Tensor:
    """Words of codes (groups, blocks, block), int32."""
    slots = fmt.planes * fmt.words
    code = torch.nn.functional.pad(code.reshape(len(code), fmt.group), (0, slots - fmt.group))
    shifts = torch.arange(fmt.planes, dtype=torch.int32, device=code.device)[None, :, None] * fmt.bits
    fields = code.view(len(code), fmt.planes, fmt.words) << shifts
    return fields.sum(1, dtype=torch.int32).view(torch.float32)  # fields are disjoint: a sum is an or


def _ends(low: Tensor, high: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    return low.to(fmt.metadata).squeeze(2), high.to(fmt.metadata).squeeze(2)


def dequantize_reference(
    words: Tensor,
    low: Tensor,
    high: Tensor,
    size: Sequence[int],
    dtype: torch.dtype,
    fmt: BlockFormat,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """The specification of `dequantize`."""
    shifts = torch.arange(fmt.planes, dtype=torch.int32, device=words.device)[None, :, None] * fmt.bits
    code = (words.view(torch.int32)[:, None, :] >> shifts) & fmt.top
    code = code.flatten(1)[:, : fmt.group].reshape(len(words), fmt.blocks_per_group, fmt.block)
    low, high = low.float().unsqueeze(2), high.float().unsqueeze(2)
    if fmt.bits == 1:
        marked = low.isinf() | high.isinf()
        finite = _levels_between(code.float(), low, high, torch.ones_like(low))
        x = torch.where(marked, torch.where(code == 1, high, low), finite)
    else:
        marked = low > high
        low, high = torch.where(marked, high, low), torch.where(marked, low, high)
        level = torch.where(marked, code.float() - 1.0, apply_map(code.float(), decode_map(fmt)))
        finite = _levels_between(level, low, high, fmt.top - 2 * marked.float())
        x = torch.where(marked & (code == 0), -INFINITY, torch.where(marked & (code == fmt.top), INFINITY, finite))
    numel = 1
    for s in size:
        numel *= s
    x = x.reshape(-1)[:numel].reshape(list(size))
    return finite_cast(x, dtype) if scale is None else unstandardised(x, shift, scale, dtype)


def _levels_between(level: Tensor, low: Tensor, high: Tensor, top: Tensor) -> Tensor:
    """`low + level * (high - low) / top`, finite; a power of two keeps it in range, and rounds nothing."""
    half = half_range(low, high)[1]
    wide = (half > WIDE_HALF_RANGE).float()
    shrink, grow = 1 - 0.75 * wide, 1 + 3 * wide
    x = (level * (half * shrink * (2.0 / top)) + low * shrink) * grow
    return x.clamp(-LARGEST, LARGEST)


def finite_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts float32; to the largest number of `dtype` where that would overflow."""
    most = torch.finfo(dtype).max
    return torch.where(x.isinf(), x, x.clamp(-most, most)).to(dtype)


def columns(shift: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The shift and the scale that are applied: none to columns where they can't be undone."""
    shift = torch.zeros_like(scale) if shift is None else shift
    sound = shift.isfinite() & scale.isfinite() & (scale.abs() >= SMALLEST_NORMAL)
    return torch.where(sound, shift, 0.0), torch.where(sound, scale, 1.0)


def standardised(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """`(x - shift) * scale` in float32, or `x`."""
    if scale is None:
        return x
    shift, scale = columns(shift, scale)
    return (x.float() - shift) * scale


def unstandardised(x: Tensor, shift: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`x / scale + shift` of float32 `x`."""
    shift, scale = columns(shift, scale)
    y = x * scale.reciprocal() + shift
    return finite_cast(y, dtype) if dtype == torch.float16 else y.to(dtype)


# ---- without a compiler --------------------------------------------------------------------------------------------


def quantize_in_runs(
    x: Tensor, seed: Tensor, salt: int, fmt: BlockFormat, shift: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_reference`, run by run of groups, so that its temporaries stay small."""
    flat = standardised(x, shift, scale).reshape(-1)
    encoded = empty_encoding(x, fmt)
    for group, part in _runs(fmt, flat.numel()):
        run = quantize_reference(flat[part], seed, salt, fmt, first_group=group)
        for whole, piece in zip(encoded, run, strict=True):
            whole[group : group + len(piece)] = piece
    return encoded


def dequantize_in_runs(
    words: Tensor,
    low: Tensor,
    high: Tensor,
    size: Sequence[int],
    dtype: torch.dtype,
    fmt: BlockFormat,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """`dequantize_reference`, run by run of groups."""
    wanted = dtype if scale is None else torch.float32
    x = torch.empty(list(size), dtype=wanted, device=words.device)
    flat = x.view(-1)
    for group, part in _runs(fmt, flat.numel()):
        piece = flat[part]
        end = group + fmt.groups(piece.numel())
        some = words[group:end], low[group:end], high[group:end]
        piece.copy_(dequantize_reference(*some, [piece.numel()], wanted, fmt))
    return x if scale is None else unstandardised(x, shift, scale, dtype)


def _runs(fmt: BlockFormat, numel: int) -> Iterator[tuple[int, slice]]:
    """Runs of whole groups: the first group of each, and its elements."""
    groups = max(1, RUN // fmt.group)
    for group in range(0, fmt.groups(numel), groups):
        yield group, slice(group * fmt.group, (group + groups) * fmt.group)


def empty_encoding(x, fmt):
    """Words, low and high of a tensor like `x`, not written to."""
    groups = fmt.groups(x.numel())
    low, high = (x.new_empty(groups, fmt.blocks_per_group, dtype=fmt.metadata) for _ in range(2))
    return x.new_empty(groups, fmt.words, dtype=torch.float32), low, high


# ---- ops -----------------------------------------------------------------------------------------------------------


@op("quantize")
def quantize(
    x: Tensor,
    seed: Tensor,
    salt: int,
    bits: int,
    block: int,
    levels: str,
    metadata: torch.dtype,
    words: int,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Encodes `x`, or `(x - shift) * scale`.

    Args:
        x: any shape and strides, float32, bfloat16 or float16.
        seed: int32 of shape (activations, 2), on the device of `x`, drawn by `draw_seed` once per forward call.
        salt: this activation's row in `seed`: no two activations share random bits.
        bits, block, levels, metadata, words: the fields of `BlockFormat`.
        shift, scale: float32, one number for each column, which is an element of the last dimension of `x`; a scale
            alone stands for no shift. Columns where they are not finite, or the scale is zero, are left as they are.

    Returns:
        words: float32 (groups, words), whose 32 bits are the packed codes; float, because Inductor's C++ loads and
            stores vectors of floats in one instruction and vectors of int32 through the stack.
        low, high: (groups, blocks per group) in the metadata's dtype.
    """
    return quantize_in_runs(x, seed, salt, BlockFormat(bits, block, levels, metadata, words), shift, scale)


@quantize.register_fake
def _(x, seed, salt, bits, block, levels, metadata, words, shift=None, scale=None):
    return empty_encoding(x, BlockFormat(bits, block, levels, metadata, words))


@op("dequantize")
def dequantize(
    words: Tensor,
    low: Tensor,
    high: Tensor,
    size: Sequence[int],
    dtype: torch.dtype,
    bits: int,
    block: int,
    levels: str,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Decodes what `quantize` returned into a contiguous tensor of shape `size` and dtype `dtype`.

    With `shift` and `scale` it returns `x / scale + shift`.
    """
    fmt = BlockFormat(bits, block, levels, low.dtype, words.shape[1])
    return dequantize_in_runs(words, low, high, size, dtype, fmt, shift, scale)


@dequantize.register_fake
def _(words, low, high, size, dtype, bits, block, levels, shift=None, scale=None):
    return words.new_empty(size, dtype=dtype)
