"""What a step of training would take, from shapes alone: nothing is allocated, and nothing runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from scipy.optimize import brentq
from torch import Tensor, nn

from actcompile.passes.graph._torch import pytree

from .api import explain
from .config import Config
from .report.text import human, share

STEP = math.log(4)  # of the search for a bracket
LEAST = 1e-6
PLAIN, OURS = "torch.compile", "actcompile"


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step, without us and with.

    Attributes:
        alive: parameters, buffers and inputs: there before the step and after it.
        saved_before, saved_after: saved for backward.
        peak_before, peak_after: the step's peak over what is alive, gradients included; the optimiser's state is not.
        error: relative error that rounding adds to the gradients, where bounds were given or noise was measured.
    """

    alive: int
    saved_before: int
    saved_after: int
    peak_before: int
    peak_after: int
    error: float | None = None

    def total(self, who: str) -> int:
        """What is alive and the peak together."""
        return self.alive + (self.peak_before if who == PLAIN else self.peak_after)

    def __rich__(self) -> RenderableType:
        table = Table(box=None, padding=(0, 3, 0, 0))
        for title in ("", "saved for backward", "peak of a step", "with inputs and parameters"):
            table.add_column(title, justify="right" if title else "left")
        for who, saved, peak in (
            (PLAIN, self.saved_before, self.peak_before),
            (OURS, self.saved_after, self.peak_after),
        ):
            table.add_row(who, *map(human, (saved, peak, self.total(who))))
        lines = [Text(f"error of the gradients by rounding: {share(self.error)}")] if self.error is not None else []
        return Group(table, *lines)


def estimate(model: nn.Module, *inputs: Any, config: Config | None = None, **options: Any) -> Estimate:
    """Tells what a training step of `model` would take, without allocating or running it.

        with torch.device("meta"):
            model, x, edge_index = Net(), torch.empty(10**8, 128), torch.empty(2, 10**9, dtype=torch.int64)
        print(actcompile.estimate(model, x, edge_index).peak_after)

    It is `explain`'s prediction of live bytes, for the CPU's kernels. Of several graphs, the largest peak counts, and
    what the others save beside.

    Args:
        model: a module, its parameters on any device, "meta" among them.
        inputs: what it is called with; meta or fake tensors will do.
        config, options: as in `explain`; bounds such as `budget` are planned for.
    """
    made = Config.make(config, **options)
    report = explain(model, *inputs, config=made)
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    alive = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers(), *tensors])

    def peak(which: str) -> int:
        saved = sum(getattr(g, f"bytes_{which}") for g in report.graphs)
        peaks = [getattr(g, f"memory_{which}").peak - getattr(g, f"bytes_{which}") for g in report.graphs]
        return saved + max(peaks, default=0)

    errors = [g.outlook.error for g in report.graphs if g.outlook is not None]
    error = sum(e * e for e in errors) ** 0.5 if errors else None
    return Estimate(alive, report.saved_bytes_before, report.saved_bytes_after, peak("before"), peak("after"), error)


def largest(need: Callable[[float], int], memory: int, start: float = 1.0, whole: bool = False) -> float:
    """The largest argument at which `need`, which grows with it, is at most `memory`, to half a per cent; 0 for none.

    Args:
        need: bytes, of a positive argument.
        start: where the search begins.
        whole: only whole numbers, of at least 1, and the very largest.
    """

    @functools.cache
    def excess(argument: float) -> float:
        return math.log(need(argument) / memory)

    def taken(exponent: float) -> float:
        return excess(max(1, round(math.exp(exponent))) if whole else math.exp(exponent))

    low = high = math.log(start)
    while taken(high) <= 0:
        high += STEP
    while taken(low) > 0:
        if low < math.log(1.0 if whole else LEAST):
            return 0.0
        low -= STEP
    found: float = brentq(taken, low, high, xtol=1e-9 if whole else 0.005)
    if not whole:
        return math.exp(found if taken(found) <= 0 else found - 0.005)
    number = round(math.exp(found)) + 1
    while excess(number) > 0:
        number -= 1
    return float(number)


def deepest(need: Callable[[int], int], memory: int, first: int = 8) -> int:
    """The number of layers that fit, from the bytes that each layer adds: those of `2 * first` beyond `first`.

    Deep models take long to trace, and every layer but the first and the last is like the one before.
    """
    few, many = need(first), need(2 * first)
    if memory < few:
        return int(largest(lambda k: need(int(k)), memory, whole=True))
    each = max((many - few) / first, 1.0)
    return first + int((memory - few) / each)


def fits(of: Callable[..., Estimate], memory: int, nodes: int, layers: int, hidden: int) -> Table:
    """A table of how many nodes, how many layers and what width fit into a memory, without us and with.

    Args:
        of: the estimate for `scale`, of nodes and edges, `layers` and `hidden`; each as it is where not given.
    """
    table = Table(box=None, padding=(0, 3, 0, 0))
    for title in (f"fits into {memory:,} bytes", "nodes", f"layers of {hidden}", f"width of {layers} layers"):
        table.add_column(title, justify="left" if title.startswith("fits") else "right")
    for who in (PLAIN, OURS):
        scale, depth, width = _most(of, who, memory, hidden)
        table.add_row(who, f"{int(nodes * scale):,}", f"{depth:,}", f"{width:,}")
    return table


def _most(of: Callable[..., Estimate], who: str, memory: int, hidden: int) -> tuple[float, int, int]:
    scale = largest(lambda scale: of(scale=scale).total(who), memory)
    depth = deepest(lambda layers: of(layers=layers).total(who), memory)
    width = largest(lambda width: of(hidden=max(1, int(width))).total(who), memory, hidden)
    return scale, depth, int(width)


def meta_inputs(nodes: int, edges: int, features: int) -> tuple[Tensor, Tensor]:
    """Features and edges of a graph that takes no memory."""
    x = torch.empty(nodes, features, device="meta")
    return x, torch.empty(2, edges, dtype=torch.int64, device="meta")
