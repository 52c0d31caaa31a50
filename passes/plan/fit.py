"""`fit`: the plan that is best within bounds on peak memory, gradient noise and time, by the program of `program`.

The rule table says what may be rounded, and in how many bits at least; here each float that it rounds may take more
bits, other blocks, or stay exact. What it keeps or stores without loss stays so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from actcompile.kernels.blocks.format import BITS

from ..codecs.codecs import EXACT, Keep, Quantize
from ..codecs.encode import part_names
from ..graph.split import Split, root
from .costs import Noise, Speeds
from .formats import fit_format
from .memory import Lifetime, lifetimes, live_bytes
from .plan import Choice, Plan, bits_of, nbytes_with
from .policy import Policy
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


@dataclass(frozen=True)
class Point:
    """A plan's peak in bytes, the relative error of gradients, and the seconds that encoding and decoding take."""

    peak: int
    error: float
    seconds: float


@dataclass(frozen=True)
class Fitted:
    """The ways that differ from the rules', by key, what they give, what greedy would have given, and the front."""

    ways: Mapping[str, Choice]
    point: Point
    greedy: Point | None
    gap: float
    front: tuple[Point, ...]
    measured: bool


class Impossible(ValueError):
    """No plan is what the config asks for; the message says why, and what would be."""


def ways_of(choice: Choice, plan: Plan, policy: Policy, blocks: Sequence[int] = BLOCKS) -> list[Choice]:
    """What the rules chose for an activation, first, and what may be chosen instead.

    Args:
        plan: the rules' plan, of which `choice` is a part.
        blocks: sizes that blocks may have.
    """
    activation, codec, dependence = choice.activation, choice.codec, choice.dependence
    policy = policy.for_module(activation.module)
    if not isinstance(codec, Quantize) or codec.columns or policy.rows_per_block or policy.fitted:
        return [choice]
    least = 1
    if dependence is not None and dependence.biased:
        least = bits_of(dependence, activation.value, policy) or 8
    saved = {c.activation.node for c in plan.choices}
    others = {}
    for bits in (b for b in BITS if b >= least):
        for block in blocks:
            other = replace(
                codec, format=fit_format(activation, bits, replace(policy, block=block), signed=codec.standardised)
            )
            nbytes = nbytes_with(other, activation, saved)
            if other != codec and nbytes < activation.nbytes:
                others[other] = replace(choice, codec=other, nbytes=nbytes)
    exact = replace(choice, codec=Keep(), nbytes=activation.nbytes)
    return [choice, *others.values(), exact]


class Fit:
    """The program of a graph, from its trial: written by the rules' own plan, whose other choices fit in its place.

    Encoded, an activation is alive from where it is encoded to where it is decoded last. Kept, it is so from where
    forward reads it last, as far as it isn't alive there anyway, up to where it would be decoded last: what is decoded
    there stands for it from then on.
    """

    def __init__(self, trial: Split, plan: Plan, policy: Policy, fuses: bool, noise: Noise, speeds: Speeds) -> None:
        self.rules, self.noise, self.speeds = plan, noise, speeds
        self.choices = [ways_of(choice, plan, policy) for choice in plan.choices]
        self.total = max(sum(c.activation.numel for c in plan.choices if isinstance(c.codec, Quantize)), 1)
        found = lifetimes(trial, fuses)
        memory = {m.node: m for m in found}
        encoded = {}  # by activation
        for choices in self.choices:
            if len(choices) > 1:
                names = part_names(choices[0].activation)
                encoded[choices[0].activation.node] = [
                    memory[node] for node, placeholder in trial.pairs if placeholder.name in names and node in memory
                ]
        start = len(trial.forward.graph.nodes)
        decoders = (torch.ops.actcompile.dequantize.default,)
        self.decoded = {start + i for i, n in enumerate(trial.backward.graph.nodes) if n.target in decoders}
        ours = {m.node for parts in encoded.values() for m in parts}
        positions = len(trial.forward.graph.nodes) + len(trial.backward.graph.nodes)
        base = live_bytes((m for m in found if m.node not in ours), positions)
        self.program = Program(
            base,
            [[self._way(c, encoded.get(c.activation.node, []), memory) for c in choices] for choices in self.choices],
        )

    def _way(self, choice: Choice, parts: Sequence[Lifetime], memory: Mapping[fx.Node, Lifetime]) -> Way:
        activation, codec = choice.activation, choice.codec
        noise = self.noise.of(activation.key, codec, activation.numel / self.total)
        seconds = self.speeds.seconds(codec, activation.numel)
        if not parts:
            return Way((), noise, seconds)
        first, last = min(m.first for m in parts), max(m.last for m in parts)
        if isinstance(codec, Keep):
            own = memory.get(root(activation.node))
            begin, end = first if own is None else own.last + 1, last - (last in self.decoded)
            return Way(((activation.nbytes, begin, end),) if begin <= end else (), noise, seconds)
        return Way(((choice.nbytes, first, last),), noise, seconds)

    @property
    def measured(self) -> bool:
        """Whether the noise of every way to round was measured."""
        rounding = [c for choices in self.choices for c in choices if not isinstance(c.codec, EXACT)]
        return all(self.noise.knows(c.activation.key, c.codec) for c in rounding)

    def of_rules(self) -> Fitted:
        """The rules' own plan."""
        point = _point(self.program.evaluate([0] * len(self.choices)))
        return Fitted({}, point, None, 0.0, self.front(), self.measured)

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
        return Fitted(self._ways(found), _point(found), near, found.gap, self.front(), self.measured)

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

    def _ways(self, solution: Solution) -> dict[str, Choice]:
        """By the activation's key, what is chosen of several ways."""
        chosen = {}
        for choices, ways, pick in zip(self.choices, self.program.activations, solution.picks, strict=True):
            if len(choices) > 1:
                reason = f"{choices[0].reason}; {self._over(choices, ways, pick)}"
                chosen[choices[0].activation.key] = replace(choices[pick], reason=reason)
        return chosen

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
