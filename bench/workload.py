"""What is trained: a graph, a model, a training step; described by values that travel to workers as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actcompile import datasets
from bench import models

Prepare = Callable[[nn.Module], Callable[..., Tensor]]


@dataclass(frozen=True)
class Batch:
    """inputs: what the model is called with; loss(output, target): a scalar."""

    inputs: tuple[Tensor, ...]
    target: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]

    def to(self, device: str) -> Batch:
        return Batch(tuple(t.to(device) for t in self.inputs), self.target.to(device), self.loss)


class Training:
    """A model, made ready by a variant, and its training step, which takes the batches in turn.

    optimizer: of the model's parameters; without one a step is a forward and a backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        prepare: Prepare,
        device: str = "cpu",
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.model, self.batches, self.device, self.optimizer = model, batches, device, optimizer
        self.run = prepare(model)
        self.steps = 0

    def forward(self) -> Tensor:
        """What the model returns for the first batch."""
        return self.run(*self.batches[0].inputs)

    def loss(self, batch: int = 0) -> Tensor:
        chosen = self.batches[batch]
        return chosen.loss(self.run(*chosen.inputs), chosen.target)

    def step(self, batch: int | None = None) -> float:
        """One step on this or else the next batch; no gradient is alive before or after it."""
        if batch is None:
            batch, self.steps = self.steps % len(self.batches), self.steps + 1
        loss = self.loss(batch)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach())

    def gradients(self, seed: int) -> list[Tensor]:
        """The gradient of every parameter on the first batch for the seed's random bits, on the CPU."""
        torch.manual_seed(seed)
        self.loss().backward()
        result = [p.grad.detach().cpu().clone() for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        return result

    def alive_anyway(self) -> list[Tensor]:
        """What backward need not be charged for: inputs, labels, parameters, buffers."""
        inputs = [t for batch in self.batches for t in (*batch.inputs, batch.target)]
        return [*inputs, *self.model.parameters(), *self.model.buffers()]


class Described(Protocol):
    """A training that can be made anew in another process: a frozen dataclass of plain values."""

    @property
    def threads(self) -> int: ...

    @property
    def device(self) -> str: ...

    def training(self, prepare: Prepare, checkpointed: bool = False) -> Training:
        """checkpointed: every layer is computed again in backward, where the model can do that."""
        ...


@dataclass(frozen=True)
class Workload:
    """A full-batch node classification.

    data: "generated" (of the shape given by nodes, edges, features, classes) or a name of `actcompile.datasets`.
    """

    data: str = "generated"
    nodes: int = 169_343
    edges: int = 1_166_243
    features: int = 128
    classes: int = 40
    model: str = "sage"
    hidden: int = 256
    layers: int = 3
    dropout: float = 0.5
    norm: bool = True
    encoder: bool = False
    learning_rate: float = 0.01
    weight_decay: float = 0.0
    seed: int = 0
    device: str = "cpu"
    threads: int = 2

    def task(self) -> datasets.NodeTask:
        if self.data == "generated":
            return datasets.generated(self.nodes, self.edges, self.features, self.classes, self.seed)
        return datasets.load(self.data, seed=self.seed)

    def build(self, task: datasets.NodeTask, checkpointed: bool = False) -> models.Stack:
        """The model with parameters drawn from the workload's seed: the same for every variant."""
        torch.manual_seed(self.seed)
        options: dict[str, object] = {}
        if self.model == "pna":
            options["degrees"] = models.degree_histogram(task.edge_index, task.nodes)
        return models.build(
            self.model,
            task.features,
            task.classes,
            hidden=self.hidden,
            layers=self.layers,
            dropout=self.dropout,
            norm=self.norm,
            encoder=self.encoder,
            checkpointed=checkpointed,
            **options,
        ).to(self.device)

    def training(self, prepare: Prepare, checkpointed: bool = False) -> Training:
        """Full-batch steps of Adam on the training nodes' loss."""
        task = self.task()
        model = self.build(task, checkpointed)
        nodes = task.split(0)[0].nonzero().flatten().to(self.device)

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(logits[nodes], y[nodes])

        batch = Batch((task.x, task.edge_index), task.y, loss).to(self.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        return Training(model, [batch], prepare, self.device, optimizer)
