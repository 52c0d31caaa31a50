"""Normalised elements, models of them, and the variance of rounding them, against definitions and closed forms."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import ndtri

from actcompile.datasets import generated
from actcompile.kernels.blocks.histogram import Histogram
from actcompile.kernels.blocks.levels import ClippedNormal, normal_levels
from bench import distribution_plots
from bench import distributions as d
from bench.cases.distributions import Setting, summarise, watch

BLOCK = d.View("test", 16)


def clipped_normal_sample(block: int, count: int = 200_001) -> d.Sample:
    """Equally probable points of the clipped normal: what an endless sample would say, without noise."""
    model = ClippedNormal(d.TOP, block)
    return sample_of(np.clip(model.mu + model.sigma * ndtri((np.arange(count) + 0.5) / count), 0, d.TOP), block)


def sample_of(h: np.ndarray, block: int = 16, weight: np.ndarray | None = None) -> d.Sample:
    weight = np.ones(len(h)) if weight is None else weight
    mass = np.histogram(h, d.BINS, range=(0, d.TOP), weights=weight)[0]
    return d.Sample(block, h, weight, 0.0, 0.0, Histogram(d.TOP, mass))


values = arrays.arrays(np.float32, 64, elements=st.floats(-100, 100, width=32))


@given(values)
def test_normalised_elements_are_those_of_the_definition(x: np.ndarray) -> None:
    s = d.sample(torch.from_numpy(x), BLOCK)
    blocks = [b.astype(np.float64) for b in np.split(x, 4)]
    ranged = [b for b in blocks if b.max() > b.min()]
    if not ranged:
        assert s is None
        return
    assert s is not None
    np.testing.assert_allclose(s.h, np.concatenate([3 * (b - b.min()) / (b.max() - b.min()) for b in ranged]))
    assert s.constant == 1 - len(ranged) / 4 and s.zero == np.mean(x == 0)
    assert s.h.reshape(-1, 16).min(1).max() == 0 and s.h.reshape(-1, 16).max(1).min() == d.TOP
    np.testing.assert_allclose(s.weight.mean(), 1)


def test_sample_leaves_out_the_last_part_of_a_block_and_looks_at_a_bounded_number() -> None:
    s = d.sample(torch.randn(100, 7), BLOCK)
    assert s is not None and len(s.h) == 100 * 7 // 16 * 16
    s = d.sample(torch.randn(3 * d.LIMIT), BLOCK)
    assert s is not None and len(s.h) == d.LIMIT
    assert d.sample(torch.randn(7), BLOCK) is None


def test_projected_views_have_fewer_columns_and_skip_narrow_tensors() -> None:
    view = d.View("projected", 16, 8)
    s = d.sample(torch.randn(100, 64, 1), view)
    assert s is not None and len(s.h) == 100 * 8 // 16 * 16
    assert d.sample(torch.randn(100, 15), view) is None and d.sample(torch.randn(1000), view) is None


@pytest.mark.parametrize("block", [16, 256, 1024])
def test_the_clipped_normal_is_recognised(block: int) -> None:
    s = clipped_normal_sample(block)
    now = d.cells(s.h)
    assert d.jensen_shannon(now, d.normal_cells(block)) < 1e-4
    assert d.kolmogorov_smirnov(now, d.normal_cells(block)) < 1e-4
    assert d.jensen_shannon(now, d.uniform_cells()) > 0.01
    np.testing.assert_allclose(np.quantile(s.h, d.PROBABILITIES), d.normal_quantiles(block), atol=1e-3)
    np.testing.assert_allclose(d.normal_cells(block)[[0, -1]], 1 / block)


@given(arrays.arrays(np.float64, 30, elements=st.floats(0, 3)))
def test_distances(h: np.ndarray) -> None:
    p = d.cells(h)
    np.testing.assert_allclose(p.sum(), 1)
    for q in (d.normal_cells(256), d.uniform_cells()):
        np.testing.assert_allclose(q.sum(), 1)
        assert 0 <= d.jensen_shannon(p, q) <= 1 and 0 <= d.kolmogorov_smirnov(p, q) <= 1
        np.testing.assert_allclose(d.jensen_shannon(p, q), d.jensen_shannon(q, p))
    assert d.jensen_shannon(p, p) == d.kolmogorov_smirnov(p, p) == 0


def test_distances_of_disjoint_distributions_are_one() -> None:
    p, q = d.cells(np.array([0.0, 0.0])), d.cells(np.array([3.0, 3.0]))
    assert d.jensen_shannon(p, q) == pytest.approx(1) and d.kolmogorov_smirnov(p, q) == 1


def test_variance_of_rounding_in_closed_form() -> None:
    """A uniform h has variance w**2 / 6 in a bin of width w; an element on a level has none."""
    h = (np.arange(30_000) + 0.5) / 10_000
    s = sample_of(h)
    assert d.rounding_variance(s, np.arange(4.0)) == pytest.approx(1 / 6, rel=1e-6)
    assert d.rounding_variance(s, np.array([0, 1.5, 3])) == pytest.approx(1.5**2 / 6, rel=1e-6)
    on_levels = sample_of(np.array([0.0, 1, 2, 3]))
    assert d.rounding_variance(on_levels, np.arange(4.0)) == 0


@pytest.mark.parametrize("block", [16, 256, 1024])
def test_fitted_levels_of_a_clipped_normal_are_its_own(block: int) -> None:
    levels = d.fit(clipped_normal_sample(block)).levels
    np.testing.assert_allclose(levels, normal_levels(4, block), atol=0.005)


@settings(max_examples=10)  # each solves for levels
@given(arrays.arrays(np.float32, 128, elements=st.floats(-10, 10, width=32)))
def test_fitted_levels_are_no_worse_than_any_on_a_coarse_grid(x: np.ndarray) -> None:
    s = d.sample(torch.from_numpy(x), BLOCK)
    if s is None:
        return
    grid = np.linspace(0, 3, 13)
    best = min(d.rounding_variance(s, np.array([0, a, b, 3])) for a in grid[1:-1] for b in grid[1:-1] if a < b)
    assert d.rounding_variance(s, d.fit(s).levels) <= best + 2 * d.TOP / d.BINS  # elements are spread within their bins


def test_watching_a_training_and_drawing_it(tmp_path: Path) -> None:
    setting = Setting(hidden=16, layers=2, epochs=3)
    task = generated(600, 3000, 16, 4)
    records, last = watch(task, "sage", setting, lambda: None)
    assert {r["epoch"] for r in records} == set(setting.looks) == {1, 2, 3}
    assert all(r["later"] == (r["epoch"] > 1) for r in records)
    for r in records:
        if r["epoch"] == 1:
            assert r["jensen_shannon"]["histogram"] == 0 and r["variance"]["histogram"] == r["variance"]["own"]
        assert r["variance"]["own"] <= 1.001 * min(r["variance"].values())
        assert sum(r["ends"]) >= 2 / 1024
    dropped = [r for r in records if r["module"] == "dropout" and r["view"] == "block 256"]
    assert dropped and all(0.6 < r["zero"] < 0.9 and r["ends"][0] > 0.5 for r in dropped)
    summary = summarise(records)
    assert summary["observations"] == len(records) and summary["less_variance"]["own"] > 0
    distribution_plots.shapes(tmp_path / "shapes.png", "sage", last)
    distribution_plots.quantiles(tmp_path / "quantiles.png", "sage", last)
    distribution_plots.variances(tmp_path / "variances.png", records)
    assert all(matplotlib.image.imread(f).std() > 0.01 for f in tmp_path.iterdir())
