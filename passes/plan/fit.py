"""`fit`: the plan that is best within bounds on peak memory, gradient noise and time, by the program of `program`.

The rule table says what may be rounded, and in how many bits at least; here each float that it rounds may take more
bits, other blocks, or stay exact. What it keeps or stores without loss stays so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from actcompile.kernels.blocks.format import BITS

from ..codecs.codecs import EXACT, Keep, Quantize
from ..codecs.standardise import standard
from ..graph.find import memory_order
from ..graph.split import Split, root
from .costs import Noise, Speeds
from .memory import Lifetime, lifetimes, live_bytes
from .plan import Choice, Plan, Policy, bits_of, fit_format, let_go, statistics
from .program import Demands, Objective, Program, Solution, Way

BLOCKS = (32, 64, 128, 256)
POINTS = 8  # of the front


@dataclass(frozen=True)
class Wish:
    """What a user asks for.

    Attributes:
        peak: bytes of the step's peak at most.
        error: relative error of the gradients at most, from rounding alone.
        seconds: that encoding and decoding may add to a step.
    """

    peak: float = math.inf
    error: float = math.inf
    seconds: float = math.inf

    @property
    def demands(self) -> Demands:
        return Demands(self.peak, self.error**2, self.seconds)

    @property
    def objective(self) -> Objective:
        """What is left open is made as good as can be: noise first, within a peak; else the peak."""
        if math.isfinite(self.peak):
            return "seconds" if math.isfinite(self.error) else "noise"
        return "peak"

    def __bool__(self) -> bool:
        return any(map(math.isfinite, (self.peak, self.error, self.seconds)))


@dataclass(frozen=True)
class Point:
    """A plan's peak in bytes, the relative error of gradients, and the seconds that encoding and decoding take."""

    peak: int
    error: float
    seconds: float


@dataclass(frozen=True)
class Fitted:
    """The plan, what it gives, what greedy would have given, and the front of all plans."""

    plan: Plan
    point: Point
    greedy: Point | None
    gap: float
    front: tuple[Point, ...]
    measured: bool


class Impossible(ValueError):
    """No plan meets the demands; the message says what the smallest ones are."""


