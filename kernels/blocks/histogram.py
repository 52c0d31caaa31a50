"""Levels for measured elements: a histogram of the code axis, and the optimal levels by dynamic programming.

After ReLU and dropout most elements are exactly zero, which no normal models: where zero is the block's minimum, it has
no rounding variance at all; where it is inside, a level should lie on it. So a histogram has exact mass points (atoms)
beside its bins. ZipML (Zhang et al., ICML 2017) finds, among candidate points, the levels that minimise the expected
variance of stochastic rounding: the cost of a bin `[l, r]`, the integral of `(r - h)(h - l)`, depends on its ends only,
so the best `k` bins up to a point extend the best `k - 1` bins up to an earlier one.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import Tensor

from .format import GRID, BlockFormat
from .levels import Distribution, expected_variance
from .quantize import SMALLEST_HALF_RANGE, round_outward

BINS = 1020  # a multiple of 1, 3, 15 and 255: uniform levels are edges of bins
SPIKE = 0.01  # share of all mass inside (0, top) from which on a value is kept apart: at most a hundred are
ZOOM = 8  # candidates on either side of a level in a step of the refinement, which reaches two candidates of the last


@dataclass(frozen=True, eq=False)
class Histogram:
    """Normalised elements of quantised blocks on the code axis `[0, top]`, each with a weight.

    Additive: the histogram of several tensors, or of several steps, is the sum of theirs.

    Args:
        top: the largest code, `2**bits - 1`.
        mass: float64 (bins,): weight in each of the equally wide bins of `[0, top]`, spread evenly over the bin.
        atoms: float64 (n, 2): position and weight of single points. Those inside that weigh less than `SPIKE` of all
            that is inside are spread over their bins.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    top: int
    mass: np.ndarray
    atoms: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"top must be at least 1, got {self.top}")
        mass, atoms = np.asarray(self.mass, dtype=np.float64), np.asarray(self.atoms, dtype=np.float64)
        if mass.ndim != 1 or not len(mass) or not np.all((mass >= 0) & np.isfinite(mass)):
            raise ValueError("mass must be a vector of at least one weight, finite and not negative")
        if atoms.ndim != 2 or atoms.shape[1] != 2 or not np.all((atoms >= 0) & np.isfinite(atoms)):
            raise ValueError(f"atoms must be rows of position and weight, finite and not negative, got {atoms.shape}")
        if np.any(atoms[:, 0] > self.top):
            raise ValueError(f"atoms must lie in [0, {self.top}], got one at {atoms[:, 0].max()}")
        positions, which = np.unique(atoms[:, 0], return_inverse=True)
        weights = np.bincount(which, atoms[:, 1], len(positions))
        ends = (positions == 0) | (positions == self.top)
        kept = ends | (weights >= SPIKE * (mass.sum() + weights[~ends].sum()))
        spread = bins_of(positions[~kept], self.top, len(mass))
        object.__setattr__(self, "mass", mass + np.bincount(spread, weights[~kept], len(mass)))
        object.__setattr__(self, "atoms", np.stack([positions[kept], weights[kept]], axis=1))

    @classmethod
    def of(cls, x: Tensor, fmt: BlockFormat, bins: int = BINS) -> "Histogram":
        """The elements of `x`, normalised by their block's minimum and maximum as `quantize` does.

        An element of a block with minimum `low` and maximum `high` weighs `((high - low) / top)**2`, the square of one
        step of its block: squared errors are that many times larger in the tensor than on the code axis, and all
        blocks share their levels. So `expected_variance` of levels is the expected squared error in units of `x`,
        summed over its elements. Blocks with NaN or infinity, which have no codes, are left out. Takes some 40 bytes
        per element for a moment.

        Args:
            x: any shape and device, float32, bfloat16 or float16.
            fmt: bits, block and metadata count, levels do not.
            bins: bins; a multiple of `top` has all uniform levels among its edges.
        """
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        flat = x.detach().reshape(-1).float()
        whole = flat.numel() // fmt.block * fmt.block
        parts = [_normalised(flat[:whole].view(-1, fmt.block), fmt)]
        if whole < flat.numel():
            parts.append(_normalised(flat[whole:].view(1, -1), fmt))
        h, weight = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        place, ends = bins_of(h, fmt.top, bins), (h == 0) | (h == fmt.top)
        inside = np.bincount(place[~ends], weight[~ends], bins)
        apart = ends | (inside >= SPIKE * inside.sum())[place]  # all that may be an atom
        positions, which = np.unique(h[apart], return_inverse=True)
        atoms = np.stack([positions, np.bincount(which, weight[apart], len(positions))], axis=1)
        return cls(fmt.top, np.bincount(place[~apart], weight[~apart], bins), atoms)

    def __add__(self, other: "Histogram") -> "Histogram":
        if (self.top, len(self.mass)) != (other.top, len(other.mass)):
            ours, theirs = (f"{len(h.mass)} bins of [0, {h.top}]" for h in (self, other))
            raise ValueError(f"other must have the same bins, {ours}, got {theirs}")
        return Histogram(self.top, self.mass + other.mass, np.concatenate([self.atoms, other.atoms]))

    @property
    def total(self) -> float:
        """The weight of all elements."""
        return float(self.mass.sum() + self.atoms[:, 1].sum())

    @cached_property
    def edges(self) -> np.ndarray:
        """float64 (bins + 1,): the ends of the bins."""
        return np.arange(len(self.mass) + 1) * self.top / len(self.mass)

    def integrals(self, edges: np.ndarray) -> np.ndarray:
        """See `Distribution`. An atom at one of `edges` counts with either side; it adds to no variance there."""
        positions, weights = self.atoms[(self.atoms[:, 0] > 0) & (self.atoms[:, 0] < self.top)].T
        bin_edges, density = self.edges, self.mass * len(self.mass) / self.top
        place = bins_of(edges, self.top, len(self.mass))
        atom = np.clip(np.searchsorted(edges, positions, side="right") - 1, 0, len(edges) - 2)
        rows = []
        for power in (0, 1, 2):
            primitive = bin_edges ** (power + 1) / (power + 1)
            below = np.concatenate([[0.0], np.cumsum(density * np.diff(primitive))])[place]
            within = density[place] * (edges ** (power + 1) / (power + 1) - primitive[place])
            spikes = np.bincount(atom, weights * positions**power, len(edges) - 1)
            rows.append(np.diff(below + within) + spikes)
        return np.stack(rows)


