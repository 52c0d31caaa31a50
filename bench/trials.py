"""Training runs for statistics: one model on one graph, prepared by one variant, once for every seed; resumable.

Every finished run is appended as a line of JSON to a file in the folder of results. A run that is found there is not
done again, so a case can be interrupted at any time, and its runs can be spread over several processes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from actcompile import Config, datasets
from bench import _torch, models
from bench.measure import Unmeasurable, peak_memory, saved_bytes
from bench.registry import Options
from bench.training import train
from bench.variants import OURS, VARIANTS

Run = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A GNN of PyG's layers and how it is trained, full-batch with Adam.

    data: a name of `actcompile.datasets`, or "arxiv-shaped", generated. Where a graph has several splits, or none, each
    seed has its own. encoder: a linear layer comes first. clip: largest norm of the gradient, 0 for none.
    """

    data: str
    hidden: int = 128
    layers: int = 3
    dropout: float = 0.5
    encoder: bool = False
    epochs: int = 100
    learning_rate: float = 0.01
    weight_decay: float = 0.0
    clip: float = 0.0
    model: str = "sage"

    def task(self, seed: int = 0) -> datasets.NodeTask:
        """Raises DataUnavailable where the graph is neither here nor can be downloaded."""
        if self.data == "arxiv-shaped":
            return datasets.generated(169_343, 1_166_243, 128, 40)
        return datasets.load(self.data, seed=seed)

    def build(self, task: datasets.NodeTask, checkpointed: bool = False) -> models.Stack:
        return models.build(
            self.model,
            task.features,
            task.classes,
            hidden=self.hidden,
            layers=self.layers,
            dropout=self.dropout,
            encoder=self.encoder,
            checkpointed=checkpointed,
        )

    def key(self, variant: str) -> dict[str, Any]:
        """What a run depends on, as JSON gives it back."""
        config = repr(Config.make(**OURS[variant][1])) if variant in OURS else ""
        return {"trial": asdict(self), "variant": variant, "config": config, "torch": torch.__version__}


@dataclass(frozen=True)
class Record:
    """The file of finished runs."""

    path: Path

    def known(self, key: dict[str, Any]) -> dict[int, Run]:
        """Seed -> run, of the runs recorded under this key."""
        if not self.path.exists():
            return {}
        lines = map(json.loads, self.path.read_text().splitlines())
        return {line["seed"]: line["run"] for line in lines if line["key"] == key}

    def add(self, key: dict[str, Any], seed: int, run: Run) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, "seed": seed, "run": run}) + "\n")


def runs(trial: Trial, variant: str, seeds: Sequence[int], record: Record, advance: Callable[[], object]) -> list[Run]:
    """The runs of all seeds, from the record or made now: {"score", "seconds", "saved_bytes", "peak_bytes"}.

    score: the test metric at the best validation metric; seconds: median of a training epoch; saved bytes as they are
    before backward, inputs and parameters left out; peak: over the memory before a step, None where not measurable.
    """
    key = trial.key(variant)
    known = record.known(key)
    todo = [seed for seed in seeds if seed not in known]
    for _ in range(len(seeds) - len(todo)):
        advance()
    for seed, run in _made(trial, variant, todo):
        known[seed] = run
        record.add(key, seed, run)
        advance()
    return [known[seed] for seed in seeds]


def _made(trial: Trial, variant: str, seeds: Sequence[int]) -> Iterator[tuple[int, Run]]:
    if not seeds:
        return
    _torch.forget_compilations()
    task = trial.task()
    model = trial.build(task, VARIANTS[variant].checkpointed)
    forward = VARIANTS[variant].prepare(model)
    memory = _memory(task, model, forward)
    for seed in seeds:
        split = trial.task(seed).split(seed)
        torch.manual_seed(seed)
        model.reset_parameters()
        trained = train(
            task, model, forward, split, trial.epochs, trial.learning_rate, trial.weight_decay, clip=trial.clip
        )
        yield seed, {"score": trained.score, "seconds": statistics.median(trained.seconds), **memory}


def _memory(task: datasets.NodeTask, model: models.Stack, forward: Callable[..., Tensor]) -> Run:
    """Saved bytes and peak of a step, after one step that compiles."""
    model.train()
    alive = [task.x, task.edge_index, task.y, *model.parameters(), *model.buffers()]

    def step() -> None:
        F.cross_entropy(forward(task.x, task.edge_index), task.y.clamp_min(0)).backward()
        model.zero_grad(set_to_none=True)

    step()
    saved = saved_bytes(forward(task.x, task.edge_index), alive)
    try:
        peak: float | None = statistics.median(peak_memory(step) for _ in range(3))
    except Unmeasurable:
        peak = None
    return {"saved_bytes": saved, "peak_bytes": peak}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds; the latter is 0 for one seed."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def select(trials: Sequence[Trial], options: Options) -> list[Trial]:
    """The trials on the graphs that were asked for. Raises ValueError for a graph that none is on."""
    known = [trial.data for trial in trials]
    for name in options.data:
        if name not in known:
            raise ValueError(f"--data {name}: this case has {', '.join(known)}")
    return [trial for trial in trials if not options.data or trial.data in options.data]