class Fit:
    """The program of a graph whose activations the rules have given their codecs."""

    def __init__(
        self,
        split: Split,
        plan: Plan,
        policy: Policy,
        fuses: bool,
        noise: Noise,
        speeds: Speeds,
        blocks: Sequence[int] = BLOCKS,
    ) -> None:
        self.rules, self.policy, self.noise, self.speeds, self.blocks = plan, policy, noise, speeds, blocks
        found = lifetimes(split, fuses)
        memory = {m.node: m for m in found}
        self.positions = len(split.forward.graph.nodes) + len(split.backward.graph.nodes)
        self.choices = [self._ways(choice) for choice in plan.choices]
        rounded = [c.activation.numel for c in plan.choices if isinstance(c.codec, Quantize)]
        self.total = max(sum(rounded), 1)
        fixed = {root(c[0].activation.node) for c in self.choices if len(c) == 1 and isinstance(c[0].codec, Keep)}
        held = {root(c[0].activation.node) for c in self.choices} - fixed
        ways = []
        for choices in self.choices:
            base_node = root(choices[0].activation.node)
            life = memory.get(base_node) if base_node in held else None
            ways.append([self._way(choice, life) for choice in choices])
        base: list[Lifetime] = []
        for m in found:
            if m.node in held and m.forward_last is not None and m.backward_first is not None:
                base += [replace(m, last=m.forward_last), replace(m, first=m.backward_first)]
            else:
                base.append(m)
        self.program = Program(live_bytes(base, self.positions), ways)

    def _ways(self, choice: Choice) -> list[Choice]:
        """What the rules chose, first, and what may be chosen instead."""
        activation, codec, dependence = choice.activation, choice.codec, choice.dependence
        policy = self.policy.for_module(activation.module)
        if not isinstance(codec, Quantize) or codec.columns or policy.rows_per_block or policy.fitted:
            return [choice]
        least = 1
        if dependence is not None and dependence.biased:
            least = bits_of(dependence, activation.value, policy) or 8
        contiguous = memory_order(activation.value) == list(range(activation.value.dim()))
        signed = policy.standardise and contiguous and standard(activation.node) is not None
        saved = {c.activation.node for c in self.rules.choices}
        others = {}
        for bits in (b for b in BITS if b >= least):
            for block in self.blocks:
                other = replace(codec, format=fit_format(activation, bits, replace(policy, block=block), signed=signed))
                nbytes = other.nbytes(activation.shape, activation.value.dtype) + statistics(other, activation, saved)
                if other != codec and nbytes < activation.nbytes:
                    others[other] = replace(choice, codec=other, nbytes=nbytes)
        exact = replace(choice, codec=Keep(), nbytes=activation.nbytes)
        return [choice, *others.values(), exact]

    def _way(self, choice: Choice, life: Lifetime | None) -> Way:
        activation, codec = choice.activation, choice.codec
        noise = self.noise.of(activation.key, codec, activation.numel / self.total)
        seconds = self.speeds.seconds(codec, activation.numel)
        if life is None or life.forward_last is None or life.backward_first is None:
            return Way((), noise, seconds)
        if isinstance(codec, Keep):
            between = (activation.nbytes, life.forward_last + 1, life.backward_first - 1)
            return Way((between,) if between[1] <= between[2] else (), noise, seconds)
        return Way(((choice.nbytes, life.first, life.backward_first),), noise, seconds)

    @property
    def measured(self) -> bool:
        """Whether the noise of every way to round was measured."""
        rounding = [c for choices in self.choices for c in choices if not isinstance(c.codec, EXACT)]
        return all(self.noise.knows(c.activation.key, c.codec) for c in rounding)

    def of_rules(self) -> Fitted:
        """The rules' own plan."""
        return Fitted(
            self.rules, _point(self.program.evaluate([0] * len(self.choices))), None, 0.0, self.front(), self.measured
        )

    def solve(self, wish: Wish) -> Fitted:
        """The best plan.

        Raises:
            Impossible: there is none.
        """
        found = self.program.solve(wish.objective, wish.demands)
        if found is None:
            raise Impossible(self._why(wish))
        quick = self.program.greedy(wish.objective, wish.demands)
        near = None if quick is None else _point(quick)
        return Fitted(self._plan(found), _point(found), near, found.gap, self.front(), self.measured)

    def front(self) -> tuple[Point, ...]:
        """Plans of least noise within falling peaks, from that which rounds nothing to the smallest there is."""
        most, least = self.program.solve("noise", Demands()), self.program.solve("peak", Demands())
        assert most is not None and least is not None
        points = {_point(most)}
        for i in range(POINTS):
            peak = least.peak + (most.peak - least.peak) * (i / (POINTS - 1)) ** 2
            if (found := self.program.solve("noise", Demands(peak=math.ceil(peak)))) is not None:
                points.add(_point(found))
        return tuple(sorted(points, key=lambda p: (p.peak, p.error)))

    def _plan(self, solution: Solution) -> Plan:
        chosen = []
        for choices, ways, pick in zip(self.choices, self.program.activations, solution.picks, strict=True):
            choice = choices[pick]
            if len(choices) > 1:
                choice = replace(choice, reason=f"{choices[0].reason}; {self._over(choices, ways, pick)}")
            chosen.append(choice)
        return Plan(tuple(let_go(chosen, self.policy.min_bytes)))

    def _over(self, choices: Sequence[Choice], ways: Sequence[Way], pick: int) -> str:
        """What a way was chosen over: the next smaller one, and what that would have cost."""
        mine = choices[pick]
        smaller = [i for i, c in enumerate(choices) if c.nbytes < mine.nbytes]
        if not smaller:
            return "planned: the smallest way there is"
        i = max(smaller, key=lambda i: (choices[i].nbytes, -ways[i].noise))
        codec = choices[i].codec
        what = f"{codec.format.bits} bits" if isinstance(codec, Quantize) else str(codec)
        saved, error = (mine.nbytes - choices[i].nbytes) / 1e6, math.sqrt(ways[i].noise)
        return f"planned: {what} would save {saved:,.2f} MB and alone make {error:.1%} error"

    def _why(self, wish: Wish) -> str:
        demands = wish.demands
        alone = {
            "peak": self.program.solve("peak", replace(demands, peak=math.inf)),
            "noise": self.program.solve("noise", replace(demands, noise=math.inf)),
            "seconds": self.program.solve("seconds", replace(demands, seconds=math.inf)),
        }
        smallest = self.program.solve("peak", Demands())
        assert smallest is not None
        if demands.peak < smallest.peak:
            return (
                f"budget: {demands.peak:,.0f} bytes asked for, but a step's peak cannot be below {smallest.peak:,}, "
                f"with everything rounded as coarsely as allowed; the smallest budget that works is {smallest.peak}"
            )
        hints = []
        if (s := alone["peak"]) is not None:
            hints.append(f"budget={s.peak}")
        if (s := alone["noise"]) is not None:
            hints.append(f"max_gradient_error={_up(math.sqrt(s.noise)):.3g}")
        if (s := alone["seconds"]) is not None:
            hints.append(f"a step that may take {_up(s.seconds):.3g} seconds longer")
        return f"budget, max_gradient_error and max_slowdown cannot all be met: what works is {', or '.join(hints)}"


def _up(value: float) -> float:
    return value * 1.01


def _point(solution: Solution) -> Point:
    return Point(solution.peak, math.sqrt(max(solution.noise, 0.0)), solution.seconds)
