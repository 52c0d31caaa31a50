"""Is the mean of a randomly rounded gradient the exact one? Errors over many draws, and a test of their mean.

A bias can point anywhere, and a gradient has many correlated elements. So the first draws choose a direction, that of
their mean error, and the other draws, which are independent of it, are tested along it: Student's t-test, valid
whatever the correlations, and sharp, since a bias of any direction shows itself in the first draws. A second test looks
along the exact gradient, where a shrunken one shows. Samples are sums over many independently rounded elements, and so
nearly normal.
"""

from __future__ import annotations

import torch
from scipy.stats import norm, t
from torch import Tensor

MOST = 37.0  # standard deviations: the last for which a float64 has a probability


class Errors:
    """The errors of one gradient over many draws; keeps a few vectors of its size, not one for each draw.

    Args:
        exact: the gradient without rounding, any shape.
        choosing: number of draws that choose the direction along which the others are tested.
        resolution: norm of what the arithmetic alone may add to an error, which is no bias.
    """

    def __init__(self, exact: Tensor, choosing: int, resolution: float) -> None:
        self.exact = exact.double().reshape(-1)
        self.choosing = choosing
        self.resolution = resolution
        self.total = torch.zeros_like(self.exact)
        self.squares = 0.0
        self.draws = 0
        self.direction = torch.zeros_like(self.exact)
        self.along_direction: list[float] = []
        self.along_exact: list[float] = []
        self.finite = True

    def add(self, rounded: Tensor) -> None:
        """Takes in one draw."""
        error = rounded.double().reshape(-1) - self.exact
        self.finite = self.finite and bool(error.isfinite().all())
        if self.draws == self.choosing:
            self.direction = self.total / self.total.norm().clamp_min(1e-300)
        if self.draws >= self.choosing:
            self.along_direction.append(float(self.direction @ error))
        self.along_exact.append(float(self.exact @ error / self.exact.norm().clamp_min(1e-300)))
        self.total += error
        self.squares += float(error @ error)
        self.draws += 1

    @property
    def of_one_step(self) -> float:
        """Root mean square of the error's norm."""
        return (self.squares / self.draws) ** 0.5

    @property
    def of_the_mean(self) -> float:
        """Norm of the mean error."""
        return float(self.total.norm()) / self.draws

    @property
    def bias(self) -> float:
        """Norm of the bias, estimated: without what noise alone leaves in the norm of a mean; 0 where less is left.

        The mean of the products of two different draws, whose expectation is the bias's square.
        """
        products = float(self.total @ self.total) - self.squares
        return max(products / (self.draws * (self.draws - 1)), 0.0) ** 0.5

    @property
    def z(self) -> float:
        """The normal score, in standard deviations, of what is as improbable as these errors are without a bias."""
        if not self.finite:
            return MOST
        along = 2 * _probability(self.along_exact, self.resolution, two_sided=True)
        found = 2 * _probability(self.along_direction, self.resolution, two_sided=False)
        return score(min(along, found, 1.0))


def score(probability: float) -> float:
    """The two-sided normal score of a probability, at most `MOST`."""
    return min(float(norm.isf(probability / 2)), MOST)


def _probability(samples: list[float], resolution: float, two_sided: bool) -> float:
    """Of a mean that far from zero, by chance; `resolution` away counts as zero."""
    values = torch.tensor(samples, dtype=torch.float64)
    mean = float(values.mean())
    off = (abs(mean) if two_sided else mean) - resolution
    error = float(values.std()) / len(samples) ** 0.5
    if off <= 0:
        return 1.0
    statistic = off / error if error > 0 else float("inf")
    return min(1.0, (1 + two_sided) * float(t.sf(statistic, len(samples) - 1)))
