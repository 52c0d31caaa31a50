"""Levels that minimise the expected variance of stochastic rounding (i-EXACT, arXiv 2309.11856, eq. 6 to 9).

A normalised element `h` of a block of `D` elements is modelled as a normal with `mu = B / 2` and
`sigma = -mu / ppf(1 / D)`, clipped to `[0, B]`. Rounding `h` in a bin `[l, r]` to one of its ends, unbiased, has
variance `(r - h)(h - l)`; the expected variance is its integral over all bins, and mass clipped to the ends has none.

Levels are symmetric about `B / 2` and piecewise evenly spaced: 1, 3, 15 and 15 segments of 1, 1, 1 and 17 steps for 1,
2, 4 and 8 bits. So a value is mapped onto the code axis, and a code back, by a few clamps, which vectorise where a
table would be a gather; for up to 4 bits this is no restriction.
"""

from functools import lru_cache

import numpy as np
from scipy.optimize import minimize
from scipy.special import ndtr, ndtri

from .format import BlockFormat, Levels

SEGMENTS = {1: 1, 2: 3, 4: 15, 8: 15}


def clipped_normal(bits: int, block: int) -> tuple[float, float]:
    """Mean and standard deviation, on the code axis, that model a block of `block` elements (i-EXACT, eq. 7)."""
    mu = (2**bits - 1) / 2
    return mu, float(-mu / ndtri(1 / max(block, 3)))  # one or two elements are their block's ends: any model does


def _normal_moments(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The integrals of 1, z and z**2 under the standard normal between successive edges, in closed form."""
    density = np.exp(-0.5 * edges**2) / np.sqrt(2 * np.pi)
    mass = ndtr(edges)
    zeroth = np.diff(mass)
    return zeroth, -np.diff(density), zeroth - np.diff(edges * density)


def expected_variance(levels: np.ndarray, bits: int, block: int) -> float:
    """Expected variance of rounding one element to `levels`, in squared steps of the uniform grid (i-EXACT, eq. 9)."""
    mu, sigma = clipped_normal(bits, block)
    z = (np.asarray(levels, dtype=np.float64) - mu) / sigma
    zeroth, first, second = _normal_moments(z)
    left, right = z[:-1], z[1:]
    return float(sigma**2 * np.sum((left + right) * first - second - left * right * zeroth))


def _from_half_widths(log_widths: np.ndarray, bits: int) -> np.ndarray:
    """Levels from the logarithms of the segments' widths, outermost first, the middle one fixed to width one."""
    outer = np.exp(log_widths)
    widths = np.concatenate([outer, [1.0], outer[::-1]])
    steps = np.repeat(widths, (2**bits - 1) // len(widths))
    return np.concatenate([[0.0], np.cumsum(steps)]) * ((2**bits - 1) / steps.sum())


@lru_cache
def level_values(bits: int, block: int, levels: Levels) -> tuple[float, ...]:
    """The `2**bits` levels on the code axis `[0, 2**bits - 1]`, ascending."""
    uniform = tuple(float(k) for k in range(2**bits))
    free = SEGMENTS[bits] // 2
    if levels == "uniform" or free == 0:
        return uniform
    found = minimize(
        lambda w: expected_variance(_from_half_widths(w, bits), bits, block) * 4**bits,
        np.zeros(free),
        method="BFGS",
        options={"gtol": 1e-9},
    )
    values = _from_half_widths(found.x, bits)
    if expected_variance(values, bits, block) >= expected_variance(np.array(uniform), bits, block):
        return uniform
    return tuple(float(v) for v in values)


def _clamps(widths: list[float], positions: list[float], top: float) -> tuple[float, tuple[tuple[float, ...], ...]]:
    """`f(t) = slope * t + sum(change * (clamp(t, lower, upper) - lower))` for symmetric piecewise linear `f`."""
    terms = []
    for k in range(1, len(widths) // 2 + 1):
        terms.append((positions[k], top - positions[k], widths[k] - widths[k - 1]))
    return _f32(widths[0]), tuple(tuple(_f32(v) for v in term) for term in terms)


def _f32(value: float) -> float:
    return float(np.float32(value))


@lru_cache
def encode_map(fmt: BlockFormat) -> tuple[float, tuple[tuple[float, ...], ...]]:
    """`(slope, ((lower, upper, change), ...))` from the value axis, scaled by 256, to the code axis, scaled by 256.

    All constants are exact in float32, so that every backend computes with the same numbers.
    """
    if fmt.levels == "uniform" or SEGMENTS[fmt.bits] == 1:
        return 1.0, ()
    values = level_values(fmt.bits, fmt.block, fmt.levels)
    steps = fmt.top // SEGMENTS[fmt.bits]
    edges = list(values[::steps])
    slopes = [steps / (right - left) for left, right in zip(edges, edges[1:], strict=False)]
    return _clamps(slopes, [256 * e for e in edges], 256.0 * fmt.top)


@lru_cache
def decode_map(fmt: BlockFormat) -> tuple[float, tuple[tuple[float, ...], ...]]:
    """`(slope, ((lower, upper, change), ...))` from a code to its level, both on `[0, 2**bits - 1]`."""
    if fmt.levels == "uniform" or SEGMENTS[fmt.bits] == 1:
        return 1.0, ()
    values = level_values(fmt.bits, fmt.block, fmt.levels)
    steps = fmt.top // SEGMENTS[fmt.bits]
    edges = list(values[::steps])
    slopes = [(right - left) / steps for left, right in zip(edges, edges[1:], strict=False)]
    return _clamps(slopes, [float(k * steps) for k in range(len(edges))], float(fmt.top))


def apply_map(t, mapping):
    """Evaluates an `encode_map` or `decode_map` on a tensor, in the order of operations that every backend follows."""
    slope, terms = mapping
    if slope == 1.0 and not terms:
        return t
    result = t * slope
    for lower, upper, change in terms:
        result = result + (t.clamp(lower, upper) - lower) * change
    return result
