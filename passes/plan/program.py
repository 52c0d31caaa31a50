"""One way to keep for each saved activation, as an integer program: peak, noise and time, each as objective or bound.

    minimise  f(x)   over x[a, w] in {0, 1}, sum over w of x[a, w] = 1 for each activation a,
    so that   base[t] + sum of held[a, w, t] x[a, w] <= peak      at every position t of the step,
              sum of noise[a, w] x[a, w] <= noise,    sum of seconds[a, w] x[a, w] <= seconds,

where f is one of the three, and the two others, and bytes, break ties. SciPy's HiGHS solves it; `greedy` is there to
compare with, and to fall back on when time is up. Nothing in it knows graphs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, hstack

Objective = Literal["peak", "noise", "seconds"]
TIE = 1e-4  # weight of what breaks ties, relative to the objective's own range


@dataclass(frozen=True)
class Way:
    """One way to keep one activation.

    Attributes:
        held: bytes, with the first and the last position of the step between which they are alive; several.
        noise: what it adds to the squared relative error of the gradients.
        seconds: what it adds to a step.
    """

    held: tuple[tuple[int, int, int], ...]
    noise: float
    seconds: float


@dataclass(frozen=True)
class Demands:
    """Upper bounds; infinite where there is none."""

    peak: float = math.inf
    noise: float = math.inf
    seconds: float = math.inf


@dataclass(frozen=True)
class Solution:
    """The number of the way that each activation takes, and what that gives.

    Attributes:
        gap: by how much the objective may be above the best there is, relative; infinite for `greedy`.
    """

    picks: tuple[int, ...]
    peak: int
    noise: float
    seconds: float
    gap: float = 0.0

    def of(self, objective: Objective) -> float:
        return getattr(self, objective)  # type: ignore[no-any-return]


class Program:
    """The program of some activations.

    Args:
        base: live bytes at each position of the step, without what is saved between forward and backward.
        activations: the ways of each; at least one.
    """

    def __init__(self, base: Sequence[int], activations: Sequence[Sequence[Way]]) -> None:
        self.activations = activations
        ways = [way for ways in activations for way in ways]
        self.first = np.cumsum([0, *map(len, activations)])[:-1]
        self.owner = np.repeat(np.arange(len(activations)), [len(w) for w in activations])
        self.noise = np.array([w.noise for w in ways], dtype=np.float64)
        self.seconds = np.array([w.seconds for w in ways], dtype=np.float64)
        self.bytes = np.array([sum(n for n, _, _ in w.held) for w in ways], dtype=np.float64)
        held = np.zeros((len(base), len(ways)))
        for column, way in enumerate(ways):
            for nbytes, begin, end in way.held:
                held[begin : end + 1, column] += nbytes
        self.base, self.held = _distinct(np.array(base, dtype=np.float64), held)

    def evaluate(self, picks: Sequence[int], gap: float = 0.0) -> Solution:
        columns = self.first + np.array(picks, dtype=np.int64)
        live = self.base + self.held[:, columns].sum(1)
        return Solution(
            tuple(int(p) for p in picks),
            int(live.max(initial=0)),
            float(self.noise[columns].sum()),
            float(self.seconds[columns].sum()),
            gap,
        )

    def solve(self, objective: Objective, demands: Demands, limit: float = 5.0) -> Solution | None:
        """The best there is, or None where nothing meets the demands.

        Args:
            limit: seconds after which the best one found is taken, with its gap.
        """
        if not self.activations:
            found = self.evaluate(())
            return found if meets(found, demands) else None
        ways = len(self.owner)
        unit = max(float(self.base.max()), float(self.held.sum(1).max()), 1.0)  # so that rows are near 1
        cost = sum(self._ties(objective), start=np.zeros(ways))
        peak_cost = 1.0 if objective == "peak" else 0.0
        one = csr_matrix((np.ones(ways), (self.owner, np.arange(ways))))
        rows = [LinearConstraint(hstack([one, csr_matrix((len(self.activations), 1))]), 1, 1)]
        live = hstack([csr_matrix(self.held / unit), csr_matrix(-np.ones((len(self.base), 1)))])
        rows.append(LinearConstraint(live, -np.inf, -self.base / unit))
        for values, bound in ((self.noise, demands.noise), (self.seconds, demands.seconds)):
            if math.isfinite(bound):
                scale = max(float(np.abs(values).max()), 1e-300)
                rows.append(LinearConstraint(csr_matrix(np.append(values / scale, 0.0)), -np.inf, bound / scale))
        top = demands.peak / unit if math.isfinite(demands.peak) else np.inf
        result = milp(
            np.append(cost, peak_cost),
            integrality=np.append(np.ones(ways), 0),
            bounds=Bounds(np.zeros(ways + 1), np.append(np.ones(ways), top)),
            constraints=rows,
            options={"time_limit": limit, "mip_rel_gap": 1e-6},
        )
        if result.x is None:
            return self.greedy(objective, demands) if result.status == 1 else None  # 1: time is up
        picks = [int(np.argmax(result.x[a : a + len(w)])) for a, w in zip(self.first, self.activations, strict=True)]
        return self.evaluate(picks, float(result.mip_gap or 0.0))

    def _ties(self, objective: Objective) -> list[np.ndarray]:
        """The objective by way, unless it is the peak, and the others with small weights, relative to their ranges."""
        costs = []
        order = [objective, *(o for o in ("noise", "seconds", "bytes") if o != objective)]
        weight = 1.0
        for name in order:
            if name != "peak":
                values = getattr(self, name)
                above = values - np.minimum.reduceat(values, self.first)[self.owner]
                span = float(np.maximum.reduceat(above, self.first).sum())
                costs.append(above * (weight / span) if span else above)
            weight *= TIE
        return costs

    def greedy(self, objective: Objective, demands: Demands) -> Solution | None:
        """Each activation's best way, then whichever change brings most towards the demands for its price, one by one.

        None where it ends without meeting them.
        """
        if not self.activations:
            return self.solve(objective, demands)
        value = self.bytes if objective == "peak" else getattr(self, objective)
        price = value / max(float(value.max()), 1e-300) + TIE * self.bytes / max(float(self.bytes.max()), 1e-300)
        picks = np.array([a + int(np.argmin(price[a : a + len(w)])) for a, w in self._groups()])
        for _ in range(len(self.owner) * 2):
            live = self.base + self.held[:, picks].sum(1)
            row = int(np.argmax(live))
            now = picks[self.owner]
            gain = np.zeros(len(self.owner))
            violated = False
            for amount, bound, values in (
                (live[row], demands.peak, self.held[row]),
                (self.noise[picks].sum(), demands.noise, self.noise),
                (self.seconds[picks].sum(), demands.seconds, self.seconds),
            ):
                if amount > bound:
                    violated = True
                    gain += np.minimum((values[now] - values) / (amount - bound), 1.0)
            if not violated:
                return self.evaluate(picks - self.first, math.inf)
            worth = np.where(gain > 0, gain / np.maximum(price - price[now], 1e-9), -1.0)
            best = int(np.argmax(worth))
            if worth[best] <= 0:
                return None
            picks[self.owner[best]] = best
        return None

    def _groups(self) -> Iterable[tuple[int, Sequence[Way]]]:
        return zip((int(a) for a in self.first), self.activations, strict=True)


def meets(solution: Solution, demands: Demands) -> bool:
    """Whether a solution is within the demands."""
    return all(solution.of(o) <= getattr(demands, o) for o in ("peak", "noise", "seconds"))


def _distinct(base: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of positions at which the same ways hold the same, the one with most bytes beside: others bound nothing."""
    if not len(base):
        return np.zeros(1), np.zeros((1, held.shape[1]))
    rows, inverse = np.unique(held, axis=0, return_inverse=True)
    most = np.full(len(rows), -np.inf)
    np.maximum.at(most, inverse.reshape(-1), base)
    return most, rows
