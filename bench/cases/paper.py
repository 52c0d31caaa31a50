"""EXACT and i-EXACT beside full precision, our own settings, and other ways to spend the same bytes.

The papers' networks and optimiser (i-EXACT, arXiv 2309.11856, sec. 4; EXACT, ICLR 2022): GraphSAGE with BatchNorm, Adam
at 0.01, gradients clipped to 0.5; for arxiv 3 layers of 128 and dropout 0.5, for Flickr 2 layers of 256 and dropout
0.3. The arxiv network is also trained on the generated graph of its shape and on smaller real graphs. The clock of
every run is its own; the claims on speed are timed in pairs, step by step (see `_paired`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actcompile.datasets import DataUnavailable, NodeTask
from bench import claims, plots
from bench.accounting import LABEL, MB, Setting, compressed_bytes, full_precision_bytes
from bench.pool import TIMING_ALLOCATOR, alternate
from bench.registry import Options, case
from bench.results import megabytes, progress, show
from bench.trials import Record, Run, Trial, runs, select, spread
from bench.variants import OURS
from bench.workload import Workload

NAME = "paper"
FULL = "inductor"
GROUPS = {f"iexact-{g}{vm}": g for vm in ("", "-vm") for g in (2, 4, 8, 16, 32, 64)} | {"exact": 1, "exact-vm": 1}
PUBLISHED = ("exact", "exact-vm", *(name for name in GROUPS if name.startswith("iexact")))
OWN = ("default", "4-bit", "smallest")
OTHERS = ("bf16", "e4m3", "prune-8", "low-rank-8", "rows-8")
VARIANTS = (FULL, *PUBLISHED, *OWN, *OTHERS)
FAMILIES = {
    "full precision": (FULL,),
    "EXACT": ("exact", "exact-vm"),
    "i-EXACT": tuple(n for n in PUBLISHED if n.startswith("iexact") and not n.endswith("vm")),
    "i-EXACT, its levels": tuple(n for n in PUBLISHED if n.startswith("iexact") and n.endswith("vm")),
    "actcompile": OWN,
    "other codecs": OTHERS,
}
TIMED = ("exact", "iexact-2", "iexact-8", "iexact-64", "iexact-64-vm", "default", "smallest")


@dataclass(frozen=True)
class Problem:
    trial: Trial
    seeds: int


PROBLEMS = (
    Problem(Trial("ogbn-arxiv", epochs=100, clip=0.5), 3),
    Problem(Trial("flickr", hidden=256, layers=2, dropout=0.3, epochs=50, clip=0.5), 3),
    Problem(Trial("arxiv-shaped", epochs=8, clip=0.5), 2),
    Problem(Trial("cora", epochs=40, clip=0.5), 3),
    Problem(Trial("pubmed", epochs=30, clip=0.5), 3),
    Problem(Trial("minesweeper", epochs=40, clip=0.5), 2),
)
QUICK = (Problem(Trial("cora", hidden=32, layers=2, epochs=5, clip=0.5), 2),)


@case(NAME, "EXACT, i-EXACT with and without its levels, our settings and other codecs: metric, speed, memory")
def run(options: Options) -> dict[str, Any]:
    problems = {p.trial.data: p for p in (QUICK if options.quick else PROBLEMS)}
    trials = select([p.trial for p in problems.values()], options)
    names = options.pick(VARIANTS)
    record = Record(options.out / NAME / "runs.jsonl")
    found: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    with progress(options.console) as bar:
        task = bar.add_task("", total=sum((options.seeds or problems[t.data].seeds) * len(names) for t in trials))
        for trial in trials:
            seeds = range(options.seeds or problems[trial.data].seeds)
            try:
                graph = trial.task()
            except DataUnavailable as reason:
                skipped[trial.data] = str(reason).replace(str(Path.home()), "~")
                bar.advance(task, len(names) * len(seeds))
                continue
            found[trial.data] = {}
            for name in names:
                bar.update(task, description=f"{trial.data}, {name}")
                if options.recorded:
                    known = record.known(trial.key(name))
                    made = [known[seed] for seed in seeds if seed in known]
                    bar.advance(task, len(seeds))
                else:
                    made = runs(trial, name, seeds, record, lambda: bar.advance(task))
                if made:
                    found[trial.data][name] = summary(made, trial, graph, name)
            if not found[trial.data]:
                del found[trial.data]
    paired = _paired(options, names)
    for data, variants in found.items():
        _print(options, problems[data].trial, variants)
    for data, why in skipped.items():
        options.console.print(f"{data} skipped: {why}", style="yellow")
    verdicts = claims.verdicts(found, paired)
    for claim in verdicts:
        options.console.print(f"{claim['claim']}: [bold]{claim['verdict']}[/bold]: {claim['number']}", highlight=False)
    if found:
        _draw(options.out / NAME / "accuracy-against-memory.svg", found)
    return {
        "settings": {"problems": [asdict(problems[t.data]) for t in trials], "variants": names},
        "data": found,
        "skipped": skipped,
        "paired_seconds": paired,
        "claims": verdicts,
    }


def summary(made: Sequence[Run], trial: Trial, graph: NodeTask, name: str) -> dict[str, Any]:
    """One row of the table: means and standard deviations over seeds, and bytes as we and as the papers count them."""
    mean, deviation = spread([r["score"] for r in made])
    seconds = spread([r["seconds"] for r in made])[0]
    peaks = [r["peak_bytes"] for r in made]
    return {
        "scores": [r["score"] for r in made],
        "mean": mean,
        "standard_deviation": deviation,
        "epochs_per_second": 1 / seconds,
        "saved_bytes": made[0]["saved_bytes"],
        "their_megabytes": their_bytes(name, trial, graph, made[0]["saved_bytes"]) / MB,
        "peak_bytes": None if None in peaks else spread(peaks)[0],
    }


def their_bytes(name: str, trial: Trial, graph: NodeTask, saved: int) -> float:
    """Activation memory as i-EXACT counts it (see `accounting`).

    The papers' own methods and full precision: by the byte model of the papers' code, which saves more than our pass
    does with the same setting. All others: what is saved, and the training nodes' labels.
    """
    training = int(graph.split()[0].sum())
    setting = Setting(graph.nodes, training, graph.features, trial.hidden, graph.classes, trial.layers)
    if trial.encoder or name not in (FULL, *PUBLISHED):
        return saved + LABEL * training
    return full_precision_bytes(setting) if name == FULL else compressed_bytes(setting, GROUPS[name])


def _paired(options: Options, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Seconds of a step of the arxiv network, each variant alternating with EXACT; kept from an earlier run.

    With `--steps 0` nothing is timed.
    """
    steps = 0 if options.recorded else 11 if options.steps is None else options.steps
    path = options.out / NAME / "paired.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    workload = Workload(hidden=128)
    if options.quick:
        workload = Workload(nodes=2_000, edges=9_000, features=16, classes=4, hidden=32)
    settings = json.loads(json.dumps({"workload": asdict(workload), "allocator": TIMING_ALLOCATOR}))
    if known.get("settings") != settings:
        known = {"settings": settings, "variants": {}}
    todo = [n for n in (FULL, *TIMED[1:]) if n in names and n not in known["variants"]]
    if todo and steps and "exact" in names:
        made = alternate(workload, "exact", todo, steps)
        known["variants"] |= {n: t for n, t in made.items() if "error" not in t}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1) + "\n")
    variants: dict[str, dict[str, Any]] = known["variants"]
    if variants:
        rows = [[n, f"{t['seconds']:.2f}", f"{t['ratio']:.3f}"] for n, t in variants.items()]
        show(options.console, "arxiv's shape, alternating steps", ["variant", "s / step", "/ EXACT"], rows)
    return variants


