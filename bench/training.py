"""Training to a test metric, for the statistical comparison of a compressed with an uncompressed model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from actcompile.datasets import NodeTask
from bench.models import Stack


def metric(task: NodeTask, logits: Tensor, mask: Tensor) -> float:
    """Accuracy, or the area under the ROC curve for a task of two classes that asks for it, over the mask's nodes."""
    truth = task.y[mask]
    if task.metric == "roc_auc":
        return float(roc_auc_score(truth.numpy(), logits[mask].softmax(-1)[:, 1].numpy()))
    return float((logits[mask].argmax(-1) == truth).float().mean())


@dataclass(frozen=True)
class Trained:
    """score: the test metric at the best validation metric; seconds: of every epoch but the first two."""

    score: float
    seconds: list[float]


def train(
    task: NodeTask,
    model: Stack,
    forward: Callable[[Tensor, Tensor], Tensor],
    masks: tuple[Tensor, Tensor, Tensor],
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    evaluate_every: int = 5,
    clip: float = 0.0,
) -> Trained:
    """Trains full-batch with Adam from the model's present parameters. `clip`: largest norm of the gradient, 0: any.

    `forward` is the model made ready by a variant; evaluation runs the model itself, so that it costs no compilation
    and is the same for all variants.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    train_nodes = masks[0].nonzero().flatten()
    best = (-1.0, 0.0)
    seconds: list[float] = []
    for epoch in range(1, epochs + 1):
        model.train()
        start = time.perf_counter()
        loss = F.cross_entropy(forward(task.x, task.edge_index)[train_nodes], task.y[train_nodes])
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
        if epoch % evaluate_every == 0 or epoch == epochs:
            model.eval()
            with torch.no_grad():
                logits = model(task.x, task.edge_index)
            best = max(best, (metric(task, logits, masks[1]), metric(task, logits, masks[2])))
    return Trained(best[1], seconds[2:] or seconds)
