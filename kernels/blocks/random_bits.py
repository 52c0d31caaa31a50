"""Random bits as a pure function of (seed, word index): a murmur3-style hash, the same on every device.

A 32-bit word of `planes` codes needs one random byte per code. `random_words` hashes the word's index once and steps
the result with a linear congruential generator and a xor-shift for every further four bytes. All arithmetic is on
int32 and wraps around, which torch, Inductor's C++ and Triton do alike; the index wraps after 2**32 words.

Every forward call draws one tensor of seeds, a row of 64 bits for each activation that it quantises. The rows are
independent: hashing one seed with the activation's number instead left correlations between activations. Dropout, where
it is hashed (`random_mask`), has a tensor of seeds of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from ..op import op

MIX_1 = 0x85EBCA6B
MIX_2 = 0xC2B2AE35
LCG_MULTIPLIER = 1664525
LCG_INCREMENT = 1013904223

_own_generators: ContextVar[tuple[int, dict[torch.device, torch.Generator]] | None] = ContextVar(
    "actcompile_own_generators", default=None
)


@contextmanager
def rounding_seeded(seed: int) -> Iterator[None]:
    """Inside, seeds come from generators of their own, started with `seed`, one for each device.

    So a model draws the same dropout however many activations are rounded, and steps that differ in `seed` alone differ
    by rounding alone.
    """
    token = _own_generators.set((seed, {}))
    try:
        yield
    finally:
        _own_generators.reset(token)


def signed32(value: int) -> int:
    """The int32 with the same low 32 bits as `value`."""
    return (value + 2**31) % 2**32 - 2**31


def _shift_right(h: Tensor, bits: int) -> Tensor:
    return (h >> bits) & ((1 << (32 - bits)) - 1)  # int32's own shift would drag the sign bit along


def hash_words(index: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """One int32 of random bits for each int32 of `index`, from both words of a seed."""
    h = index + first
    h = (h ^ _shift_right(h, 16)) * signed32(MIX_1)
    h = h ^ second
    h = (h ^ _shift_right(h, 13)) * signed32(MIX_2)
    return h ^ _shift_right(h, 16)


def random_words(index: Tensor, seed: Tensor, salt: int, count: int) -> Iterator[Tensor]:
    """Yields `count` int32 tensors of random bits shaped like `index`; byte `i` of word `g` serves plane `4 * g + i`.

    Args:
        index: int32, the position of each packed word in the encoded tensor.
        seed: int32 of shape (activations, 2), drawn once per forward call by `draw_seed`.
        salt: the activation's row in `seed`.
    """
    h = hash_words(index, seed[salt, 0], seed[salt, 1])
    yield h
    for _ in range(count - 1):
        h = h * LCG_MULTIPLIER + LCG_INCREMENT
        h = h ^ _shift_right(h, 16)
        yield h


@op("draw_seed", (torch.Tag.nondeterministic_seeded,))
def draw_seed(count: int, device: torch.device, rounding: bool = True) -> Tensor:
    """Draws seeds of one forward call from the default generator of `device`, without a sync.

    Args:
        rounding: what they are for: the rounding of activations, or the model's own dropout, which `rounding_seeded`
            leaves alone.

    Returns:
        int32 of shape (count, 2): one row for each activation that the call quantises, or for each dropout.
    """
    own, generator = _own_generators.get() if rounding else None, None
    if own is not None:
        seed, generators = own
        generator = generators.get(device)
        if generator is None:
            generator = generators[device] = torch.Generator(device).manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count, 2), dtype=torch.int32, device=device, generator=generator)


@draw_seed.register_fake
def _(count: int, device: torch.device, rounding: bool = True) -> Tensor:
    return torch.empty(count, 2, dtype=torch.int32, device=device)
