"""What is trained: a graph, a model, a training step; described by values that travel to workers as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from actcompile import datasets
from bench import models


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


class Training:
    """A model, made ready by a variant, and its full-batch training step."""

    def __init__(
        self, workload: Workload, prepare: Callable[[models.Stack], Callable[..., Tensor]], checkpointed: bool = False
    ) -> None:
        self.workload, self.task = workload, workload.task()
        self.model = workload.build(self.task, checkpointed)
        self.x = self.task.x.to(workload.device)
        self.edge_index = self.task.edge_index.to(workload.device)
        self.y = self.task.y.to(workload.device)
        self.train_nodes = self.task.split(0)[0].nonzero().flatten().to(workload.device)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=workload.learning_rate, weight_decay=workload.weight_decay
        )
        self.run = prepare(self.model)

    def forward(self) -> Tensor:
        """Logits, [nodes, classes]."""
        return self.run(self.x, self.edge_index)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.forward()[self.train_nodes], self.y[self.train_nodes])

    def step(self) -> float:
        """One step of Adam; no gradient is alive before or after it."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def gradients(self, seed: int) -> list[Tensor]:
        """The gradient of every parameter for the seed's random bits, on the CPU."""
        torch.manual_seed(seed)
        self.loss().backward()
        result = [p.grad.detach().cpu().clone() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def alive_anyway(self) -> list[Tensor]:
        """What backward need not be charged for: inputs, labels, parameters, buffers."""
        return [self.x, self.edge_index, self.y, *self.model.parameters(), *self.model.buffers()]
