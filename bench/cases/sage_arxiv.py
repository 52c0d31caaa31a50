"""Full-batch GraphSAGE on a graph of ogbn-arxiv's shape: gradients, saved bytes, peak memory and step time, side by
side for all variants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from bench import plots
from bench.measure import relative_error
from bench.pool import TIMING_ALLOCATOR, Process, WorkerFailed, alternate, memory
from bench.registry import Options, case
from bench.results import earlier, megabytes, show, write
from bench.variants import VARIANTS
from bench.workload import Workload

NAME = "sage-arxiv"
REFERENCE = "inductor"
BASELINES = ("eager", "inductor", "budget-0.5", "budget-0.2", "checkpoint", "fp8", "hooks-int8")
OURS = ("lossless", "default", "4-bit", "no-replay")
TARGETS = {"default": 14.0, "4-bit": 11.0}  # times fewer saved bytes than the reference
Tick = Callable[[str], None]


@case(NAME, "full-batch SAGE, 3 layers of 256, ogbn-arxiv's shape: every variant's gradients, bytes and seconds")
def run(options: Options) -> dict[str, Any]:
    workload = Workload()
    if options.quick:
        workload = replace(workload, nodes=4_000, edges=28_000, features=32, classes=8, hidden=64)
    names = options.pick([*BASELINES, *OURS])
    steps, seeds = options.steps or 15, options.seeds or 4
    settings = {"workload": asdict(workload), "seeds": seeds, "timing_allocator": TIMING_ALLOCATOR}
    content: dict[str, Any] = {
        "settings": settings,
        "variants": dict(earlier(options.out, NAME, settings).get("variants", {})),
    }
    results: dict[str, dict[str, Any]] = content["variants"]

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=options.console, transient=True) as progress:
        task = progress.add_task("")

        def tick(what: str) -> None:
            progress.update(task, description=what)

        tick("exact gradients")
        exact = _exact_gradients(workload)
        for name in names:
            results[name] = {"note": VARIANTS[name].note} | _check(workload, name, seeds, exact, tick)
            if results[name]["correct"]:
                tick(f"{name}: memory")
                results[name] |= memory(workload, name)
            write(options.out, NAME, content)
        sound = [n for n in names if n != REFERENCE and results[n]["correct"]]
        timed = alternate(workload, REFERENCE, sound, steps, lambda name: tick(f"{name}: seconds per step"))
    for name, timing in timed.items():
        if name in results:
            results[name] |= timing
    results = content["variants"] = {n: results[n] for n in VARIANTS if n in results}
    content["targets"] = _targets(results)
    _print(options, results, content["targets"])
    plots.bars(options.out.joinpath(f"{NAME}.svg"), _title(workload), _panels(results), OURS)
    return content | {"correct": all(results[n]["correct"] for n in names)}


def _exact_gradients(workload: Workload) -> list[Tensor]:
    with Process(replace(workload, dropout=0.0), "eager", warm_up=0) as process:
        return process.gradients([0])[0]


def _check(workload: Workload, name: str, seeds: int, exact: list[Tensor], tick: Tick) -> dict[str, Any]:
    """The error of one step's gradients without dropout, and of their mean over seeds, which shrinks if unbiased."""
    tick(f"{name}: gradients")
    limit = VARIANTS[name].gradient_error
    try:
        with Process(replace(workload, dropout=0.0), name, warm_up=0) as process:
            samples = process.gradients(range(seeds))
    except WorkerFailed as failure:
        return {"correct": False, "error": str(failure)}
    errors = [relative_error(sample, exact) for sample in samples]
    mean = [torch.stack(parts).mean(0) for parts in zip(*samples, strict=True)]
    return {
        "correct": max(errors) <= limit,
        "gradient_error": sum(errors) / seeds,
        "gradient_error_of_mean": relative_error(mean, exact),
        "gradient_error_limit": limit,
    }


def _targets(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    reference = results.get(REFERENCE, {}).get("saved_bytes")
    for name, factor in TARGETS.items():
        ours = results.get(name, {})
        if reference and ours.get("saved_bytes"):
            reached = reference / ours["saved_bytes"]
            found.append(
                {
                    "target": f"{name}: {REFERENCE} saves at least {factor:g} times as much",
                    "reached": reached,
                    "met": reached >= factor,
                }
            )
        if "ratio" in ours:
            found.append(
                {
                    "target": f"{name}: step no slower than {REFERENCE}",
                    "reached": ours["ratio"],
                    "met": ours["ratio"] <= 1.0,
                }
            )
    return found


def _print(options: Options, results: dict[str, dict[str, Any]], targets: list[dict[str, Any]]) -> None:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    rows = []
    for name, r in results.items():
        if not r["correct"]:
            why = r["error"].strip().splitlines()[-1] if "error" in r else f"gradient error {r['gradient_error']:.2g}"
            rows.append([name, f"failed: {why[:60]}", "", "", "", "", ""])
            continue
        rows.append(
            [
                name,
                number(r["gradient_error"], "{:.1e}"),
                number(r["gradient_error_of_mean"], "{:.1e}"),
                megabytes(r["saved_bytes"]),
                megabytes(r["peak_bytes"]),
                number(r.get("seconds"), "{:.2f}"),
                number(r.get("ratio"), "{:.2f}"),
            ]
        )
    allocator = " ".join(f"{k}={v}" for k, v in TIMING_ALLOCATOR.items())
    header = ["variant", "gradient error", "of the mean", "saved MB", "peak MB", "s / step", f"/ {REFERENCE}"]
    show(options.console, "MB = 10**6 bytes; peak over the memory before the step", header, rows)
    options.console.print(f"seconds with {allocator}; memory with the default allocator", style="dim")
    for target in targets:
        verdict = "met" if target["met"] else "MISSED"
        options.console.print(f"{target['target']}: {target['reached']:.2f} ({verdict})")


def _title(workload: Workload) -> str:
    return f"GraphSAGE, {workload.nodes:,} nodes, {workload.edges:,} edges, {workload.layers} x {workload.hidden}"


def _panels(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    def column(key: str, unit: float) -> dict[str, float | None]:
        return {n: r[key] / unit if r.get(key) is not None else None for n, r in results.items()}

    return {
        "saved MB": column("saved_bytes", 1e6),
        "peak MB of a step": column("peak_bytes", 1e6),
        "seconds per step": column("seconds", 1),
    }
