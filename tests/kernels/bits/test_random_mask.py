"""Random masks: equal to their specification, as frequent as they should be, and uncorrelated in every direction.

The statistical tests run on fixed seeds. On new ones each would raise a false alarm in one of a million runs (ALARM).
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch._inductor import config as inductor_config

import actcompile.backend  # noqa: F401  registers the lowering
from actcompile.kernels import random_mask
from actcompile.kernels.bits.random_mask import RUN, random_mask_at, threshold_of

ALARM = 1e-6
N = 1 << 16
SEED = torch.tensor([[12345, -678], [-(2**31), 2**31 - 1], [0, 1]], dtype=torch.int32)
HALF = threshold_of(0.5)


def at(first=0, n=N, salt=0, threshold=HALF, seed=SEED, below=True):
    return random_mask_at(torch.arange(first, first + n), seed, salt, threshold, below)


def is_frequent(mask, probability, directions=1):
    """Whether a share of ones may well be drawn with this probability."""
    z = (mask.double().mean() - probability) / (probability * (1 - probability) / mask.numel()) ** 0.5
    return abs(float(z)) < norm.isf(ALARM / 2 / directions)


@given(st.lists(st.integers(0, 5), max_size=3), st.integers(0, 2), st.floats(1e-9, 1, exclude_max=True), st.booleans())
def test_each_element_is_the_specification_s_at_its_position(size, salt, p, below):
    mask = random_mask(SEED, salt, size, threshold_of(p), below)
    assert mask.dtype is torch.bool and mask.shape == tuple(size)
    assert torch.equal(mask.view(-1), at(0, mask.numel(), salt, threshold_of(p), below=below))


def test_runs_join():
    assert torch.equal(random_mask(SEED, 0, [3, RUN - 1], HALF, True).view(-1), at(n=3 * (RUN - 1)))


def test_opcheck():
    torch.library.opcheck(random_mask.overload, (SEED, 1, [3, 5], HALF, False))


@pytest.mark.parametrize("p", [0.0, 1e-12, 0.1, 0.3, 0.5, 0.9, 1 - 1e-12, 1.0])
def test_thresholds_are_int32_and_share_the_words_as_asked(p):
    threshold = threshold_of(p)
    assert -(2**31) < threshold < 2**31
    assert (threshold + 2**31) / 2**32 == pytest.approx(p, abs=2**-32)


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.3, 0.5, 0.6, 0.9])
@pytest.mark.parametrize("first", [0, 2**32 - N // 2, 5 * 2**40])
def test_as_frequent_as_asked(p, first):
    below = at(first, threshold=threshold_of(p))
    assert is_frequent(below, p)
    assert torch.equal(at(first, threshold=threshold_of(p), below=False), ~below)


@pytest.mark.parametrize(
    "distance", [1, 2, 3, 4, 7, 8, 16, 32, 64, 100, 128, 256, 512, 4096, 2**20, 2**31, 2**32, 2**33]
)
def test_neighbours_in_rows_columns_and_beyond_32_bits_are_independent(distance):
    assert is_frequent(at() ^ at(distance), 0.5, directions=18)


def test_dropouts_and_calls_are_independent():
    generator = torch.Generator().manual_seed(0)
    seed = torch.randint(-(2**31), 2**31, (40, 2), dtype=torch.int32, generator=generator)
    masks = [at(n=1 << 14, seed=seed, salt=salt) for salt in range(40)]
    pairs = [(a, b) for i, a in enumerate(masks) for b in masks[:i]]
    assert all(is_frequent(a ^ b, 0.5, directions=len(pairs)) for a, b in pairs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_s_loops_make_the_same_bits_also_beyond_32(dynamic):
    """Of a mask of 2**35 elements only those are made that are asked for."""

    def function(x, seed, n):
        small = random_mask(seed, 1, [x.shape[0], 12], HALF, False)
        huge = random_mask(seed, 2, [n, 2**15], threshold_of(0.3), True)
        return torch.where(small, x, 0.0), torch.where(huge[2**17 - 1 : 2**17 + 1], 1.0, 0.0)

    torch._dynamo.reset()
    x, n = torch.randn(37, 12), 2**20
    with inductor_config.patch(fx_graph_cache=False):
        kept, huge = torch.compile(function, dynamic=dynamic)(x, SEED, n)
    assert torch.equal(kept, x.where(random_mask(SEED, 1, [37, 12], HALF, False), 0.0))
    first = (2**17 - 1) * 2**15
    assert torch.equal(huge.reshape(-1) == 1, at(first, 2 * 2**15, 2, threshold_of(0.3)))
    assert not torch.equal(huge[1] == 1, at(0, 2**15, 2, threshold_of(0.3)))  # where the low bits start anew
