"""Levels that minimise the expected variance: the known table, quadrature, optimality, and the maps built on them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from actcompile.kernels import BlockFormat
from actcompile.kernels.blocks.format import GRID, levels_text
from actcompile.kernels.blocks.levels import (
    SEGMENTS,
    ClippedNormal,
    HalfNormal,
    apply_map,
    decode_map,
    encode_map,
    expected_variance,
    level_values,
    normal_levels,
)
from tests.strategies import FITTED_BLOCKS, formats

BLOCKS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
INNER_LEVEL = (1.0109, 1.0300, 1.0500, 1.0689, 1.0861, 1.1017, 1.1156, 1.1281, 1.1393, 1.1495)
LESS_THAN_UNIFORM = (0.07, 0.61, 1.84, 3.78, 6.33, 9.34, 12.66, 16.16, 19.71, 23.22)  # per cent

# what the levels' rounding to 2**-20 leaves, relative, and at 8 bits float64 in the difference of integrals
NOT_YET_MINIMAL = {1: 0.0, 2: 1e-12, 4: 1e-11, 8: 2e-10}
COUNTS = (2, 3, 4, 5, 8, 16)

fitted = st.builds(
    lambda bits, block: BlockFormat(bits, block, "variance-minimising"),
    st.sampled_from((1, 2, 4, 8)),
    st.sampled_from(FITTED_BLOCKS),
)


def values_of(fmt):
    return np.array(level_values(fmt.bits, fmt.block, fmt.levels))


def variance(values, block):
    return expected_variance(values, ClippedNormal(len(values) - 1, block))


def model(top, block):
    """The clipped normal of a block, as a scipy distribution before clipping (i-EXACT, eq. 7)."""
    return norm(loc=top / 2, scale=-top / 2 / norm.ppf(1 / block))


@pytest.mark.parametrize(
    ("block", "inner", "reduction"), list(zip(BLOCKS, INNER_LEVEL, LESS_THAN_UNIFORM, strict=True))
)
def test_the_table_for_two_bits(block, inner, reduction):
    levels = level_values(2, block, "variance-minimising")
    assert levels == pytest.approx((0, inner, 3 - inner, 3), abs=6e-5)
    assert 100 * (1 - variance(levels, block) / variance(range(4), block)) == pytest.approx(reduction, abs=0.0051)


@pytest.mark.parametrize("bits", (1, 2, 4, 8))
@pytest.mark.parametrize("block", (4, 64, 2048))
@pytest.mark.parametrize("levels", ("uniform", "variance-minimising"))
def test_the_expected_variance_is_the_integral(bits, block, levels):
    values = level_values(bits, block, levels)
    density = model(2**bits - 1, block).pdf
    integral = 0.0
    for left, right in pairwise(values):
        integral += quad(lambda h, a, b: (b - h) * (h - a) * density(h), left, right, args=(left, right))[0]
    assert variance(values, block) == pytest.approx(integral, rel=1e-8)


@given(st.integers(2, 40), st.floats(3, 1e12), st.sampled_from((4, 64, 2048)))
def test_the_model_integrates_powers(top, block, parts):
    distribution, edges = ClippedNormal(top, int(block)), np.linspace(0, top, 2 + parts % 7)
    for power, row in enumerate(distribution.integrals(edges)):
        for (left, right), found in zip(pairwise(edges), row, strict=True):
            truth = quad(lambda h, k: h**k * distribution.density(h), left, right, args=(power,), epsabs=1e-13)[0]
            assert found == pytest.approx(truth, rel=1e-8, abs=1e-12 * top**power)


@given(fitted)
def test_levels_ascend_from_end_to_end_and_are_symmetric(fmt):
    values = values_of(fmt)
    assert len(values) == 2**fmt.bits
    assert values[0] == 0 and values[-1] == fmt.top
    assert np.all(np.diff(values) > 0)
    assert np.array_equal(values, fmt.top - values[::-1])
    assert np.array_equal(values * GRID, np.round(values * GRID))


@given(st.integers(2, 40), st.integers(1, 10**12))
def test_any_number_of_levels_for_any_block(count, block):
    values = normal_levels(count, block)
    assert len(values) == count and values[0] == 0 and values[-1] == count - 1
    assert np.all(np.diff(values) > 0)
    assert np.array_equal(values, count - 1 - values[::-1])
    assert np.array_equal(values * GRID, np.round(values * GRID))
    assert variance(values, block) <= variance(np.arange(count), block) * (1 + 1e-11)


@pytest.mark.parametrize(
    ("arguments", "name"), [((1, 64), "count"), ((16, 64, 4), "segments"), ((4, 64, -3), "segments")]
)
def test_an_error_names_the_argument(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        normal_levels(*arguments)


def test_one_bit_has_no_levels_to_choose():
    assert level_values(1, 64, "variance-minimising") == level_values(1, 64, "uniform") == (0.0, 1.0)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("block", (4, 47, 256, 2048, 10**9))
def test_every_inner_level_is_stationary_to_its_rounding(count, block):
    """The derivative by a level: the mean distance to the left end of its left bin, less that of the right bin.

    It is at most its own change over half a step of the grid, by this level and by its neighbours.
    """
    values = normal_levels(count, block)
    density = model(count - 1, block).pdf
    for left, level, right in zip(values, values[1:], values[2:], strict=False):
        from_left = quad(lambda h, a: (h - a) * density(h), left, level, args=(left,), epsabs=1e-13)[0]
        from_right = quad(lambda h, b: (b - h) * density(h), level, right, args=(right,), epsabs=1e-13)[0]
        change = (right - left) * density(level) + quad(density, left, right)[0]
        assert abs(from_left - from_right) <= 0.5 / GRID * change * (1 + 1e-5) + 1e-12


@given(fitted, st.integers(0, 2**32 - 1), st.sampled_from((1e-4, 1e-3, 1e-2, 1e-1)))
def test_no_perturbation_of_the_levels_lowers_the_variance(fmt, seed, size):
    """Up to 4 bits of every inner level by itself; of 8-bit levels within their family of evenly spaced segments."""
    values = values_of(fmt)
    steps = fmt.top // SEGMENTS[fmt.bits]
    edges = values[::steps]
    gap = np.diff(edges).min()
    moved = edges.copy()
    moved[1:-1] += np.random.default_rng(seed).uniform(-0.5, 0.5, len(edges) - 2) * size * gap
    perturbed = np.interp(np.arange(2**fmt.bits) / steps, np.arange(len(edges)), moved)
    assert variance(perturbed, fmt.block) >= variance(values, fmt.block) * (1 - NOT_YET_MINIMAL[fmt.bits])


@pytest.mark.parametrize("count", (4, 8, 16, 256))
def test_larger_blocks_gain_more_from_their_levels(count):
    segments = 15 if count == 256 else 0
    ratios = [
        variance(normal_levels(count, block, segments), block) / variance(np.arange(count), block)
        for block in (4, 16, 64, 256, 1024)
    ]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] < 1


@given(formats())
def test_the_maps_take_levels_to_codes_and_back(fmt):
    codes = torch.arange(2**fmt.bits, dtype=torch.float32)
    values = torch.tensor(values_of(fmt), dtype=torch.float32)
    tolerance = 4e-6 * fmt.top
    torch.testing.assert_close(apply_map(codes, decode_map(fmt)), values, rtol=0, atol=tolerance)
    torch.testing.assert_close(apply_map(256 * values, encode_map(fmt)), 256 * codes, rtol=0, atol=256 * tolerance)


@given(formats())
def test_the_maps_are_monotone_and_inverse_to_each_other(fmt):
    grid = torch.linspace(0, 256 * fmt.top, 20_001)
    on_codes = apply_map(grid, encode_map(fmt))
    assert (on_codes.diff() > 0).all()
    assert on_codes[0] == 0
    # the top must not leave the codes: 256 * top + 255 is the last position whose code is still `top`
    assert abs(float(on_codes[-1]) - 256 * fmt.top) < 0.25
    back = apply_map(on_codes / 256, decode_map(fmt))
    torch.testing.assert_close(back, grid / 256, rtol=0, atol=4e-6 * fmt.top)
    assert (apply_map(torch.arange(2.0**fmt.bits), decode_map(fmt)).diff() > 0).all()


@given(formats())
def test_the_constants_of_the_maps_are_exact_in_float32(fmt):
    for slope, terms in (encode_map(fmt), decode_map(fmt)):
        for value in (slope, *(v for term in terms for v in term)):
            assert float(np.float32(value)) == value


@given(st.sampled_from((1, 2, 4, 8)), st.integers(1, 5000))
def test_uniform_levels_need_no_map(bits, block):
    fmt = BlockFormat(bits, block)
    t = torch.linspace(0, 256 * fmt.top, 100)
    assert torch.equal(apply_map(t, encode_map(fmt)), t)
    assert torch.equal(apply_map(t, decode_map(fmt)), t)


@given(st.sampled_from((2, 4)), st.sampled_from(FITTED_BLOCKS))
def test_the_fitted_levels_spelled_out_have_the_same_maps(bits, block):
    named = BlockFormat(bits, block, "variance-minimising")
    spelled = BlockFormat(bits, block, levels_text(values_of(named)))
    assert spelled != named
    assert encode_map(spelled) == encode_map(named) and decode_map(spelled) == decode_map(named)
    flat = BlockFormat(bits, block, levels_text(range(2**bits)))
    assert encode_map(flat) == decode_map(flat) == (1.0, ())


@st.composite
def steep(draw):
    """Explicit levels whose gaps differ by any factor, down to one step of the grid."""
    bits = draw(st.sampled_from((2, 4)))
    top, inner = 2**bits - 1, 2**bits - 2
    near = st.one_of(st.integers(1, 40), st.integers(top * GRID - 40, top * GRID - 1), st.integers(1, top * GRID - 1))
    places = sorted(draw(st.sets(near, min_size=inner, max_size=inner)))
    if draw(st.booleans()):
        half = sorted({min(p, top * GRID - p) for p in places} - {top * GRID // 2})[: inner // 2]
        symmetric = half + [top * GRID - p for p in reversed(half)]
        places = symmetric if len(symmetric) == inner else places
    return BlockFormat(bits, 64, levels_text([0, *(p / GRID for p in places), top]))


@given(steep())
def test_however_steep_no_position_leaves_the_codes(fmt):
    """A position's code stays below the top's next if it is below 256 * top + 0.5; elements round past the end, too."""
    values = torch.tensor(values_of(fmt), dtype=torch.float32) * 256
    assert torch.equal(values.double(), torch.tensor(values_of(fmt)) * 256), "levels are exact in float32"
    on_levels = apply_map(values, encode_map(fmt))
    assert (on_levels - 256 * torch.arange(fmt.top + 1)).abs().max() < 0.05
    past = values[-1] * (1 + torch.arange(4) * 2.0**-23)
    assert apply_map(past, encode_map(fmt)).max() < 256 * fmt.top + 0.1
    grid = torch.cat([torch.linspace(0, 256 * fmt.top, 5001), values]).sort().values
    assert apply_map(grid, encode_map(fmt)).diff().min() > -0.05
    decoded = apply_map(torch.arange(fmt.top + 1.0), decode_map(fmt))
    torch.testing.assert_close(decoded, values / 256, rtol=0, atol=1e-6 * fmt.top)


@pytest.mark.parametrize("bits", (2, 4))
@pytest.mark.parametrize("block", (4, 47, 256, 2048))
def test_half_normal_levels_are_stationary_and_better_than_others(bits, block):
    model_ = HalfNormal(2**bits - 1, block)
    values = np.array(level_values(bits, block, "half-normal"))
    assert values[0] == 0 and values[-1] == model_.top and np.all(np.diff(values) > 0)
    assert np.all(np.diff(np.diff(values)) > 0), "denser towards zero"
    zeroth, first, _ = model_.integrals(values)
    from_left, from_right = first - values[:-1] * zeroth, values[1:] * zeroth - first
    assert from_left[:-1] == pytest.approx(from_right[1:], rel=1e-4)
    own = expected_variance(values, model_)
    for other in ("uniform", "variance-minimising"):
        assert own < expected_variance(np.array(level_values(bits, block, other)), model_)


@pytest.mark.parametrize("block", (16, 256))
def test_the_half_normal_is_the_largest_of_so_many_behind_relu(block):
    """The mean of the maximum's rank: one element in `block` lies beyond the top, before clipping."""
    model_ = HalfNormal(3, block)
    assert 1 - norm.cdf(3 / model_.sigma) == pytest.approx(1 / block)
    total = model_.integrals(np.array([0.0, 3.0]))[0].sum()
    assert total == pytest.approx(0.5 - 1 / block)  # the other half is zero
