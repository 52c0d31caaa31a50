"""Stochastic rounding is unbiased, to the position's eighth fractional bit, and its variance is what theory says.

Where it can be, the expectation is taken exactly: every element is encoded with every one of the 256 random bytes. The
rest are z-tests on fixed seeds; with new seeds in every run, each would raise a false alarm with a probability below
ALARM, by the normal approximation to sums of at least 10**5 independent terms.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import norm

from actcompile.kernels import BlockFormat, dequantize, quantize
from actcompile.kernels.blocks.levels import ClippedNormal, expected_variance, level_values
from actcompile.kernels.blocks.random_bits import random_words
from tests.strategies import formats, kinds, seed_tensor, seeds, values

ALARM = 1e-6
LIMIT = float(norm.isf(ALARM / 2))
COPIES = 6144  # P(some of 256 bytes is missing in as many draws) = 256 * (255 / 256)**6144 = 1e-8
EPS = 2.0**-24


def through(x, fmt, seed):
    """Encoded and decoded."""
    parts = quantize(x, seed, 0, fmt.bits, fmt.block, fmt.levels, fmt.metadata, fmt.words)
    return dequantize(*parts, x.shape, x.dtype, fmt.bits, fmt.block, fmt.levels), parts


def bytes_used(numel, fmt, seed):
    """The random byte of every element."""
    index = torch.arange(fmt.groups(numel) * fmt.words, dtype=torch.int32)
    noise = torch.stack(list(random_words(index, seed, 0, -(-fmt.planes // 4))))
    i = torch.arange(numel)
    within = i % fmt.group
    plane, word = within // fmt.words, i // fmt.group * fmt.words + within % fmt.words
    return (noise[plane // 4, word] >> (8 * (plane % 4))) & 255


def grid(parts, fmt):
    """float64 (blocks, levels): what each block decodes its codes to, by the formula; and (blocks, 1) the scale."""
    low, high = (part.double().reshape(-1, 1) for part in parts[1:])
    scale = (high - low).clamp_min(2.0**-99) / fmt.top
    levels = torch.tensor(level_values(fmt.bits, fmt.block, fmt.levels), dtype=torch.float64)
    return low + levels * scale, scale


def outcomes(x, fmt, seed):
    """float64 (block, 256): the decoded value of each element of one block, for each random byte."""
    copies = math.lcm(COPIES, fmt.blocks_per_group)
    decoded, parts = through(x.repeat(copies), fmt, seed)
    byte = bytes_used(x.numel() * copies, fmt, seed)
    element = torch.arange(x.numel()).repeat(copies)
    table = torch.full((x.numel(), 256), float("nan"), dtype=torch.float64)
    table[element, byte] = decoded.double()
    low, high = decoded.double().new_full(table.shape, float("inf")), table.new_full(table.shape, -float("inf"))
    low.view(-1).scatter_reduce_(0, element * 256 + byte, decoded.double(), "amin")
    high.view(-1).scatter_reduce_(0, element * 256 + byte, decoded.double(), "amax")
    assert torch.equal(low, high), "the same value and the same byte gave two results"
    return table, tuple(part[:1] for part in parts)


@given(formats(blocks=st.sampled_from((1, 2, 4, 7, 16, 24))), kinds(), seeds)
def test_the_mean_over_all_bytes_is_the_element(fmt, kind, seed):
    x = values(kind, fmt.block, seed)
    table, parts = outcomes(x, fmt, seed_tensor(0))
    assume(not table.isnan().any())
    levels, scale = (g[0] for g in grid(parts, fmt))
    magnitude = float(torch.cat([x.double().abs(), levels.abs()]).max())
    error = 8 * EPS * magnitude + 2.0**-149  # float32, in the difference from `low` and in decoding
    step = float(levels.diff().max())

    mean = table.mean(1)
    assert (mean - x.double()).abs().max() <= step * (1 / 512 + 1e-5) + error

    # two neighbouring levels at most, the lower one for the smaller bytes, and the element lies between them
    assert (table.diff(dim=1) >= 0).all()
    index = (table[:, :, None] - levels).abs().argmin(2)
    assert (table - levels[index]).abs().max() <= error + 1e-5 * step
    assert (index.max(1).values - index.min(1).values <= 1).all()
    slack = error + step * (1 / 256 + 1e-5)
    assert (table[:, 0] <= x + slack).all() and (table[:, -1] >= x - slack).all()


@given(formats(metadata=torch.float32), seeds, st.integers(1, 3), st.data())
def test_a_constant_block_decodes_exactly(fmt, seed, blocks, data):
    bits = st.integers(-(2**31), 2**31 - 1)
    drawn = [data.draw(bits) for _ in range(blocks)]
    constant = torch.tensor(drawn, dtype=torch.int32).view(torch.float32)
    assume(bool(constant.isfinite().all()))
    x = constant.repeat_interleave(fmt.block)
    assert torch.equal(through(x, fmt, seed_tensor(seed))[0], x)


@given(formats(metadata=torch.float32), kinds(), seeds)
def test_the_ends_of_a_block_come_back(fmt, kind, seed):
    """Nothing is clamped: minimum and maximum are levels themselves."""
    x = values(kind, fmt.block, seed)
    decoded, _ = through(x, fmt, seed_tensor(seed))
    low, high = x.double().min(), x.double().max()
    assume(low == high or high - low > 2.0**-99)  # narrower blocks are rounded on a grid of this width
    error = 8 * EPS * float(x.double().abs().max()) + float(high - low) * 2e-6
    assert (decoded[x == x.min()].double() - low).abs().max() <= error
    assert (decoded[x == x.max()].double() - high).abs().max() <= error


FORMATS = [
    BlockFormat(1, 32),
    BlockFormat(2, 256),
    BlockFormat(2, 47, metadata=torch.bfloat16),
    BlockFormat(2, 64, "variance-minimising"),
    BlockFormat(4, 16, "variance-minimising", torch.bfloat16),
    BlockFormat(8, 100, "variance-minimising"),
    BlockFormat(2, 64, "0,0.4,1.3,3"),
    BlockFormat(4, 16, "0,0.2,0.5,0.9,1.4,2,2.7,3.5,4.4,5.4,6.5,7.7,9,11,13,15", torch.bfloat16),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_errors_over_many_seeds_have_mean_zero_and_the_variance_of_theory(fmt):
    """Per element `(r - h) * (h - l) * scale**2`, on all kinds of data, a tail, and both sides of every block's edge.

    Here `ends` are l and r, `below` is h - l, and `above` is r - h, all in steps of the uniform grid.
    """
    repeats, groups = 100, max(1, 512 // fmt.group)
    varied = ("normal", "half zero", "integers", "large offset", "huge", "mixed magnitudes")
    x = torch.cat([values(kind, groups * fmt.group, 5) for kind in varied] + [values("normal", fmt.group // 2 + 1, 6)])
    block = torch.arange(x.numel()) // fmt.block
    levels, scale = grid(through(x, fmt, seed_tensor(0))[1], fmt)
    levels, scale = levels[block], scale[block]
    upper = torch.searchsorted(levels, x.double()[:, None]).clamp(1, fmt.top)
    ends = torch.cat([levels.gather(1, upper - 1), levels.gather(1, upper)], dim=1) / scale
    below, above = (x.double() / scale.squeeze(1) - ends[:, 0]).clamp_min(0), ends[:, 1] - x.double() / scale.squeeze(1)
    above = above.clamp_min(0)
    variance = above * below
    of_squares = variance * (above - below) ** 2  # an error is `above` or `-below`: the variance of its square

    # where float32 itself rounds by more than a thousandth of a step, theory has no say (the exact test above has)
    clear = EPS * x.double().abs() / scale.squeeze(1) < 1e-3
    assert clear.double().mean() > 0.75
    runs = [through(x, fmt, seed_tensor(1 + i))[0].double() for i in range(repeats)]
    errors = (torch.stack(runs) - x.double()) / scale.squeeze(1)
    errors, variance, of_squares = errors[:, clear], variance[clear], of_squares[clear]
    finest = float((ends[:, 1] - ends[:, 0]).max()) / 512 + 1e-3  # what the position's eight bits leave of a mean

    z = errors.mean(0).abs() - finest
    assert float((z / (variance / repeats + 1e-12).sqrt()).max()) < norm.isf(ALARM / 2 / len(variance))
    # over all elements what is left has either sign: `finest` is its standard deviation, generously
    z = errors.sum() / repeats / (variance.sum() / repeats + finest**2 * len(variance)).sqrt()
    assert abs(float(z)) < LIMIT
    z = ((errors**2).sum() / repeats - variance.sum()) / (of_squares.sum() / repeats + finest**2 * len(variance)).sqrt()
    assert abs(float(z)) < LIMIT


@pytest.mark.parametrize("bits", (1, 2, 4, 8))
@pytest.mark.parametrize("levels", ("uniform", "variance-minimising"))
@pytest.mark.parametrize("block", (16, 256))
def test_clipped_normal_data_round_with_the_expected_variance(bits, levels, block):
    """Every block has its ends in it, so that its code axis is the model's; the rest of it is the model's sample."""
    fmt = BlockFormat(bits, block, levels)
    blocks = 2**17 // block
    model = ClippedNormal(fmt.top, block)
    h = np.clip(np.random.default_rng(bits).normal(model.mu, model.sigma, (blocks, block)), 0, fmt.top)
    h[:, 0], h[:, -1] = 0, fmt.top
    x = torch.from_numpy(h).float()
    decoded, _ = through(x, fmt, seed_tensor(bits))
    squares = (decoded - x).double()[:, 1:-1] ** 2
    expected = expected_variance(level_values(bits, block, levels), model)
    z = (squares.mean() - expected) / (squares.std() / squares.numel() ** 0.5)
    assert abs(float(z)) < LIMIT


@given(formats(bits=2, metadata=torch.float32), st.integers(0, 3), seeds)
def test_a_level_encodes_to_its_code_and_decodes_to_itself(fmt, code, seed):
    """Whatever the random bits: a block from 0 to 3 whose other elements are one level."""
    assume(fmt.block > 2)
    level = level_values(fmt.bits, fmt.block, fmt.levels)[code]
    x = torch.full((fmt.block,), level, dtype=torch.float32)
    x[0], x[-1] = 0, 3
    decoded, parts = through(x, fmt, seed_tensor(seed))
    within = torch.arange(fmt.block)
    codes = (parts[0].view(torch.int32)[0, within % fmt.words] >> (2 * (within // fmt.words))) & 3
    assert codes.tolist() == [0] + [code] * (fmt.block - 2) + [3]
    assert (decoded - x).abs().max() <= 2e-6


def test_variance_minimising_levels_measurably_lower_the_variance():
    """2 bits, block 1024: 19.7 % in theory, on data that are normal without being clipped to the block's ends."""
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    error = {}
    for levels in ("uniform", "variance-minimising"):
        error[levels] = float((through(x, BlockFormat(2, 1024, levels), seed_tensor(3))[0] - x).square().mean())
    assert error["variance-minimising"] < 0.85 * error["uniform"]
