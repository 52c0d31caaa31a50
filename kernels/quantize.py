"""Block-wise quantisation with stochastic rounding: `actcompile::quantize` and `actcompile::dequantize`.

An element `x` of a block with minimum `low` and maximum `high` has the code-axis position
`t = (x - low) / (high - low) * (2**bits - 1)`, bent by the format's levels; it is rounded to one of its two neighbours
with a probability that keeps the mean, and comes back as `low + level(code) * scale` (EXACT, eq. 2; i-EXACT,
eq. 3 to 5).

Here stand the reference, which is the specification; the form in plain aten ops that Inductor's C++ runs at memory
speed (`quantize_aten`, `dequantize_aten`), which agrees with it bit for bit; and the ops' schemas and fakes. What
both do:

- `low` and `high` are rounded outward to the metadata's dtype before they are used, so nothing is clamped;
- differences are taken of halves, so a block may span more than the largest float32;
- the position has eight fractional bits; a half is added before they are cut, a random byte before the code is cut;
- words of a block with NaN or infinity are zero; its metadata make every decoded element of it non-finite;
- unused fields of the last group are zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .format import BlockFormat
from .levels import apply_map, decode_map, encode_map
from .random_bits import random_words

SMALLEST_HALF_RANGE = 2.0**-100  # keeps 1 / range finite; a constant block still decodes exactly, all its codes being 0
WIDE_HALF_RANGE = 2.0**125


def round_outward(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounds float32 minima down and maxima up to values that `dtype` holds; returns float32. NaN and Inf stay."""
    if dtype == torch.float32:
        return low, high
    return _truncate(low, low < 0), _truncate(high, high > 0)


def _truncate(x: Tensor, away: Tensor) -> Tensor:
    """Cuts float32 to bfloat16's bits, away from zero where `away`."""
    bits = x.view(torch.int32)
    bits = torch.where(away & (x.abs() < float("inf")), bits + 0xFFFF, bits)
    return torch.where(x != x, x, (bits & -65536).view(torch.float32))


def half_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the minimum, and half of the range, the latter bounded below so that its inverse is finite."""
    half_low = low * 0.5
    return half_low, (high * 0.5 - half_low).clamp_min(SMALLEST_HALF_RANGE)


def decode_scale(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step, minimum and factor of every block, `x = (level * step + minimum) * factor`.

    The factor is 4 where `level * step` alone could overflow, 1 elsewhere; a power of two, it rounds nothing.
    """
    _, half = half_range(low, high)
    wide = half > WIDE_HALF_RANGE
    shrink = torch.where(wide, 0.25, 1.0)
    return half * shrink * (2.0 / top), low * shrink, torch.where(wide, 4.0, 1.0)


# ---- reference -----------------------------------------------------------------------------------------------------


