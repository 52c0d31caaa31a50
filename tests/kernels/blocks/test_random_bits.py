"""The random bits: equal to unsigned arithmetic, reproducible, uniform, and uncorrelated in every direction.

The statistical tests run on fixed seeds, so that a run is like any other. Had they new seeds every time, each of the
directions below would raise a false alarm in fewer than one of a million runs (ALARM).
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, norm

from actcompile.kernels import draw_seed
from actcompile.kernels.blocks.random_bits import random_words, signed32

ALARM = 1e-6
WORDS = 1 << 16


def words(seed=(12345, -678), count=8, start=0, n=WORDS):
    index = torch.arange(start, start + n, dtype=torch.int64).to(torch.int32)
    return torch.stack(list(random_words(index, torch.tensor([seed], dtype=torch.int32), 0, count)))


def as_bytes(x):
    """uint8 (..., 4), the byte of plane `4 * g + i` at `[g, ..., i]`."""
    return torch.stack([(x >> (8 * i)) & 0xFF for i in range(4)], dim=-1)


def unsigned(index: int, seed: tuple[int, int], count: int) -> list[int]:
    """The same hash in Python's integers."""
    mask = 2**32 - 1
    h = (index + seed[0]) & mask
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & mask
    h ^= seed[1] & mask
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
    h ^= h >> 16
    found = [h]
    for _ in range(count - 1):
        h = (h * 1664525 + 1013904223) & mask
        h ^= h >> 16
        found.append(h)
    return found


int32 = st.one_of(st.integers(-(2**31), 2**31 - 1), st.sampled_from((-(2**31), 2**31 - 1, -1, 0)))


@given(st.lists(int32, min_size=1, max_size=5), st.lists(st.tuples(int32, int32), min_size=1), st.data())
def test_int32_wraps_like_unsigned_arithmetic(indices, seeds, data):
    count = data.draw(st.integers(1, 8))
    index = torch.tensor(indices, dtype=torch.int32)
    row = data.draw(st.integers(0, len(seeds) - 1))
    found = list(random_words(index, torch.tensor(seeds, dtype=torch.int32), row, count))
    assert all(part.dtype == torch.int32 for part in found)
    for position, i in enumerate(indices):
        assert [int(part[position]) & (2**32 - 1) for part in found] == unsigned(i, seeds[row], count)


@given(st.integers(-(2**40), 2**40))
def test_signed32_keeps_the_low_bits(value):
    assert -(2**31) <= signed32(value) < 2**31
    assert (signed32(value) - value) % 2**32 == 0
    assert np.array(value % 2**32, dtype=np.uint32).view(np.int32) == signed32(value)


def test_bits_do_not_depend_on_what_else_is_computed():
    together = words(n=1000)
    assert torch.equal(together[:, 300:400], words(start=300, n=100))
    assert torch.equal(together[:3], words(n=1000, count=3))
    assert torch.equal(together, words(n=1000))


def test_the_index_wraps_after_two_to_the_32_words():
    assert torch.equal(words(start=2**31 - 50, n=100)[:, 50:], words(start=-(2**31), n=50))


def test_the_first_word_is_a_bijection_of_the_index():
    assert words(count=1)[0].unique().numel() == WORDS


CPU = torch.device("cpu")


def test_manual_seed_reproduces_the_seeds():
    torch.manual_seed(3)
    first, second = draw_seed(5, CPU), draw_seed(5, CPU)
    torch.manual_seed(3)
    assert torch.equal(draw_seed(5, CPU), first)
    assert torch.equal(draw_seed(5, CPU), second)
    torch.manual_seed(4)
    assert not torch.equal(draw_seed(5, CPU), first)
    assert first.dtype == torch.int32 and first.shape == (5, 2)
    assert torch.cat([first, second]).unique().numel() == 20


def test_seeds_fill_all_32_bits():
    torch.manual_seed(0)
    ones = (draw_seed(400, CPU).view(-1, 1) >> torch.arange(32, dtype=torch.int32)) & 1
    z = (ones.sum(0) - 400) / (0.25 * 800) ** 0.5
    assert z.abs().max() < norm.isf(ALARM / 2 / 32)


@pytest.mark.parametrize("count", (0, 1, 3))
def test_draw_seed_passes_opcheck(count):
    """Not all of opcheck: the rest compares two calls, which draw two seeds."""
    torch.library.opcheck(draw_seed.overload, (count, CPU), test_utils=("test_schema", "test_faketensor"))


SEEDS = [(12345, -678), (0, 0), (-1, 1), (2**31 - 1, -(2**31))]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_byte_of_every_plane_is_uniform(seed):
    found = as_bytes(words(seed))
    for step in range(8):
        for i in range(4):
            counts = torch.bincount(found[step, :, i], minlength=256).double()
            statistic = float(((counts - WORDS / 256) ** 2 / (WORDS / 256)).sum())
            # both tails: too even would be as wrong as too uneven; 32 tests for each of 4 seeds
            assert chi2.ppf(ALARM / 256, 255) < statistic < chi2.isf(ALARM / 256, 255), (step, i)


def signs(x):
    """float32 (32, n) of -1 and 1, the bits of `n` words."""
    return (((x >> torch.arange(32, dtype=torch.int32)[:, None]) & 1) * 2 - 1).float()


def pairs():
    """(name, a, b) for every direction in which two words must be independent."""
    base = words()
    for lag in (1, 2, 7, 8, 16, 64, 256, 4096):
        yield f"words {lag} apart", base[0, :-lag], base[0, lag:]
        yield f"last steps, words {lag} apart", base[7, :-lag], base[7, lag:]
    for first in range(8):
        for second in range(first + 1, 8):
            yield f"steps {first} and {second}", base[first], base[second]
    torch.manual_seed(0)
    for row, seed in enumerate(draw_seed(10, CPU).tolist()):
        other = words(tuple(seed))
        for step in (0, 7):
            yield f"another activation's row {row}, step {step}", base[step], other[step]
    yield "neighbouring words and steps", base[0, 1:], base[1, :-1]


def test_bits_are_uncorrelated_in_every_direction():
    """Every bit of one word with every bit of the other: 1024 correlations for each of the cases."""
    cases = list(pairs())
    limit = norm.isf(ALARM / 2 / 1024 / len(cases))
    z = {name: float((signs(a) @ signs(b).t()).abs().max()) / len(a) ** 0.5 for name, a, b in cases}
    failed = {name: value for name, value in z.items() if value > limit}
    assert not failed, f"z above {limit:.2f}: {failed}"


def test_pairs_of_bytes_are_jointly_uniform():
    """Beyond linear correlation: the high nibbles of any two bytes fall evenly on 256 cells."""
    cases = list(pairs())
    limit = chi2.isf(ALARM / 16 / len(cases), 255)
    failed = {}
    for name, a, b in cases:
        for i, j in itertools.product(range(4), repeat=2):
            cell = (((a >> (8 * i + 4)) & 15) * 16) | ((b >> (8 * j + 4)) & 15)
            counts = np.bincount(cell.numpy(), minlength=256)
            statistic = float(np.sum((counts - len(a) / 256) ** 2) / (len(a) / 256))
            if statistic > limit:
                failed[name, i, j] = statistic
    assert not failed, f"above {limit:.0f}: {failed}"
