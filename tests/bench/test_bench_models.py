"""Every named model trains, and its options do what they say."""

from __future__ import annotations

import copy

import pytest
import torch

from actcompile.datasets import NodeTask, generated
from bench import models


@pytest.fixture(scope="module")
def task() -> NodeTask:
    return generated(60, 300, 12, 4)


def _gradients(model: models.Stack, task: NodeTask) -> list[torch.Tensor]:
    out = model(task.x, task.edge_index)
    assert out.shape == (task.nodes, task.classes)
    torch.nn.functional.cross_entropy(out, task.y).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    return gradients


@pytest.mark.parametrize("name", models.names())
def test_recomputed_layers_give_the_same_gradients(name: str, task: NodeTask) -> None:
    torch.manual_seed(0)
    degrees = models.degree_histogram(task.edge_index, task.nodes)
    plain = models.build(name, 12, 4, hidden=16, dropout=0.0, degrees=degrees)
    recomputed = copy.deepcopy(plain)
    recomputed.checkpointed = True
    for kept, again in zip(_gradients(plain, task), _gradients(recomputed, task), strict=True):
        torch.testing.assert_close(kept, again)


def test_encoder_makes_wide_inputs_narrow(task: NodeTask) -> None:
    model = models.build("sage", 12, 4, hidden=8, encoder=True)
    assert model.convs[0].in_channels == 8
    _gradients(model, task)


def test_reset_draws_new_values_into_the_same_parameters() -> None:
    model = models.build("gin", 12, 4, hidden=16)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    torch.manual_seed(7)
    model.reset_parameters()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name][1])]
    assert any(".nn." in name for name in changed)
    assert all(p.data_ptr() == before[name][0] for name, p in model.named_parameters())


def test_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="sage"):
        models.build("transformer", 1, 1)


def test_degree_histogram() -> None:
    edges = torch.tensor([[0, 1, 2, 0], [1, 1, 1, 2]])
    assert models.degree_histogram(edges, 4).tolist() == [2, 1, 0, 1]
