"""How well simple distributions describe the normalised elements of real saved activations, and what the fit is worth.

An element `x` of a block with minimum `low` and maximum `high` is normalised to `h = 3 (x - low) / (high - low)`, in
[0, 3], as 2 bits have it. Three models of `h` are compared with what is observed: the clipped normal of i-EXACT (arXiv
2309.11856, eq. 7), the uniform distribution that EXACT assumes, and the histogram of an earlier observation.

Distances are taken over fixed cells: one for each end of a block, which has mass of its own, and `CELLS` equal ones in
between. What counts in the end is the variance of rounding, which is exact given `h`: `(r - h)(h - l)` between the
levels `l` and `r`, in squared steps of the tensor's own units, so a block counts by its squared range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import jensenshannon
from scipy.special import ndtr, ndtri
from torch import Tensor

from actcompile.checking.calibrate import project, some_blocks
from actcompile.kernels import BlockFormat
from actcompile.kernels.blocks.histogram import Histogram, optimal_levels
from actcompile.kernels.blocks.levels import ClippedNormal, normal_levels

BITS = 2
TOP = 2**BITS - 1
CELLS = 256
BINS = 255  # of the histograms that levels are fitted to: a multiple of 3, so that uniform levels are edges
LIMIT = 2**19  # elements that are looked at of one activation, in whole blocks
PROBABILITIES = (np.arange(24) + 0.5) / 24  # of the Q-Q points
MODELS = ("normal", "uniform", "histogram")


@dataclass(frozen=True)
class View:
    """How an activation is cut into blocks. reduction: projected to so many times fewer columns first (1: as it is)."""

    name: str
    block: int
    reduction: int = 1


VIEWS = (View("block 256", 256), View("projected, G = 16", 16, 8), View("projected, G = 1024", 1024, 8))


@dataclass(frozen=True)
class Sample:
    """Normalised elements of one activation at one moment.

    h: float64 [elements], in [0, 3]; weight: [elements], the squared range of each one's block, of mean 1; zero: share
    of elements that are exactly zero before they are normalised; constant: share of blocks without a range, which
    decode exactly and are left out of `h`; histogram: the same elements as the product counts them.
    """

    block: int
    h: np.ndarray
    weight: np.ndarray
    zero: float
    constant: float
    histogram: Histogram


def sample(value: Tensor, view: View) -> Sample | None:
    """Cuts a float tensor into blocks and normalises them.

    At most `LIMIT` elements are looked at, in blocks that are evenly spread; the end that fills no block is left out.
    Returns None where no block has a range, or the projection of the view does not apply: to fewer than 16 columns.
    """
    if view.reduction > 1:
        columns = value[0].numel() if value.dim() > 1 and value.shape[0] else 1
        if columns < 2 * view.reduction:
            return None
        value = project(value.reshape(len(value), -1), math.ceil(columns / view.reduction), seed=0)
    if value.numel() < view.block:
        return None
    blocks = some_blocks(value, view.block, LIMIT)
    x = blocks.double().numpy()
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    width = high - low
    ranged = width[:, 0] > 0
    if not ranged.any():
        return None
    h = ((x - low)[ranged] / width[ranged] * TOP).ravel()
    weight = np.repeat(width[ranged, 0] ** 2, view.block)
    histogram = Histogram.of(blocks, BlockFormat(BITS, view.block), BINS)
    return Sample(view.block, h, weight / weight.mean(), float((x == 0).mean()), float(1 - ranged.mean()), histogram)


def cells(h: np.ndarray) -> np.ndarray:
    """The share of elements in every cell, [CELLS + 2]: exactly 0, the cells in between, exactly 3."""
    inner = h[(h > 0) & (h < TOP)]
    counts = np.histogram(inner, bins=CELLS, range=(0, TOP))[0]
    return np.concatenate([[np.sum(h == 0)], counts, [np.sum(h == TOP)]]) / len(h)


def normal_cells(block: int) -> np.ndarray:
    """The same of the clipped normal, whose clipped mass is at the ends."""
    model = ClippedNormal(TOP, block)
    below = ndtr((np.linspace(0, TOP, CELLS + 1) - model.mu) / model.sigma)
    return np.concatenate([[below[0]], np.diff(below), [1 - below[-1]]])


def uniform_cells() -> np.ndarray:
    """The same of the uniform distribution, which has no mass at the ends."""
    return np.concatenate([[0.0], np.full(CELLS, 1 / CELLS), [0.0]])


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Divergence in bits, in [0, 1] (Lin, IEEE Trans. Inf. Theory 1991)."""
    return float(jensenshannon(p, q, base=2) ** 2)


def kolmogorov_smirnov(p: np.ndarray, q: np.ndarray) -> float:
    """Largest difference of the distribution functions, at the cells' edges."""
    return float(np.abs(np.cumsum(p) - np.cumsum(q)).max())


def normal_quantiles(block: int) -> np.ndarray:
    """Quantiles of the clipped normal at `PROBABILITIES`."""
    model = ClippedNormal(TOP, block)
    return np.clip(model.mu + model.sigma * ndtri(PROBABILITIES), 0, TOP)


def rounding_variance(s: Sample, levels: np.ndarray) -> float:
    """Expected variance of rounding one element of the sample, stochastically, to ascending levels from 0 to 3."""
    right = np.clip(np.searchsorted(levels, s.h, side="right"), 1, len(levels) - 1)
    return float(np.mean(s.weight * (levels[right] - s.h) * (s.h - levels[right - 1])))


@dataclass(frozen=True)
class Fit:
    """What is kept of an observation to describe later ones: its cells, its quantiles, and its best levels."""

    cells: np.ndarray
    quantiles: np.ndarray
    levels: np.ndarray


def fit(s: Sample) -> Fit:
    return Fit(cells(s.h), np.quantile(s.h, PROBABILITIES), optimal_levels(s.histogram, TOP + 1))


def describe(s: Sample, now: Fit, first: Fit, previous: Fit) -> dict[str, object]:
    """Everything that is said of one observation, as JSON.

    Args:
        s: the observation.
        now: its own fit.
        first, previous: the fits of the first and of the previous observation of the same activation (the first being
            its own); `first` is the histogram model.
    """
    models = {"normal": normal_cells(s.block), "uniform": uniform_cells(), "histogram": first.cells}
    levels = {
        "uniform": np.arange(TOP + 1.0),
        "normal": normal_levels(TOP + 1, s.block),
        "histogram": first.levels,
        "previous": previous.levels,
        "own": now.levels,
    }
    variance = {name: rounding_variance(s, values) for name, values in levels.items()}
    return {
        "zero": s.zero,
        "constant": s.constant,
        "ends": [float(now.cells[0]), float(now.cells[-1])],
        "jensen_shannon": {name: jensen_shannon(now.cells, q) for name, q in models.items()},
        "kolmogorov_smirnov": {name: kolmogorov_smirnov(now.cells, q) for name, q in models.items()},
        "variance": variance,
        "less_variance": {name: 1 - v / variance["uniform"] for name, v in variance.items()}
        if variance["uniform"] > 0
        else None,
        "own_levels": [round(float(v), 6) for v in now.levels],
        "quantiles": [round(float(q), 4) for q in now.quantiles],
    }
