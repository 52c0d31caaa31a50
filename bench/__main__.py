"""`python -m bench list | all | <case>...`: runs benchmark cases, prints their tables, writes bench/results/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import bench.cases  # noqa: F401  registers the cases
from actcompile.datasets import cache_folder
from bench.cases.gpu import SECTIONS
from bench.registry import CASES, Options
from bench.results import write
from bench.variants import VARIANTS
from bench.zoo import ZOO


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
    parser.add_argument("--models", nargs="+", default=[], choices=list(ZOO), metavar="model", help="models: only these")
    parser.add_argument("--size", default="small", choices=["tiny", "small", "arxiv"], help="models: of graph and layers")
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="the same as --size tiny")
    parser.add_argument("--sections", nargs="+", default=[], choices=SECTIONS, metavar="section", help="gpu: only these")
    parser.add_argument("--device", help="gpu: the device, cuda by default")
    parser.add_argument("--budget", type=float, default=420.0, help="gpu: seconds after which nothing new is begun")
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
    given.out = given.out or (cache_folder() / "bench-quick" if given.quick else Path(__file__).parent / "results")
    names = list(CASES) if "all" in given.cases else given.cases
    options = Options(console=console, **{k: v for k, v in vars(given).items() if k != "cases"})
    failed = False
    for name in names:
        console.rule(f"{name}: {CASES[name].title}")
        content = CASES[name].run(options)
        if "skipped" in content:
            console.print(content["skipped"])
            failed |= name in given.cases
            continue
        path = write(options.out, content.pop("file", name), content)
        console.print(f"written to {path}")
        failed |= not content.get("correct", True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
