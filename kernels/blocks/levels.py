"""Levels that minimise the expected variance of stochastic rounding (i-EXACT, arXiv 2309.11856, eq. 6 to 9).

A normalised element `h` of a block of `D` elements is modelled as a normal with `mu = B / 2` and
`sigma = -mu / ppf(1 / D)`, clipped to `[0, B]`. Rounding `h` in a bin `[l, r]` to one of its ends, unbiased, has
variance `(r - h)(h - l)`; the expected variance is its integral over all bins, and mass clipped to the ends has none.

The normal's levels are symmetric about `B / 2` and piecewise evenly spaced: 1, 3, 15 and 15 segments of 1, 1, 1 and 17
steps for 1, 2, 4 and 8 bits. So a value is mapped onto the code axis, and a code back, by a few clamps, which vectorise
where a table would be a gather; for up to 4 bits this is no restriction. For measured distributions, see `histogram`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import numpy as np
from scipy.special import ndtr, ndtri

from .format import GRID, LEVELS, BlockFormat, explicit_levels

SEGMENTS = {1: 1, 2: 3, 4: 15, 8: 15}
NESTED_RATIO = 64  # of slopes: up to it, nested clamps lose less than a quarter of a position's last bit

Map = tuple[float, tuple[tuple[float, ...], ...]]


class Distribution(Protocol):
    """Of a normalised element on the code axis, `[0, top]`."""

    @property
    def top(self) -> int: ...

    def integrals(self, edges: np.ndarray) -> np.ndarray:
        """float64 (3, edges - 1): the integrals of 1, h and h**2 between successive edges, which ascend in [0, top].

        Without what lies exactly at 0 or `top`: both are always levels, so that it is never rounded.
        """


@dataclass(frozen=True)
class ClippedNormal:
    """The model of an element of a block of `block` elements (i-EXACT, eq. 7), a `Distribution`."""

    top: int
    block: int

    @property
    def mu(self) -> float:
        return self.top / 2

    @property
    def sigma(self) -> float:
        return float(-self.mu / ndtri(1 / max(self.block, 3)))  # one or two are their block's ends: any model does

    def density(self, h: np.ndarray) -> np.ndarray:
        z = (h - self.mu) / self.sigma
        return np.exp(-0.5 * z**2) / (np.sqrt(2 * np.pi) * self.sigma)

    def integrals(self, edges: np.ndarray) -> np.ndarray:
        mu, sigma, density = self.mu, self.sigma, self.density(edges) * self.sigma
        zeroth = np.diff(ndtr((edges - mu) / sigma))
        first = mu * zeroth - sigma * np.diff(density)
        second = mu * first + sigma**2 * zeroth - sigma * np.diff(edges * density)
        return np.stack([zeroth, first, second])


@dataclass(frozen=True)
class HalfNormal(ClippedNormal):
    """The model of an element that ReLU has passed: zero, or the positive half of a normal; a `Distribution`.

    The largest of `block` such elements lies at `top`. Ours: i-EXACT's construction for another distribution.
    """

    @property
    def mu(self) -> float:
        return 0.0

    @property
    def sigma(self) -> float:
        return float(-self.top / ndtri(1 / max(self.block, 3)))


def expected_variance(levels: Sequence[float] | np.ndarray, distribution: Distribution) -> float:
    """Expected variance of rounding an element to `levels`, which ascend from 0 to `top` (i-EXACT, eq. 9).

    In squared steps of the uniform grid, times the distribution's mass.
    """
    edges = np.asarray(levels, dtype=np.float64)
    zeroth, first, second = distribution.integrals(edges)
    left, right = edges[:-1], edges[1:]
    return float(np.sum((left + right) * first - second - left * right * zeroth))


def normal_levels(count: int, block: int, segments: int = 0) -> np.ndarray:
    """The `count` levels on `[0, count - 1]` of least expected variance for a block modelled as a clipped normal.

    Newton's method: a level's derivative is the mean distance to the left end of its left bin less that to the right
    end of its right bin, and second derivatives couple neighbours only. It starts with levels as dense as the cube root
    of the density, the limit for many levels, from where its digits double at once.

    Args:
        count: levels, at least 2.
        block: elements of a block.
        segments: evenly spaced segments that the levels are held to, a divisor of `count - 1`; 0: every level is free.

    Returns:
        float64 (count,): multiples of 1 / GRID, symmetric to the bit; so every machine finds the same ones.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    segments = _segment_count(count, segments)
    top, steps, free = count - 1, (count - 1) // segments, (segments - 1) // 2
    hats = _hats(count, segments)[:, :free]
    levels = _minimum(ClippedNormal(top, block), segments, hats - hats[::-1])
    half = np.round(levels[: steps * (free + 1) : steps] * (GRID / steps)) * (steps / GRID)
    return _even(np.concatenate([half, [top / 2] * (1 - segments % 2), top - half[::-1]]), steps)


def half_normal_levels(count: int, block: int, segments: int = 0) -> np.ndarray:
    """As `normal_levels`, for a block modelled as a `HalfNormal`; denser towards zero."""
    segments = _segment_count(count, segments)
    steps = (count - 1) // segments
    levels = _minimum(HalfNormal(count - 1, block), segments, _hats(count, segments))
    return _even(np.round(levels[::steps] * (GRID / steps)) * (steps / GRID), steps)


def _segment_count(count: int, segments: int) -> int:
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    if segments < 0 or (count - 1) % (segments or 1):
        raise ValueError(f"segments must divide count - 1 = {count - 1}, got {segments}")
    return segments or count - 1


