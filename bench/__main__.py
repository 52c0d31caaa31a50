"""`python -m bench list | all | <case>...`: runs benchmark cases, prints their tables, writes bench/results/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import bench.cases  # noqa: F401  registers the cases
from actcompile.datasets import cache_folder
from bench.registry import CASES, Options
from bench.results import write
from bench.variants import VARIANTS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of actcompile and its baselines.")
    parser.add_argument("cases", nargs="+", choices=[*CASES, "all", "list"], metavar="case", help="or all, or list")
    parser.add_argument("--quick", action="store_true", help="tiny problems, written to the cache: do the cases work?")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[],
        choices=list(VARIANTS),
        metavar="variant",
        help=f"only these of {', '.join(VARIANTS)}; others keep their earlier results",
    )
    parser.add_argument("--data", nargs="+", default=[], help="only these graphs, in cases that have several")
    parser.add_argument("--steps", type=int, help="timed steps per variant")
    parser.add_argument("--seeds", type=int, help="seeds of statistical cases")
    parser.add_argument("--recorded", action="store_true", help="paper: tabulate the runs on record, make none")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    given = parser.parse_args(arguments)
    console = Console()
    if "list" in given.cases:
        for case in CASES.values():
            console.print(f"[bold]{case.name:12}[/bold] {case.title}")
        return 0
    default = cache_folder() / "bench-quick" if given.quick else Path(__file__).parent / "results"
    options = Options(
        given.out or default, given.quick, given.variants, given.data, given.steps, given.seeds, given.recorded, console
    )
    failed = False
    for name in CASES if "all" in given.cases else given.cases:
        console.rule(f"{name}: {CASES[name].title}")
        content = CASES[name].run(options)
        path = write(options.out, name, content)
        console.print(f"written to {path}")
        failed |= not content.get("correct", True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