def bins_of(h: np.ndarray, top: int, bins: int) -> np.ndarray:
    """The bin of each position in `[0, top]`."""
    return np.minimum((h * (bins / top)).astype(np.int64), bins - 1)


def _normalised(blocks: Tensor, fmt: BlockFormat) -> tuple[np.ndarray, np.ndarray]:
    """Positions on the code axis, and weights, of the elements of float32 `blocks` (blocks, block); flat float64."""
    if not blocks.numel():
        return np.empty(0), np.empty(0)
    low, high = round_outward(blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True), fmt.metadata)
    span = high.double() - low.double()
    finite = span.isfinite().squeeze(1)
    blocks, low, span = blocks[finite], low[finite], span[finite].clamp_min(2 * SMALLEST_HALF_RANGE)
    h = ((blocks.double() - low) / span * fmt.top).clamp(0, fmt.top)
    weight = (span / fmt.top).square().expand_as(h)
    return h.flatten().cpu().numpy(), weight.flatten().cpu().numpy()


def best_among(candidates: np.ndarray, count: int, distribution: Distribution) -> np.ndarray:
    """The `count` of `candidates` that minimise the expected variance: the exact optimum, by dynamic programming.

    Args:
        candidates: ascending positions, the first 0, the last `distribution.top`; both are always levels.
        count: levels, at least 2 and at most as many as there are candidates.
        distribution: what is rounded.

    Returns:
        float64 (count,), ascending. Takes `count * len(candidates)**2` steps, vectorised.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    points = np.asarray(candidates, dtype=np.float64)
    if len(points) < 2 or points[0] != 0 or points[-1] != distribution.top or np.any(np.diff(points) <= 0):
        raise ValueError(f"candidates must ascend from 0 to {distribution.top}, got {points}")
    if not 2 <= count <= len(points):
        raise ValueError(f"count must be from 2 to the number of candidates, {len(points)}, got {count}")
    zeroth, first, second = (
        sums[None, :] - sums[:, None] for sums in np.pad(distribution.integrals(points), ((0, 0), (1, 0))).cumsum(1)
    )
    left, right = points[:, None], points[None, :]
    cost = np.where(left < right, (left + right) * first - second - left * right * zeroth, np.inf)
    least, before = cost[0], []  # of the bins from 0 to each point; and where the last of these bins starts
    for _ in range(count - 2):
        sums = least[:, None] + cost
        before.append(sums.argmin(0))
        least = np.take_along_axis(sums, before[-1][None], 0)[0]
    chosen = [len(points) - 1]
    for start in reversed(before):
        chosen.append(start[chosen[-1]])
    return points[[0, *reversed(chosen)]]


def optimal_levels(histogram: Histogram, count: int) -> np.ndarray:
    """The `count` levels on `[0, top]` that minimise the expected variance of rounding the elements of `histogram`.

    The best of the bins' edges, atoms and evenly spaced points, by dynamic programming; then the best of finer and
    finer candidates around these, down to multiples of 1 / GRID. Never worse than evenly spaced levels.

    Returns:
        float64 (count,): what `levels_text` takes.

    Raises:
        ValueError: `count` is less than 2.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    uniform = np.round(np.linspace(0, histogram.top, count) * GRID) / GRID
    fixed = np.concatenate([histogram.atoms[:, 0], uniform])
    levels = best_among(_on_grid(np.concatenate([histogram.edges, fixed])), count, histogram)
    step = histogram.top / len(histogram.mass)
    while step > 0.5 / GRID:
        step /= ZOOM / 2
        around = levels[1:-1, None] + step * np.arange(-ZOOM, ZOOM + 1)
        around = around[(around > 0) & (around < histogram.top)]
        levels = best_among(_on_grid(np.concatenate([levels, around, fixed])), count, histogram)
    return min(uniform, levels, key=lambda chosen: expected_variance(chosen, histogram))


def _on_grid(points: np.ndarray) -> np.ndarray:
    return np.unique(np.round(points * GRID)) / GRID