def _hats(count: int, segments: int) -> np.ndarray:
    """(count, segments - 1): how the levels follow the inner ends of their segments."""
    place = np.arange(count) / ((count - 1) // segments)
    return np.maximum(0, 1 - abs(place[:, None] - np.arange(1, segments)))


def _minimum(model: ClippedNormal, segments: int, moves: np.ndarray) -> np.ndarray:
    """Newton's method for the levels of least expected variance, along the columns of `moves`."""
    wide = np.sqrt(3) * model.sigma
    shares = np.linspace(ndtr(-model.mu / wide), ndtr((model.top - model.mu) / wide), segments + 1)
    ends = model.mu + wide * ndtri(shares)
    levels = np.interp(np.arange(len(moves)) / (model.top // segments), np.arange(segments + 1), ends)
    step = np.ones(moves.shape[1])
    while step.size and np.abs(step).max() > 1e-8:
        gradient, hessian = _derivatives(levels, model)
        step = np.linalg.solve(moves.T @ hessian @ moves, -moves.T @ gradient)
        levels = levels + moves @ step
    return levels


def _even(ends: np.ndarray, steps: int) -> np.ndarray:
    """Levels in `steps` even steps between successive ends."""
    return np.concatenate([[0.0], np.cumsum(np.repeat(np.diff(ends) / steps, steps))])


def _derivatives(levels: np.ndarray, model: ClippedNormal) -> tuple[np.ndarray, np.ndarray]:
    """Gradient (count,) and Hessian (count, count) of `expected_variance` by the levels; zero for the two ends."""
    zeroth, first, _ = model.integrals(levels)
    gradient, hessian = np.zeros(len(levels)), np.zeros((len(levels), len(levels)))
    gradient[1:-1] = (first - levels[:-1] * zeroth)[:-1] - (levels[1:] * zeroth - first)[1:]
    inner = np.arange(1, len(levels) - 1)
    hessian[inner, inner] = (levels[2:] - levels[:-2]) * model.density(levels[1:-1])
    hessian[inner[:-1], inner[1:]] = hessian[inner[1:], inner[:-1]] = -zeroth[1:-1]
    return gradient, hessian


@lru_cache
def level_values(bits: int, block: int, levels: str) -> tuple[float, ...]:
    """The `2**bits` levels on the code axis `[0, 2**bits - 1]`, ascending; `levels` as in `BlockFormat`."""
    if levels == "uniform":
        return tuple(float(k) for k in range(2**bits))
    if levels not in LEVELS:
        return explicit_levels(levels, bits)
    solve = half_normal_levels if levels == "half-normal" else normal_levels
    return tuple(float(v) for v in solve(2**bits, block, SEGMENTS[bits]))


@lru_cache
def encode_map(fmt: BlockFormat) -> Map:
    """`(slope, ((lower, upper, change), ...))` from the value axis, scaled by 256, to the code axis, scaled by 256.

    All constants are exact in float32, so that every backend computes with the same numbers.
    """
    if fmt.levels == "uniform":
        return 1.0, ()
    steps, ends = _segments(fmt)
    return _clamps([steps / (right - left) for left, right in pairwise(ends)], [256 * e for e in ends])


@lru_cache
def decode_map(fmt: BlockFormat) -> Map:
    """`(slope, ((lower, upper, change), ...))` from a code to its level, both on `[0, 2**bits - 1]`."""
    if fmt.levels == "uniform":
        return 1.0, ()
    steps, ends = _segments(fmt)
    return _clamps([(right - left) / steps for left, right in pairwise(ends)], [k * steps for k in range(len(ends))])


def _segments(fmt: BlockFormat) -> tuple[int, tuple[float, ...]]:
    """Steps of each evenly spaced segment of the levels, and the segments' ends."""
    steps = fmt.top // SEGMENTS[fmt.bits]
    return steps, level_values(fmt.bits, fmt.block, fmt.levels)[::steps]


def _clamps(slopes: list[float], ends: Sequence[float]) -> Map:
    """The terms of `f(t) = slope * t + sum(change * (clamp(t, lower, upper) - lower))`, piecewise linear with f(0) = 0.

    Symmetric levels nest their clamps, one for each two levels. Others have a clamp for each segment but the flattest,
    whose slope is the rest's baseline: no change is negative, so nothing cancels, the map is monotone in float32, too,
    and beyond the last end, which an element may pass by its own rounding, it is flat enough never to leave the codes.
    """
    top = ends[-1]
    if slopes == slopes[::-1] and max(slopes) <= NESTED_RATIO * min(slopes):
        slope = slopes[0]
        terms = [(ends[k], top - ends[k], slopes[k] - slopes[k - 1]) for k in range(1, (len(slopes) + 1) // 2)]
    else:
        slope = min(slopes)
        terms = [(left, right, s - slope) for (left, right), s in zip(pairwise(ends), slopes, strict=True)]
    return _f32(slope), tuple(tuple(_f32(v) for v in term) for term in terms if term[2])


def _f32(value: float) -> float:
    return float(np.float32(value))


def apply_map(t, mapping: Map):
    """Evaluates an `encode_map` or `decode_map` on a tensor, in the order of operations that every backend follows."""
    slope, terms = mapping
    if slope == 1.0 and not terms:
        return t
    result = t * slope
    for lower, upper, change in terms:
        result = result + (t.clamp(lower, upper) - lower) * change
    return result
