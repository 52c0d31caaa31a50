"""Histograms of the code axis, and the optimal levels: against quadrature, brute force, and what rounding measures."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from actcompile.kernels import BlockFormat, dequantize, quantize
from actcompile.kernels.blocks.format import GRID, levels_text
from actcompile.kernels.blocks.histogram import BINS, SPIKE, Histogram, best_among, optimal_levels
from actcompile.kernels.blocks.levels import ClippedNormal, expected_variance, normal_levels
from tests.strategies import FLOATS, assert_same_bits, formats, kinds, seed_tensor, seeds, sizes, values

# z-tests on fixed seeds; with new ones in every run each would raise a false alarm with a probability of 1e-6
LIMIT = float(norm.isf(1e-6 / 2))


def of_the_normal(top, block, bins=BINS):
    model = ClippedNormal(top, block)
    return Histogram(top, model.integrals(np.arange(bins + 1) * top / bins)[0])


@st.composite
def histograms(draw, top=None, bins=None):
    top = draw(st.sampled_from((1, 3, 7, 15))) if top is None else top
    bins = draw(st.integers(1, 24)) if bins is None else bins
    weight = st.one_of(st.just(0.0), st.floats(1e-3, 1.0))
    atoms = draw(st.lists(st.tuples(st.floats(0, top), st.floats(1e-3, 10)), max_size=4))
    mass = draw(st.lists(weight, min_size=bins, max_size=bins))
    return Histogram(top, np.array(mass), np.array(atoms).reshape(-1, 2))


def points_of(histogram, fine=4000):
    """The histogram as many points: midpoints of equal parts of every bin, and the atoms."""
    bins = len(histogram.mass)
    middles = (np.arange(bins * fine) + 0.5) * (histogram.top / (bins * fine))
    positions = np.concatenate([middles, histogram.atoms[:, 0]])
    return positions, np.concatenate([np.repeat(histogram.mass / fine, fine), histogram.atoms[:, 1]])


def by_points(levels, histogram):
    """The expected variance, by its definition: of each point in its bin, times the point's weight."""
    h, weight = points_of(histogram)
    right = np.clip(np.searchsorted(levels, h), 1, len(levels) - 1)
    return float(np.sum(weight * (levels[right] - h) * (h - levels[right - 1])))


@st.composite
def histograms_and_levels(draw):
    histogram = draw(histograms())
    inner = draw(st.sets(st.floats(0.01, 0.99), max_size=6))
    return histogram, np.array([0, *(histogram.top * place for place in sorted(inner)), histogram.top])


@given(histograms_and_levels())
def test_the_expected_variance_is_the_sum_over_points(case):
    histogram, levels = case
    truth = by_points(levels, histogram)
    scale = histogram.total * histogram.top**2
    assert expected_variance(levels, histogram) == pytest.approx(truth, abs=1e-7 * scale)


@given(histograms_and_levels())
def test_integrals_add_up_to_the_moments(case):
    histogram, levels = case
    h, weight = points_of(histogram)
    weight = np.where((h > 0) & (h < histogram.top), weight, 0)
    for power, row in enumerate(histogram.integrals(levels)):
        assert row.sum() == pytest.approx(np.sum(weight * h**power), rel=1e-6, abs=1e-9)


@given(histograms(bins=12), st.integers(2, 6), st.data())
def test_dynamic_programming_finds_the_best_of_all_choices(histogram, count, data):
    top = histogram.top
    inner = data.draw(st.sets(st.integers(1, 99), min_size=4, max_size=9))
    candidates = np.array([0, *(top * place / 100 for place in sorted(inner)), top])
    chosen = best_among(candidates, count, histogram)
    assert len(chosen) == count and chosen[0] == 0 and chosen[-1] == top
    assert np.all(np.diff(chosen) > 0) and set(chosen) <= set(candidates)
    least = min(
        expected_variance(np.array([0, *some, top]), histogram) for some in combinations(candidates[1:-1], count - 2)
    )
    slack = 1e-12 * histogram.total * top**2
    assert expected_variance(chosen, histogram) == pytest.approx(least, abs=slack)


@pytest.mark.parametrize("count", (4, 8, 16))
@pytest.mark.parametrize("block", (16, 256, 2048))
def test_of_the_clipped_normal_they_are_its_levels(count, block):
    expected = normal_levels(count, block)
    step = (count - 1) / BINS
    candidates = np.arange(BINS + 1) * step
    on_the_grid = best_among(candidates, count, ClippedNormal(count - 1, block))
    assert np.abs(on_the_grid - expected).max() <= 2 * step
    model = ClippedNormal(count - 1, block)
    assert expected_variance(on_the_grid, model) <= expected_variance(np.round(expected / step) * step, model)
    found = optimal_levels(of_the_normal(count - 1, block), count)
    assert np.abs(found - expected).max() <= 0.01 * step
    assert expected_variance(found, model) == pytest.approx(expected_variance(expected, model), rel=1e-8)


