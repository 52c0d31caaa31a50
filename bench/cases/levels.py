"""Levels that minimise the variance of stochastic rounding, for blocks of D elements, solved from the integral."""

from __future__ import annotations

from typing import Any

import numpy as np

from actcompile.kernels.blocks.levels import SEGMENTS, ClippedNormal, expected_variance, normal_levels
from bench.registry import Options, case
from bench.results import show

# D: (inner level a, percent less variance than uniform levels), as solved independently by quadrature
KNOWN = {
    4: (1.0109, 0.07),
    8: (1.0300, 0.61),
    16: (1.0500, 1.84),
    32: (1.0689, 3.78),
    64: (1.0861, 6.33),
    128: (1.1017, 9.34),
    256: (1.1156, 12.66),
    512: (1.1281, 16.16),
    1024: (1.1393, 19.71),
    2048: (1.1495, 23.22),
}
BITS = (1, 2, 3, 4, 8)


@case("levels", "variance-minimising levels by block size, and what they gain over uniform ones, for 1 to 4 and 8 bits")
def run(options: Options) -> dict[str, Any]:
    results = {block: {bits: gain(bits, block) for bits in BITS} for block in KNOWN}
    rows = [
        [str(block), f"{inner_level(block):.4f}", f"{KNOWN[block][0]:.4f}", *(f"{100 * g:.2f}" for g in gains.values())]
        for block, gains in results.items()
    ]
    header = ["D", "a, 2 bits", "a, by quadrature", "1 bit", *(f"{bits} bits" for bits in BITS[1:])]
    show(options.console, "levels 0, a, 3 - a, 3, and the variance that levels save, %", header, rows)
    correct = all(
        abs(inner_level(block) - a) < 1e-3 and abs(100 * results[block][2] - percent) < 0.01
        for block, (a, percent) in KNOWN.items()
    )
    return {
        "settings": {"blocks": list(KNOWN)},
        "levels": {block: {"a": inner_level(block), "less_variance": gains} for block, gains in results.items()},
        "correct": correct,
    }


def inner_level(block: int) -> float:
    return float(normal_levels(4, block)[1])


def gain(bits: int, block: int) -> float:
    """The part of the uniform levels' expected variance that the variance-minimising ones save."""
    model = ClippedNormal(2**bits - 1, block)
    ours = normal_levels(2**bits, block, segments=SEGMENTS.get(bits, 0))
    return 1 - expected_variance(ours, model) / expected_variance(np.arange(2.0**bits), model)