def slots(numel: int, fmt: BlockFormat, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For every element of a flat tensor: its block, its word and its plane (all int64)."""
    i = torch.arange(numel, device=device)
    within = i % fmt.group
    word = i // fmt.group * fmt.words + within % fmt.words
    block = i // fmt.group * fmt.blocks_per_group + within // fmt.block
    return block, word, within // fmt.words


def quantize_reference(x: Tensor, seed: Tensor, salt: int, fmt: BlockFormat) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `quantize`, one element at a time: positions, random bytes, codes, words."""
    flat = x.reshape(-1).float()
    groups = fmt.groups(flat.numel())
    block, word, plane = slots(flat.numel(), fmt, x.device)
    empty = torch.zeros(groups * fmt.blocks_per_group, device=x.device)
    low = empty.scatter_reduce(0, block, flat, "amin", include_self=False)
    high = empty.scatter_reduce(0, block, flat, "amax", include_self=False)
    low, high = round_outward(low, high, fmt.metadata)
    half_low, half = half_range(low, high)
    inverse = (fmt.top * 256.0) / half
    position = apply_map((flat * 0.5 - half_low[block]) * inverse[block], encode_map(fmt))

    index = torch.arange(groups * fmt.words, device=x.device)
    index = ((index + 2**31) % 2**32 - 2**31).to(torch.int32)
    noise = torch.stack(list(random_words(index, seed, salt, -(-fmt.planes // 4))))
    byte = (noise[plane // 4, word] >> (8 * (plane % 4))) & 0xFF
    code = ((position + 0.5).to(torch.int32) + byte) >> 8
    code = torch.where(half[block] < float("inf"), code, 0)
    words = torch.zeros(groups * fmt.words, dtype=torch.int32, device=x.device)
    words.index_add_(0, word, (code << (fmt.bits * plane)).to(torch.int32))  # fields are disjoint: a sum is an or
    shape = (groups, fmt.blocks_per_group)
    low, high = low.to(fmt.metadata).view(shape), high.to(fmt.metadata).view(shape)
    return words.view(groups, fmt.words).view(torch.float32), low, high


def dequantize_reference(
    words: Tensor, low: Tensor, high: Tensor, size: Sequence[int], dtype: torch.dtype, fmt: BlockFormat
) -> Tensor:
    """The specification of `dequantize`."""
    numel = 1
    for s in size:
        numel *= s
    block, word, plane = slots(numel, fmt, words.device)
    code = (words.view(torch.int32).reshape(-1)[word] >> (fmt.bits * plane)) & fmt.top
    low, high = low.float().reshape(-1), high.float().reshape(-1)
    step, minimum, factor = decode_scale(low, high, fmt.top)
    level = apply_map(code.float(), decode_map(fmt))
    return ((level * step[block] + minimum[block]) * factor[block]).to(dtype).reshape(list(size))


# ---- plain aten ops, for Inductor's C++ ----------------------------------------------------------------------------


def quantize_aten(
    x: Tensor, seed: Tensor, salt: int, fmt: BlockFormat, tail: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_reference` as whole-plane operations; `tail=False` promises that `x` fills its groups exactly."""
    flat = x.reshape(-1)
    full = flat.numel() // fmt.group
    if not tail:
        return _encode(flat.view(-1, fmt.group).float(), None, 0, seed, salt, fmt)
    rest = flat.numel() - full * fmt.group
    main = flat.narrow(0, 0, full * fmt.group).view(-1, fmt.group).float()
    last = torch.nn.functional.pad(flat.narrow(0, full * fmt.group, rest), (0, fmt.group - rest)).view(1, fmt.group)
    used = torch.arange(fmt.group, device=x.device)[None, :] < rest
    parts = _encode(main, None, 0, seed, salt, fmt), _encode(last.float(), used, full, seed, salt, fmt)
    groups = fmt.groups(flat.numel())
    words, low, high = (torch.cat(pair).narrow(0, 0, groups) for pair in zip(*parts, strict=True))
    return words, low, high


def _encode(
    x: Tensor, used: Tensor | None, first_group, seed: Tensor, salt: int, fmt: BlockFormat
) -> tuple[Tensor, Tensor, Tensor]:
    """Encodes whole groups `x` (groups, group), float32; elements where `used` is false are absent."""
    blocks, width = fmt.blocks_per_group, fmt.words
    by_block = x.view(-1, blocks, fmt.block)
    if used is None:
        low, high = by_block.amin(2), by_block.amax(2)
    else:
        mask = used.view(1, blocks, fmt.block)
        low = torch.where(mask, by_block, float("inf")).amin(2)
        high = torch.where(mask, by_block, -float("inf")).amax(2)
        low, high = torch.where(mask[:, :, 0], low, 0.0), torch.where(mask[:, :, 0], high, 0.0)
    low, high = round_outward(low, high, fmt.metadata)
    half_low, half = half_range(low, high)
    inverse = (fmt.top * 256.0) / half
    finite = half < float("inf")

    group = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)[:, None] + first_group
    index = group * width + torch.arange(width, dtype=torch.int32, device=x.device)[None, :]
    noise = list(random_words(index.to(torch.int32), seed, salt, -(-fmt.planes // 4)))
    words = None
    for k in range(fmt.planes):
        plane = x[:, k * width : (k + 1) * width]
        if plane.shape[1] == 0:
            break
        b = k * width // fmt.block
        position = (plane * 0.5 - half_low[:, b : b + 1]) * inverse[:, b : b + 1]
        position = apply_map(position, encode_map(fmt))
        byte = (noise[k // 4] >> (8 * (k % 4))) & 0xFF
        if plane.shape[1] < width:
            byte = byte[:, : plane.shape[1]]
        code = ((position + 0.5).to(torch.int32) + byte) >> 8
        if used is not None:
            code = torch.where(used[:, k * width : (k + 1) * width], code, 0)
        if plane.shape[1] < width:
            code = torch.nn.functional.pad(code, (0, width - plane.shape[1]))
        if blocks > 1:
            code = torch.where(finite[:, b : b + 1], code, 0)
        code = code << (fmt.bits * k) if k else code
        words = code if words is None else words | code
    assert words is not None
    if blocks == 1:
        words = torch.where(finite, words, 0)
    return words.view(torch.float32), low.to(fmt.metadata), high.to(fmt.metadata)


def dequantize_aten(
    words: Tensor,
    low: Tensor,
    high: Tensor,
    size: Sequence[int],
    dtype: torch.dtype,
    fmt: BlockFormat,
    tail: bool = True,
) -> Tensor:
    """`dequantize_reference` as one broadcast shift; `tail=False` promises that the tensor fills its groups exactly."""
    shift = torch.arange(fmt.planes, dtype=torch.int32, device=words.device) * fmt.bits
    code = (words.view(torch.int32)[:, None, :] >> shift[None, :, None]) & fmt.top
    level = apply_map(code.to(torch.float32), decode_map(fmt))
    step, minimum, factor = (part[:, :, None] for part in decode_scale(low.float(), high.float(), fmt.top))
    if fmt.blocks_per_group > 1:
        level = level.view(-1, fmt.blocks_per_group, fmt.block)
    x = (level * step + minimum) * factor
    if fmt.planes * fmt.words > fmt.group:
        x = x.reshape(-1, fmt.planes * fmt.words)[:, : fmt.group]
    x = x.to(dtype)
    if not tail:
        return x.reshape(list(size))
    numel = 1
    for s in size:
        numel = numel * s
    return x.reshape(-1).narrow(0, 0, numel).view(list(size))


# ---- ops -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("actcompile::quantize", mutates_args=())
def quantize(
    x: Tensor, seed: Tensor, salt: int, bits: int, block: int, levels: str, metadata: torch.dtype, words: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Encodes `x`.

    Args:
        x: any shape and strides, float32, bfloat16 or float16.
        seed: int32 of shape (activations, 2), on the device of `x`, drawn by `draw_seed` once per forward call.
        salt: this activation's row in `seed`: no two activations share random bits.
        bits, block, levels, metadata, words: the fields of `BlockFormat`.

    Returns:
        words: float32 (groups, words), whose 32 bits are the packed codes; float, because Inductor's C++ loads and
            stores vectors of floats in one instruction and vectors of int32 through the stack.
        low, high: (groups, blocks per group) in the metadata's dtype.
    """
    fmt = BlockFormat(bits, block, levels, metadata, words)
    return quantize_aten(x, seed, salt, fmt, tail=x.numel() % fmt.group != 0)


@quantize.register_fake
def _(x, seed, salt, bits, block, levels, metadata, words):
    fmt = BlockFormat(bits, block, levels, metadata, words)
    groups = fmt.groups(x.numel())
    meta = x.new_empty(groups, fmt.blocks_per_group, dtype=metadata)
    return x.new_empty(groups, fmt.words, dtype=torch.float32), meta, torch.empty_like(meta)


@torch.library.custom_op("actcompile::dequantize", mutates_args=())
def dequantize(
    words: Tensor,
    low: Tensor,
    high: Tensor,
    size: Sequence[int],
    dtype: torch.dtype,
    bits: int,
    block: int,
    levels: str,
) -> Tensor:
    """Decodes what `quantize` returned into a contiguous tensor of shape `size` and dtype `dtype`."""
    fmt = BlockFormat(bits, block, levels, low.dtype, words.shape[1])
    numel = 1
    for s in size:
        numel *= s
    return dequantize_aten(words, low, high, size, dtype, fmt, tail=numel % fmt.group != 0)


@dequantize.register_fake
def _(words, low, high, size, dtype, bits, block, levels):
    return words.new_empty(size, dtype=dtype)
