"""Random bits as a pure function of (seed, salt, word index): a murmur3-style hash, the same on every device.

A 32-bit word of `planes` codes needs one random byte per code. `random_words` hashes the word's index once and steps the
result with a linear congruential generator and a xor-shift for every further four bytes. All arithmetic is on int32 and
wraps around, which torch, Inductor's C++ and Triton do alike; the index wraps after 2**32 words.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9
MIX_1 = 0x85EBCA6B
MIX_2 = 0xC2B2AE35
LCG_MULTIPLIER = 1664525
LCG_INCREMENT = 1013904223


def signed32(value: int) -> int:
    """The int32 with the same low 32 bits as `value`."""
    return (value + 2**31) % 2**32 - 2**31


def salt_constant(salt: int) -> int:
    """Spreads a small salt (the activation's number) over 32 bits; a bijection, so that no two salts coincide."""
    return signed32(salt * GOLDEN + MIX_2)


def _shift_right(h: Tensor, bits: int) -> Tensor:
    return (h >> bits) & ((1 << (32 - bits)) - 1)  # int32's own shift would drag the sign bit along


def random_words(index: Tensor, seed: Tensor, salt: int, count: int) -> Iterator[Tensor]:
    """Yields `count` int32 tensors of random bits shaped like `index`; byte `i` of word `g` serves plane `4 * g + i`.

    Args:
        index: int32, the position of each packed word in the encoded tensor.
        seed: int32 of shape (2,), drawn once per forward call.
        salt: the activation's number within its graph.
    """
    h = index + seed[0]
    h = (h ^ _shift_right(h, 16)) * signed32(MIX_1)
    h = h ^ (seed[1] ^ salt_constant(salt))
    h = (h ^ _shift_right(h, 13)) * signed32(MIX_2)
    h = h ^ _shift_right(h, 16)
    yield h
    for _ in range(count - 1):
        h = h * LCG_MULTIPLIER + LCG_INCREMENT
        h = h ^ _shift_right(h, 16)
        yield h


@torch.library.custom_op("actcompile::draw_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_seed(device: torch.device) -> Tensor:
    """Draws the seed of one forward call, int32 of shape (2,), from the default generator of `device`, without a sync."""
    return torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=device)


@draw_seed.register_fake
def _(device: torch.device) -> Tensor:
    return torch.empty(2, dtype=torch.int32, device=device)
