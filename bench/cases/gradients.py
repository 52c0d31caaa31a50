"""How wrong is a step's gradient for the bytes that are saved? EXACT, i-EXACT and ours on real graphs, as curves.

Every model is first trained a little, uncompressed, since activations of fresh parameters are not those of training.
Then its parameters stand still, dropout is off, and each setting's gradients are compared with the exact ones, for
several seeds: the error of one step, and that of the mean of all, which an unbiased method brings down by the root of
their number. `inner="aot_eager"`: the same encoded bytes as with Inductor, and nothing to compile. A graph that is in
the results of an earlier run is not done again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import actcompile
from actcompile.datasets import DataUnavailable, NodeTask
from bench import _torch, models, plots
from bench.measure import relative_error
from bench.registry import Options, case
from bench.results import earlier, megabytes, progress, show, write
from bench.training import train
from bench.trials import Trial, select
from bench.variants import OURS

NAME = "gradients"
TRIALS = (
    Trial("cora", epochs=15),
    Trial("pubmed", epochs=15),
    Trial("computers", encoder=True, epochs=15),
    Trial("cs", encoder=True, epochs=15),
    Trial("minesweeper", epochs=30),
    Trial("tolokers", epochs=15),
)
Fields = Mapping[str, Any]
PROJECTIONS = (16, 8, 4, 2, None)
FAMILIES: dict[str, dict[str, Fields]] = {
    "EXACT": {f"exact, D/R {p or 1}": {"preset": "exact", "projection": p} for p in PROJECTIONS},
    "i-EXACT": {f"iexact-64, D/R {p or 1}": {"preset": "iexact-64", "projection": p} for p in PROJECTIONS},
    "i-EXACT, its levels": {
        f"iexact-64-vm, D/R {p or 1}": {"preset": "iexact-64-vm", "projection": p} for p in PROJECTIONS
    },
    "actcompile": {
        "smallest": {"preset": "smallest"},
        "1 bit, D/R 4": {"bits": 2, "nonlinear_bits": 1, "projection": 4},
        "2 bits, D/R 4": {"bits": 2, "projection": 4},
        "2-bit": {"bits": 2},
        "4-bit": {"bits": 4},
        "8-bit": {"bits": 8},
    },
    "actcompile, replay=0": {"no-replay": {"bits": 2, "replay": 0}},
    "other codecs": {name: OURS[name][1] for name in ("bf16", "e4m3", "prune-8", "low-rank-8", "rows-8")},
}
ABLATION: dict[str, Fields] = {
    "neither": {"preset": "exact"},
    "blocks of 64 rows": {"preset": "iexact-64"},
    "levels": {"preset": "exact", "levels": "variance-minimising"},
    "both": {"preset": "iexact-64-vm"},
}
THEIRS = ("EXACT", "i-EXACT", "i-EXACT, its levels")


@case(NAME, "gradient error against saved bytes on real graphs: EXACT, i-EXACT, ours, other codecs")
def run(options: Options) -> dict[str, Any]:
    seeds = range(options.seeds or (2 if options.quick else 4))
    trials = select([Trial("cora", hidden=32, layers=2, epochs=3)] if options.quick else TRIALS, options)
    settings = {"seeds": len(seeds)}
    known = earlier(options.out, NAME, settings).get("data", {})
    found: dict[str, dict[str, Any]] = {}
    with progress(options.console) as bar:
        total = sum(map(len, FAMILIES.values())) + len(ABLATION)
        task = bar.add_task("", total=len(trials) * total)
        for trial in trials:
            bar.update(task, description=trial.data)
            if known.get(trial.data, {}).get("trial") == asdict(trial):
                found[trial.data] = known[trial.data]
                bar.advance(task, total)
                continue
            try:
                step = Step(trial)
            except DataUnavailable as reason:
                options.console.print(f"{trial.data} skipped: {reason}", style="yellow")
                bar.advance(task, total)
                continue

            def measured(fields: Fields, step: Step = step) -> dict[str, Any]:
                bar.advance(task)
                return step.error(fields, seeds)

            families = {f: {n: measured(fields) for n, fields in points.items()} for f, points in FAMILIES.items()}
            ablation = {name: measured(fields) for name, fields in ABLATION.items()}
            found[trial.data] = {
                "trial": asdict(trial),
                "families": families,
                "ablation": ablation,
                "equal_bytes": equal_bytes(families),
            }
            write(options.out, NAME, {"settings": settings, "data": known | found})
    for data, result in found.items():
        _print(options, data, result, len(seeds))
    if found:
        options.out.joinpath(NAME).mkdir(parents=True, exist_ok=True)
        _draw(options, found)
    return {"settings": settings, "data": known | found}


class Step:
    """A model after some training, and the exact gradients of one more step, without dropout."""

    def __init__(self, trial: Trial) -> None:
        self.task: NodeTask = trial.task()
        torch.manual_seed(0)
        self.model: models.Stack = trial.build(self.task)
        train(self.task, self.model, self.model, self.task.split(), trial.epochs, trial.learning_rate, 0.0, clip=0.5)
        self.model.train()
        self.model.dropout.p = 0.0
        self.nodes = self.task.split()[0].nonzero().flatten()
        self.exact = self.gradients(self.model, 0)

    def gradients(self, forward: Any, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        loss = F.cross_entropy(forward(self.task.x, self.task.edge_index)[self.nodes], self.task.y[self.nodes])
        return [g.detach().clone() for g in torch.autograd.grad(loss, list(self.model.parameters()))]

    def error(self, fields: Fields, seeds: Sequence[int]) -> dict[str, Any]:
        """Saved bytes, the mean relative error of one step's gradients, and that of their mean over seeds."""
        _torch.forget_compilations()
        config = actcompile.Config.make(**fields, inner="aot_eager")
        compiled = torch.compile(self.model, backend="actcompile", options={**fields, "inner": "aot_eager"})
        samples = [self.gradients(compiled, seed) for seed in seeds]
        mean = [torch.stack(parts).mean(0) for parts in zip(*samples, strict=True)]
        report = actcompile.explain(self.model, self.task.x, self.task.edge_index, config=config)
        return {
            "config": {k: str(v) for k, v in fields.items()},
            "saved_bytes": report.saved_bytes_after,
            "error": sum(relative_error(sample, self.exact) for sample in samples) / len(samples),
            "error_of_mean": relative_error(mean, self.exact),
        }


