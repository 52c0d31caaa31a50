"""The report of a compiled graph, at the sizes of its last run.

Sizes that change from batch to batch, or depend on data, have no value when a graph is compiled. A run has: AOTAutograd
keeps the sizes that forward hands to backward in the autograd node of what it returns, also where the graph came from
a cache. They are read there, as ints that are there anyway; nothing waits for the device.
"""

import functools
from collections.abc import Callable
from typing import Any

from actcompile.passes.graph import _torch

from .report import GraphReport


class LastRun:
    """A compiled graph's report; after a run that saved something for backward, its bytes are those of that run."""

    def __init__(self, report: GraphReport) -> None:
        self._report = report
        self._sizes: tuple[int, ...] = ()

    @property
    def report(self) -> GraphReport:
        return self._report.at(dict(zip(self._report.handed_on, self._sizes, strict=False)))

    def watch(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, taking down the sizes of each of its runs; the same object where no bytes depend on them."""
        number = len(self._report.handed_on)
        if not self._report.sizes or not number:
            return compiled

        @functools.wraps(compiled)
        def run(*inputs: Any) -> Any:
            outputs = compiled(*inputs)
            sizes = _torch.sizes_for_backward(outputs)
            if len(sizes) == number:
                self._sizes = sizes
            return outputs

        return run