def _print(options: Options, trial: Trial, variants: Mapping[str, Mapping[str, Any]]) -> None:
    rows = []
    for name, s in variants.items():
        rows.append(
            [
                name,
                f"{100 * s['mean']:.2f} ± {100 * s['standard_deviation']:.2f}",
                f"{s['epochs_per_second']:.2f}",
                megabytes(s["saved_bytes"]),
                f"{s['their_megabytes']:.2f}",
                megabytes(s["peak_bytes"]),
            ]
        )
    seeds = len(next(iter(variants.values()))["scores"])
    network = f"{trial.layers} layers of {trial.hidden}{', encoder' if trial.encoder else ''}, {trial.epochs} epochs"
    header = ["variant", "test metric, %", "epochs / s", "saved MB", "MiB, papers' count", "peak MB"]
    show(options.console, f"{trial.data}: {network}, {seeds} seeds", header, rows)


def _draw(path: Path, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    panels = {}
    for data, variants in found.items():
        panels[data] = {
            family: [
                (
                    name,
                    variants[name]["saved_bytes"] / 1e6,
                    100 * variants[name]["mean"],
                    100 * variants[name]["standard_deviation"] / math.sqrt(len(variants[name]["scores"])),
                )
                for name in names
                if name in variants
            ]
            for family, names in FAMILIES.items()
        }
    plots.scatters(path, "test metric against saved bytes", "saved MB", "test metric, %", panels)


assert set(VARIANTS) - {FULL} <= set(OURS)