def equal_bytes(families: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The error of our 2 bits, and that of each published family at the same bytes.

    The families' errors are interpolated between their settings, linearly in the logarithms of bytes and error; beyond
    their last setting, the last one's counts.
    """
    ours = families["actcompile"]["2-bit"]
    result = {}
    for name in THEIRS:
        points = sorted((math.log(p["saved_bytes"]), math.log(p["error"])) for p in families[name].values())
        theirs = math.exp(interpolated(math.log(ours["saved_bytes"]), points))
        result[name] = {"error": theirs, "ours": ours["error"], "ours_is_lower": ours["error"] < theirs}
    return result


def interpolated(x: float, points: Sequence[tuple[float, float]]) -> float:
    """Piecewise linear through `points`, which ascend in x; constant outside of them."""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[0][1] if x < points[0][0] else points[-1][1]


def _print(options: Options, data: str, result: Mapping[str, Any], seeds: int) -> None:
    rows = []
    for family, points in result["families"].items():
        for i, (name, p) in enumerate(points.items()):
            numbers = [megabytes(p["saved_bytes"]), f"{100 * p['error']:.1f}", f"{100 * p['error_of_mean']:.1f}"]
            rows.append(["" if i else family, name, *numbers])
    for i, (name, p) in enumerate(result["ablation"].items()):
        numbers = [megabytes(p["saved_bytes"]), f"{100 * p['error']:.1f}", f"{100 * p['error_of_mean']:.1f}"]
        rows.append(["" if i else "EXACT, with", name, *numbers])
    header = ["family", "setting", "saved MB", "gradient error, %", f"of the mean of {seeds}, %"]
    show(options.console, f"{data}: relative error of all gradients together", header, rows)
    for family, e in result["equal_bytes"].items():
        verdict = "lower" if e["ours_is_lower"] else "NOT LOWER"
        line = f"{data}: at the bytes of 2 bits {family} has {100 * e['error']:.1f} %, ours {100 * e['ours']:.1f} %"
        options.console.print(f"{line}: {verdict}", highlight=False)


def _draw(options: Options, found: Mapping[str, Mapping[str, Any]]) -> None:
    panels = {
        data: {
            family: [(name, p["saved_bytes"] / 1e6, 100 * p["error"], 0.0) for name, p in points.items()]
            for family, points in result["families"].items()
        }
        for data, result in found.items()
    }
    path = options.out / NAME / "error-against-memory.svg"
    plots.scatters(path, "one step's gradient error against saved bytes", "saved MB", "relative error, %", panels, True)
