"""The cases: functions that measure something, print a table, and return what goes into their JSON file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console


@dataclass(frozen=True)
class Options:
    """What the command line hands to every case.

    quick: a tiny problem that shows that the case works, its numbers mean nothing. variants, data: which of them to
    run, all when empty. models, size: of the cases with models of the zoo. sections, device, budget in seconds: of the
    case for a GPU. steps and seeds: None for the case's own number. out: the folder of results. recorded: of cases
    that keep a record of runs, only what is in it.
    """

    out: Path
    quick: bool = False
    variants: Sequence[str] = ()
    data: Sequence[str] = ()
    models: Sequence[str] = ()
    size: str = "small"
    sections: Sequence[str] = ()
    device: str | None = None
    budget: float = 420.0
    steps: int | None = None
    seeds: int | None = None
    recorded: bool = False
    console: Console = field(default_factory=Console)

    def pick(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that were asked for, in their own order."""
        return [n for n in names if not self.variants or n in self.variants]


Run = Callable[[Options], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    name: str
    title: str
    run: Run


CASES: dict[str, Case] = {}


def case(name: str, title: str) -> Callable[[Run], Run]:
    """Registers the decorated function as a case."""

    def register(run: Run) -> Run:
        CASES[name] = Case(name, title, run)
        return run

    return register
