"""Lossless forms: booleans as single bits (`pack_bits`, `unpack_bits`), integers in fewer bytes (`narrow`, `widen`).
And a view of a larger tensor as a tensor of its own (`copy`).

Bits are planar like `BlockFormat`'s codes: a group of `32 * words` booleans becomes `words` 32-bit words, and bit `k`
of word `j` is boolean `k * words + j` of its group. Words are float32 tensors that carry bits, for the reason that
`quantize` gives. Unused bits of the last group are zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks.format import bit_words
from ..op import op

RUN = 1 << 20  # booleans whose temporaries stay in a CPU's cache


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


def pack_bits_in_runs(mask: Tensor, words: int) -> Tensor:
    """`pack_bits_reference`, run by run of groups, so that its temporaries stay small."""
    flat = mask.reshape(-1)
    packed = mask.new_empty(bit_words(flat.numel(), words), dtype=torch.float32)
    groups = max(1, RUN // (32 * words))
    for group in range(0, len(packed), groups):
        part = flat[group * 32 * words : (group + groups) * 32 * words]
        packed[group : group + groups] = pack_bits_reference(part, words)
    return packed


def unpack_bits_in_runs(packed: Tensor, size: Sequence[int]) -> Tensor:
    """`unpack_bits_reference`, run by run of groups."""
    mask = torch.empty(list(size), dtype=torch.bool, device=packed.device)
    flat, group = mask.view(-1), 32 * packed.shape[1]
    groups = max(1, RUN // max(group, 1))
    for first in range(0, len(packed), groups):
        part = flat[first * group : (first + groups) * group]
        part.copy_(unpack_bits_reference(packed[first : first + groups], [part.numel()]))
    return mask


@op("pack_bits")
def pack_bits(mask: Tensor, words: int) -> Tensor:
    """Packs booleans, or bytes that are 0 or 1, of any shape to float32 words (groups, words), 32 to a word."""
    return pack_bits_in_runs(mask, words)


@pack_bits.register_fake
def _(mask, words):
    return mask.new_empty(bit_words(mask.numel(), words), dtype=torch.float32)


@op("unpack_bits")
def unpack_bits(packed: Tensor, size: Sequence[int], dtype: torch.dtype = torch.bool) -> Tensor:
    """Unpacks to a contiguous tensor of shape `size`, of booleans, or of bytes (torch.uint8)."""
    return unpack_bits_in_runs(packed, size).view(dtype)


@unpack_bits.register_fake
def _(packed, size, dtype=torch.bool):
    return packed.new_empty(size, dtype=dtype)


@op("mask_to_bytes")
def mask_to_bytes(mask: Tensor) -> Tensor:
    """Booleans as uint8, 0 or 1.

    Inductor's C++ writes and reads tensors of booleans many times slower than tensors of bytes. So a mask that is
    packed, or was unpacked, goes through memory as bytes.
    """
    return mask.to(torch.uint8)


@mask_to_bytes.register_fake
def _(mask):
    return torch.empty_like(mask, dtype=torch.uint8)


@op("bytes_to_mask")
def bytes_to_mask(byte: Tensor) -> Tensor:
    """The inverse of `mask_to_bytes`."""
    return byte.to(torch.bool)


@bytes_to_mask.register_fake
def _(byte):
    return torch.empty_like(byte, dtype=torch.bool)


@op("narrow")
def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts integers, known to fit, to a smaller integer `dtype`; or floats to a shorter float one, to nearest."""
    return x.to(dtype, copy=True)


@narrow.register_fake
def _(x, dtype):
    return torch.empty_like(x, dtype=dtype)


@op("widen")
def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts what `narrow` returned back to `dtype`."""
    return x.to(dtype, copy=True)


@widen.register_fake
def _(x, dtype):
    return torch.empty_like(x, dtype=dtype)


@op("copy")
def copy(x: Tensor) -> Tensor:
    """Copies a view of any strides to contiguous memory of its own.

    `aten.clone` says the same, but Inductor takes one between tensors of equal strides for superfluous, and keeps the
    memory that the view is of.
    """
    return x.clone(memory_format=torch.contiguous_format)


@copy.register_fake
def _(x):
    return x.new_empty(x.shape)
