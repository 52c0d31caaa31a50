"""Real graphs, several seeds, compressed and uncompressed: does the test metric change?

Every finished training run is appended to accuracy.jsonl in the folder of results; a run that is found there is not
done again, so the case can be interrupted at any time.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from actcompile import datasets
from bench import _torch, models
from bench.registry import Options, case
from bench.results import show
from bench.training import train

INNER = "inductor"  # compiles both the compressed and the uncompressed model
MODES: dict[str, dict[str, Any]] = {"default": {}, "2-bit": {"bits": 2, "nonlinear_bits": 2}}
UNCOMPRESSED = "uncompressed"


@dataclass(frozen=True)
class Setting:
    """A 3-layer GraphSAGE behind a linear encoder; where a data set has many splits, each seed has its own."""

    data: str
    hidden: int = 128
    layers: int = 3
    dropout: float = 0.5
    epochs: int = 150
    learning_rate: float = 0.01
    weight_decay: float = 5e-4


SETTINGS = (
    Setting("pubmed"),
    Setting("computers", weight_decay=0.0),
    Setting("cs"),
    Setting("tolokers", hidden=64, dropout=0.2, weight_decay=0.0),
)


@case("accuracy", "PubMed, Amazon Computers, Coauthor CS, tolokers: test metric, compressed and not, over seeds")
def run(options: Options) -> dict[str, Any]:
    seeds = options.seeds or (2 if options.quick else 10)
    settings = (Setting("cora", hidden=16, layers=2, epochs=5),) if options.quick else SETTINGS
    modes = [UNCOMPRESSED, *options.pick(list(MODES))]
    record = options.out / "accuracy.jsonl"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    results: dict[str, dict[str, Any]] = {}
    with Progress(*columns, console=options.console) as progress:
        bar = progress.add_task("", total=len(settings) * len(modes) * seeds)
        for setting in settings:
            scores = {}
            for mode in modes:
                progress.update(bar, description=f"{setting.data}, {mode}")
                scores[mode] = _scores(setting, mode, seeds, record, lambda: progress.advance(bar))
            summaries = {m: _summary(scores[m], scores[UNCOMPRESSED]) for m in modes}
            results[setting.data] = {"seeds": seeds, "modes": summaries}
    rows = []
    for data, result in results.items():
        for mode, s in result["modes"].items():
            first = data if mode == UNCOMPRESSED else ""
            rows.append([first, mode, f"{100 * s['mean']:.2f}", f"{100 * s['standard_error']:.2f}", s["verdict"]])
    header = ["data", "mode", "test metric, %", "standard error", "verdict"]
    show(options.console, f"mean over {seeds} seeds; tolokers in ROC-AUC", header, rows)
    return {"settings": [asdict(s) for s in settings], "inner": INNER, "data": results}


def _summary(scores: list[float], reference: list[float]) -> dict[str, Any]:
    """Mean, standard error of the mean, and the verdict against the uncompressed scores.

    "within": the means differ by no more than the uncompressed seeds' standard error. Seeds start from the same
    parameters and split in every mode, so the standard error of the paired differences is given beside it.
    """
    count = len(scores)
    pairs = [a - b for a, b in zip(scores, reference, strict=True)]
    difference = statistics.mean(pairs)
    own, allowed, paired = (statistics.stdev(v) / count**0.5 for v in (scores, reference, pairs))
    within = abs(difference) <= allowed
    verdict = "within" if within else f"{100 * difference:+.2f} ± {100 * paired:.2f}"
    return {
        "mean": statistics.mean(scores),
        "standard_error": own,
        "difference": difference,
        "paired_standard_error": paired,
        "within": within,
        "verdict": "" if scores is reference else verdict,
        "scores": scores,
    }


def _scores(setting: Setting, mode: str, seeds: int, record: Path, advance: Any) -> list[float]:
    """The test metric of every seed: from the record where it is there, else trained now and recorded."""
    fields = MODES.get(mode, {})
    key = {"setting": asdict(setting), "mode": mode, "fields": fields, "inner": INNER, "torch": torch.__version__}
    known = {}
    if record.exists():
        for line in map(json.loads, record.read_text().splitlines()):
            if line["key"] == key:
                known[line["seed"]] = line["score"]
    todo = [s for s in range(seeds) if s not in known]
    for _ in range(seeds - len(todo)):
        advance()
    if todo:
        _torch.forget_compilations()
        task = datasets.load(setting.data)
        model = models.build(
            "sage",
            task.features,
            task.classes,
            hidden=setting.hidden,
            layers=setting.layers,
            dropout=setting.dropout,
            encoder=True,
        )
        if mode == UNCOMPRESSED:
            forward = torch.compile(model, backend=INNER)
        else:
            forward = torch.compile(model, backend="actcompile", options={"inner": INNER, **fields})
    for seed in todo:
        split = datasets.load(setting.data, seed=seed).split(seed)
        torch.manual_seed(seed)
        model.reset_parameters()
        known[seed] = train(task, model, forward, split, setting.epochs, setting.learning_rate, setting.weight_decay)
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("a") as file:
            file.write(json.dumps({"key": key, "seed": seed, "score": known[seed]}) + "\n")
        advance()
    return [known[s] for s in range(seeds)]