@given(histograms())
def test_more_levels_are_never_worse(histogram):
    slack = 1e-6 * histogram.total * histogram.top**2 / GRID
    least = [expected_variance(optimal_levels(histogram, count), histogram) for count in (2, 3, 4, 8, 16)]
    for fewer, more in pairwise(least):
        assert more <= fewer + slack


@given(histograms(), st.sampled_from((2, 3, 4, 8, 16)))
def test_they_are_never_worse_than_uniform_or_normal_ones(histogram, count):
    """Than levels off the grid of candidates, by no more than a bin's width can cost, even in its other valleys."""
    found = optimal_levels(histogram, count)
    assert len(found) == count and found[0] == 0 and found[-1] == histogram.top
    assert np.array_equal(found * GRID, np.round(found * GRID)) and np.all(np.diff(found) > 0)
    ours, top = expected_variance(found, histogram), histogram.top
    assert ours <= expected_variance(np.round(np.linspace(0, top, count) * GRID) / GRID, histogram)
    for block in (4, 256):
        other = normal_levels(count, block) * (top / (count - 1))
        edges = histogram.edges[np.round(other * len(histogram.mass) / top).astype(int)]
        assert len(set(edges)) < count or ours <= expected_variance(edges, histogram) * (1 + 1e-9)
        assert ours <= expected_variance(other, histogram) + top**2 / len(histogram.mass) * histogram.total


@pytest.mark.parametrize("kind", ("normal", "half zero", "integers", "mixed magnitudes"))
@pytest.mark.parametrize("bits", (2, 4))
def test_they_are_never_worse_than_the_normal_ones_on_tensors(kind, bits):
    fmt = BlockFormat(bits, 256)
    histogram = Histogram.of(values(kind, 2**16, 3), fmt)
    fitted = expected_variance(normal_levels(2**bits, 256), histogram)
    assert expected_variance(optimal_levels(histogram, 2**bits), histogram) <= fitted * (1 + 1e-9)


def test_a_level_lies_on_a_spike_inside_and_none_is_spent_on_the_ends():
    spike = 1.2345678
    histogram = Histogram(3, np.full(30, 1.0), np.array([[0.0, 1e6], [spike, 1e3], [3.0, 1e6]]))
    assert np.abs(optimal_levels(histogram, 4) - spike).min() <= 0.5 / GRID
    ends_only = Histogram(3, np.full(30, 1.0), np.array([[spike, 1e3]]))
    assert np.array_equal(optimal_levels(histogram, 4), optimal_levels(ends_only, 4))


def test_without_any_mass_levels_are_uniform():
    assert np.array_equal(optimal_levels(Histogram(3, np.zeros(10)), 4), np.arange(4.0))


@given(formats(levels="uniform"), st.data(), kinds(), seeds, st.sampled_from(FLOATS))
def test_a_tensor_weighs_the_squared_steps_of_its_blocks(fmt, data, kind, seed, dtype):
    x = values(kind, data.draw(sizes(fmt.group)), seed).to(dtype)
    histogram = Histogram.of(x, fmt)
    parts = quantize(x, seed_tensor(0), 0, fmt.bits, fmt.block, fmt.levels, fmt.metadata, fmt.words)
    low, high = (part.double().flatten() for part in parts[1:])
    sizes_of_blocks = torch.bincount(torch.arange(x.numel()) // fmt.block, minlength=len(low))
    steps = (high - low).clamp_min(2.0**-99) / fmt.top
    finite = steps.isfinite()
    assert histogram.total == pytest.approx(float((steps**2 * sizes_of_blocks)[finite].sum()), rel=1e-9)
    assert (histogram.top, len(histogram.mass)) == (fmt.top, BINS)


@given(st.lists(histograms(top=3, bins=12), min_size=2, max_size=4), st.integers(2, 5), seeds)
def test_histograms_add(parts, count, seed):
    inner = np.random.default_rng(seed).uniform(0, 3, count)
    levels = np.array([0, *np.sort(inner), 3])
    whole = sum(parts[1:], parts[0])
    assert whole.total == pytest.approx(sum(part.total for part in parts), rel=1e-12)
    separately = sum(expected_variance(levels, part) for part in parts)
    spread = whole.total * SPIKE * sum(len(part.atoms) for part in parts) * 9 / 12  # atoms that became too light
    assert expected_variance(levels, whole) == pytest.approx(separately, abs=1e-9 + spread)


@given(st.integers(1, 4), st.integers(1, 4), seeds)
def test_the_histogram_of_two_tensors_is_the_sum_of_theirs(blocks, more, seed):
    fmt = BlockFormat(2, 64)
    x = values("normal", (blocks + more) * 64, seed)
    parts = (Histogram.of(part, fmt, bins=4) for part in x.split([blocks * 64, more * 64]))
    whole, added = Histogram.of(x, fmt, bins=4), sum(parts, Histogram(3, np.zeros(4)))
    assert added.mass.sum() + added.atoms[:, 1].sum() == pytest.approx(whole.total, rel=1e-12)
    assert expected_variance(range(4), added) == pytest.approx(expected_variance(range(4), whole), rel=0.05)


def test_blocks_that_are_not_finite_are_left_out():
    fmt = BlockFormat(2, 64)
    x = values("normal", 256, 1)
    spoilt = x.clone()
    spoilt[70], spoilt[200] = float("nan"), float("inf")
    clean = torch.cat([x[:64], x[128:192]])
    ours, expected = Histogram.of(spoilt, fmt), Histogram.of(clean, fmt)
    assert np.array_equal(ours.mass, expected.mass) and np.array_equal(ours.atoms, expected.atoms)


def test_zeros_after_relu_are_atoms_without_variance():
    x = values("half zero", 2**14, 2)
    histogram = Histogram.of(x, BlockFormat(2, 64))
    positions, weights = histogram.atoms.T
    assert positions.tolist() == [0, 3]
    assert 0.45 < weights[0] / histogram.total < 0.55
    inside = Histogram(3, histogram.mass)
    levels = np.array([0, 0.7, 1.6, 3])
    assert expected_variance(levels, histogram) == pytest.approx(expected_variance(levels, inside), rel=1e-9)


def test_a_value_that_recurs_inside_is_an_atom():
    """Blocks from -1 to 2 with many zeros: all of them are at 1 of 3."""
    x = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) * 3 - 1
    x[:, ::2] = 0
    x[:, 1], x[:, 3] = -1, 2
    histogram = Histogram.of(x, BlockFormat(2, 64))
    assert histogram.atoms[:, 0].tolist() == [0, 1, 3]
    assert histogram.atoms[1, 1] == pytest.approx(64 * 32)


