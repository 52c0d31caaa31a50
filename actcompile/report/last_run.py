"""The report of a compiled graph, at the sizes of its last run.

Sizes that change from batch to batch, or depend on data, have no value when a graph is compiled. A run has: AOTAutograd
keeps the sizes that forward hands to backward in the autograd node of what it returns, also where the graph came from
a cache. They are read there, as ints that are there anyway; nothing waits for the device.

What is remembered of a run's edges for the next one is asked for when the report is, while those edges live.
"""

import functools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from actcompile.kernels.edges.group import remembered_nbytes
from actcompile.passes.graph import _torch

from .data import GraphReport


class LastRun:
    """A compiled graph's report; after a run that saved something for backward, its bytes are those of that run."""

    def __init__(self, report: GraphReport) -> None:
        self._report = report
        self._sizes: tuple[int, ...] = ()
        self._edges: list[weakref.ref[Any]] = []

    @property
    def report(self) -> GraphReport:
        edges = {id(tensor): tensor for ref in self._edges if (tensor := ref()) is not None}
        remembered = sum(map(remembered_nbytes, edges.values()))
        report = self._report.at(dict(zip(self._report.handed_on, self._sizes, strict=False)))
        return replace(report, remembered=remembered)

    def watch(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, taking down the sizes and the edges of each of its runs; the same object where there are none."""
        number = len(self._report.handed_on) if self._report.sizes else 0
        grouped = self._report.grouped
        if not number and not grouped:
            return compiled

        @functools.wraps(compiled)
        def run(*inputs: Any) -> Any:
            self._edges = [weakref.ref(inputs[position]) for position in grouped]
            outputs = compiled(*inputs)
            sizes = _torch.sizes_for_backward(outputs) if number else ()
            if len(sizes) == number:
                self._sizes = sizes
            return outputs

        return run
