"""Real saved activations on real graphs, over training: are they clipped normals, and what do fitted levels save?

Every observation is a line of distributions/records.jsonl in the folder of results; the JSON file has the means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from actcompile import datasets
from actcompile.checking.observe import observed
from actcompile.passes.plan.plan import Choice
from bench import _torch, distribution_plots, models
from bench.distributions import MODELS, VIEWS, Fit, Sample, describe, fit, sample
from bench.registry import Options, case
from bench.results import progress, show

NAME = "distributions"
Record = dict[str, Any]
OURS = VIEWS[0].name
LEVELS = ("normal", "histogram", "previous", "own")


@dataclass(frozen=True)
class Setting:
    """Every model on every graph, behind a linear encoder. heads: of attention layers; more only repeat the picture."""

    data: tuple[str, ...] = ("pubmed", "computers", "cs")
    models: tuple[str, ...] = ("sage", "gcn", "gin", "gat")
    hidden: int = 128
    layers: int = 3
    heads: int = 1
    dropout: float = 0.5
    epochs: int = 30
    learning_rate: float = 0.01
    seed: int = 0

    @property
    def looks(self) -> tuple[int, ...]:
        """The epochs in which activations are looked at: the first, the middle one and the last."""
        return tuple(sorted({1, (self.epochs + 1) // 2, self.epochs}))


@case(NAME, "saved activations of SAGE, GCN, GIN, GAT on real graphs, against clipped normal, uniform and histogram")
def run(options: Options) -> dict[str, Any]:
    setting = Setting()
    if options.quick:
        setting = replace(setting, data=("cora",), models=("sage",), hidden=32, layers=2, epochs=3)
    examples: dict[str, Sample] = {}
    records: list[Record] = []
    with progress(options.console) as bar:
        watched = bar.add_task("", total=len(setting.data) * len(setting.models) * setting.epochs)
        for data in setting.data:
            task = datasets.load(data, seed=setting.seed)
            for name in setting.models:
                bar.update(watched, description=f"{data}, {name}")
                found, shown = watch(task, name, setting, lambda: bar.advance(watched))
                records += found
                if data == setting.data[0] and name == setting.models[0]:
                    examples = shown
    folder = options.out / NAME
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(rounded(r)) + "\n" for r in records))
    summary = {view.name: summarise(r for r in records if r["view"] == view.name) for view in VIEWS}
    last = by_activation(records, setting)
    _print(options, last, summary, setting)
    distribution_plots.shapes(folder / "shapes.png", f"{setting.models[0]} on {setting.data[0]}", examples)
    distribution_plots.quantiles(folder / "quantiles.png", f"{setting.models[0]} on {setting.data[0]}", examples)
    distribution_plots.variances(folder / "variances.png", [r for r in records if r["view"] == OURS])
    worse = [r for r in records if r["variance"]["own"] > 1.001 * min(r["variance"].values()) + 1e-9]
    return {
        "settings": asdict(setting) | {"looks": setting.looks},
        "observations": len(records),
        "means": summary,
        "last_epoch": {label: rounded(means) for label, means in last.items()},
        "correct": not worse,
    }


def watch(
    task: datasets.NodeTask, name: str, setting: Setting, advance: Callable[[], object]
) -> tuple[list[Record], dict[str, Sample]]:
    """Trains one model, uncompressed, and describes its saved floats at the epochs of `setting.looks`.

    Returns the records, and the samples of the last epoch in our own blocks, by module and op.
    """
    _torch.forget_compilations()
    torch.manual_seed(setting.seed)
    heads = {"heads": setting.heads} if name in ("gat", "gatv2") else {}
    model = models.build(
        name,
        task.features,
        task.classes,
        hidden=setting.hidden,
        layers=setting.layers,
        dropout=setting.dropout,
        encoder=True,
        **heads,
    )
    records: list[Record] = []
    fits: dict[tuple[str, str, str], list[Fit]] = {}
    last: dict[str, Sample] = {}
    epoch = 0

    def look(choice: Choice, value: Tensor) -> None:
        if epoch not in setting.looks:
            return
        activation = choice.activation
        for view in VIEWS:
            s = sample(value, view)
            if s is None:
                continue
            now = fit(s)
            known = fits.setdefault((activation.module, activation.node.name, view.name), [])
            label = f"{activation.module or 'model'}: {activation.op.split('.')[1]}"
            if view.name == OURS and epoch == setting.epochs:
                last[label if label not in last else f"{label} ({activation.node.name})"] = s
            facts = {
                "data": task.name,
                "model": name,
                "epoch": epoch,
                "view": view.name,
                "module": activation.module,
                "name": activation.node.name,
                "op": activation.op,
                "uses": activation.uses,
                "shape": list(value.shape),
                "later": bool(known),
            }
            records.append(facts | describe(s, now, *((known[0], known[-1]) if known else (now, now))))
            known.append(now)

    optimizer = torch.optim.Adam(model.parameters(), lr=setting.learning_rate)
    train_nodes = task.split(setting.seed)[0].nonzero().flatten()
    with _torch.one_graph_despite_data_dependent_sizes():
        # Without what is ours: the papers round the results of dropout, and the inputs of norms as they are.
        forward = observed(
            model, look, rebuild=False, replay=0, standardise=False, min_bytes=0 if task.nodes < 10_000 else 16384
        )
        for epoch in range(1, setting.epochs + 1):  # noqa: B007  read by look
            loss = F.cross_entropy(forward(task.x, task.edge_index)[train_nodes], task.y[train_nodes])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            advance()
    return records, last


def summarise(records: Iterable[Record]) -> dict[str, Any]:
    """Means over observations. The histogram is judged on later observations only, since it was fitted on the first."""
    chosen = list(records)
    later = [r for r in chosen if r["later"]]
    varying = [r for r in chosen if r["less_variance"]]

    def mean(values: Iterable[float]) -> float | None:
        found = list(values)
        return float(np.mean(found)) if found else None

    def judged(model: str) -> list[Record]:
        return later if model == "histogram" else chosen

    return {
        "observations": len(chosen),
        "zero": mean(r["zero"] for r in chosen),
        "ends": [mean(r["ends"][i] for r in chosen) for i in (0, 1)],
        "jensen_shannon": {m: mean(r["jensen_shannon"][m] for r in judged(m)) for m in MODELS},
        "kolmogorov_smirnov": {m: mean(r["kolmogorov_smirnov"][m] for r in judged(m)) for m in MODELS},
        "less_variance": {
            m: mean(r["less_variance"][m] for r in varying if r["later"] or m not in ("histogram", "previous"))
            for m in LEVELS
        },
        "normal_is_nearer_than_uniform": mean(
            r["jensen_shannon"]["normal"] < r["jensen_shannon"]["uniform"] for r in chosen
        ),
        "normal_levels_beat_uniform": mean(r["less_variance"]["normal"] > 0 for r in varying),
    }


def by_activation(records: list[Record], setting: Setting) -> dict[str, Any]:
    """Means over graphs, at the last epoch and in our own blocks, of every activation of every model."""
    groups: dict[str, list[Record]] = {}
    for r in records:
        if r["epoch"] == setting.epochs and r["view"] == OURS:
            groups.setdefault(f"{r['model']} {r['module'] or 'model'}: {r['name']}", []).append(r)
    return {label: summarise(group) for label, group in groups.items()}


def _print(options: Options, last: dict[str, Any], summary: dict[str, Any], setting: Setting) -> None:
    title = f"last epoch, {OURS}, mean over {', '.join(setting.data)}"
    for means, what in ((last, title), (summary, "all models, graphs and epochs")):
        rows = [[label, *_distances(s)] for label, s in means.items() if s["observations"]]
        header = ["normal / uniform / histogram", "zero, %", "Jensen-Shannon, bits", "Kolmogorov-Smirnov"]
        show(options.console, f"{what}: distance from what is observed", header, rows)
        rows = [[label, *_savings(s)] for label, s in means.items() if s["observations"]]
        header = ["levels fitted to", "at ends, %", "clipped normal", "first look", "previous look", "own"]
        show(options.console, f"{what}: rounding variance saved against uniform levels, %", header, rows)


def _distances(s: dict[str, Any]) -> list[str]:
    def three(distance: dict[str, float | None]) -> str:
        return " / ".join("-" if distance[m] is None else f"{distance[m]:.2f}" for m in MODELS)

    return [f"{100 * s['zero']:.0f}", three(s["jensen_shannon"]), three(s["kolmogorov_smirnov"])]


def _savings(s: dict[str, Any]) -> list[str]:
    less = [s["less_variance"][m] for m in LEVELS]
    return [f"{100 * sum(s['ends']):.1f}", *("-" if v is None else f"{100 * v:.1f}" for v in less)]


def rounded(value: Any) -> Any:
    """The same with four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value
