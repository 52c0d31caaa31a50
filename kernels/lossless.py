"""Lossless forms: booleans as single bits (`pack_bits`, `unpack_bits`), integers in fewer bytes (`narrow`, `widen`).
And a view of a larger tensor as a tensor of its own (`copy`).

Bits are planar like `BlockFormat`'s codes: a group of `32 * words` booleans becomes `words` 32-bit words, and bit `k`
of word `j` is boolean `k * words + j` of its group. Words are float32 tensors that carry bits, for the reason that
`quantize` gives. Unused bits of the last group are zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .format import bit_words


def pack_bits_reference(mask: Tensor, words: int) -> Tensor:
    """The specification of `pack_bits`."""
    flat = mask.reshape(-1)
    groups, _ = bit_words(flat.numel(), words)
    i = torch.arange(flat.numel(), device=mask.device)
    within = i % (32 * words)
    packed = torch.zeros(groups * words, dtype=torch.int32, device=mask.device)
    packed.index_add_(0, i // (32 * words) * words + within % words, flat.to(torch.int32) << (within // words).int())
    return packed.view(groups, words).view(torch.float32)


def unpack_bits_reference(packed: Tensor, size: Sequence[int]) -> Tensor:
    """The specification of `unpack_bits`."""
    numel = 1
    for s in size:
        numel *= s
    words = packed.shape[1]
    i = torch.arange(numel, device=packed.device)
    within = i % (32 * words)
    word = packed.view(torch.int32).reshape(-1)[i // (32 * words) * words + within % words]
    return ((word >> (within // words)) & 1).bool().reshape(list(size))


def pack_bits_aten(mask: Tensor, words: int, tail: bool = True) -> Tensor:
    """`pack_bits_reference` as whole-plane operations; `tail=False` promises that `mask` fills its groups exactly."""
    flat = mask.reshape(-1)
    if not tail:
        return _pack(flat.view(-1, 32 * words))
    full = flat.numel() // (32 * words)
    rest = flat.numel() - full * (32 * words)
    last = torch.nn.functional.pad(flat.narrow(0, full * (32 * words), rest).to(torch.int32), (0, 32 * words - rest))
    parts = _pack(flat.narrow(0, 0, full * (32 * words)).view(-1, 32 * words)), _pack(last.view(1, -1))
    return torch.cat(parts).narrow(0, 0, bit_words(flat.numel(), words)[0])


def _pack(mask: Tensor) -> Tensor:
    width = mask.shape[1] // 32
    bits = mask.to(torch.int32)
    words = bits[:, :width]
    for k in range(1, 32):
        words = words | (bits[:, k * width : (k + 1) * width] << k)
    return words.view(torch.float32)


def unpack_bits_aten(packed: Tensor, size: Sequence[int], tail: bool = True) -> Tensor:
    """`unpack_bits_reference` as one broadcast shift."""
    shift = torch.arange(32, dtype=torch.int32, device=packed.device)
    bits = ((packed.view(torch.int32)[:, None, :] >> shift[None, :, None]) & 1) != 0
    if not tail:
        return bits.reshape(list(size))
    numel = 1
    for s in size:
        numel = numel * s
    return bits.reshape(-1).narrow(0, 0, numel).view(list(size))


@torch.library.custom_op("actcompile::pack_bits", mutates_args=())
def pack_bits(mask: Tensor, words: int) -> Tensor:
    """Packs a bool tensor of any shape to float32 words (groups, words), 32 booleans to a word."""
    return pack_bits_aten(mask, words, tail=mask.numel() % (32 * words) != 0)


@pack_bits.register_fake
def _(mask, words):
    return mask.new_empty(bit_words(mask.numel(), words), dtype=torch.float32)


@torch.library.custom_op("actcompile::unpack_bits", mutates_args=())
def unpack_bits(packed: Tensor, size: Sequence[int]) -> Tensor:
    """Unpacks to a contiguous bool tensor of shape `size`."""
    numel = 1
    for s in size:
        numel *= s
    return unpack_bits_aten(packed, size, tail=numel % (32 * packed.shape[1]) != 0)


@unpack_bits.register_fake
def _(packed, size):
    return packed.new_empty(size, dtype=torch.bool)


@torch.library.custom_op("actcompile::narrow", mutates_args=())
def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts integers, known to fit, to the smaller integer `dtype`."""
    return x.to(dtype, copy=True)


@narrow.register_fake
def _(x, dtype):
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("actcompile::widen", mutates_args=())
def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts what `narrow` returned back to the integer `dtype`."""
    return x.to(dtype, copy=True)


@widen.register_fake
def _(x, dtype):
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("actcompile::copy", mutates_args=())
def copy(x: Tensor) -> Tensor:
    """Copies a view of any strides to contiguous memory of its own.

    `aten.clone` says the same, but Inductor takes one between tensors of equal strides for superfluous, and keeps the
    memory that the view is of.
    """
    return x.clone(memory_format=torch.contiguous_format)


@copy.register_fake
def _(x):
    return x.new_empty(x.shape)