@pytest.mark.parametrize("bits", (2, 4))
@pytest.mark.parametrize("kind", ("normal", "half zero"))
def test_what_a_histogram_predicts_is_what_rounding_to_its_levels_costs(bits, kind):
    """z-test of the squared error over many seeds; a bin's width moves the prediction by less than 1e-4 of it."""
    x = values(kind, 2**14, 4)
    histogram = Histogram.of(x, BlockFormat(bits, 256))
    fmt = BlockFormat(bits, 256, levels_text(optimal_levels(histogram, 2**bits)))
    squares = []
    for seed in range(50):
        parts = quantize(x, seed_tensor(seed), 0, fmt.bits, fmt.block, fmt.levels, fmt.metadata, fmt.words)
        error = dequantize(*parts, x.shape, x.dtype, fmt.bits, fmt.block, fmt.levels) - x
        squares.append(float(error.double().square().sum()))
    expected = expected_variance(optimal_levels(histogram, 2**bits), histogram)
    z = (np.mean(squares) - expected) / np.hypot(np.std(squares) / len(squares) ** 0.5, 1e-4 * expected)
    assert abs(z) < LIMIT
    uniform = expected_variance(range(2**bits), histogram)
    assert expected < (0.95 if kind == "normal" else 0.8) * uniform


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, [1.0]), "top"),
        ((3, []), "mass"),
        ((3, [1.0, -1.0]), "mass"),
        ((3, [float("nan")]), "mass"),
        ((3, [1.0], [[1.0, -2.0]]), "atoms"),
        ((3, [1.0], [1.0, 2.0]), "atoms"),
        ((3, [1.0], [[3.5, 2.0]]), "atoms"),
    ],
)
def test_an_error_names_the_field(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        Histogram(*arguments)


def test_errors_name_the_argument():
    histogram = Histogram(3, np.ones(6))
    with pytest.raises(ValueError, match="^other must have the same bins"):
        histogram + Histogram(3, np.ones(5))
    with pytest.raises(ValueError, match="^bins"):
        Histogram.of(torch.randn(8), BlockFormat(), bins=0)
    with pytest.raises(ValueError, match="^count"):
        optimal_levels(histogram, 1)
    for candidates in ([0, 1, 1, 3], [0, 2, 1, 3], [1, 3], [0, 2], [0]):
        with pytest.raises(ValueError, match="^candidates"):
            best_among(np.array(candidates), 2, histogram)
    for count in (1, 4):
        with pytest.raises(ValueError, match="^count"):
            best_among(np.array([0, 1, 3]), count, histogram)


def test_the_same_bits_whatever_the_shape():
    x = values("normal", 4096, 7)
    fmt = BlockFormat(4, 64)
    flat, shaped = Histogram.of(x, fmt), Histogram.of(x.view(8, 16, 32), fmt)
    assert_same_bits(torch.from_numpy(flat.mass).float(), torch.from_numpy(shaped.mass).float())
