"""The defaults bias no gradient that matters by more than 2 %, also where a rounded element could meet itself."""

import copy

import pytest
import torch
from scipy.stats import t as student
from torch import nn
from torch.nn import functional as F
from torch_geometric.nn import CGConv, GPSConv, ResGatedGraphConv

import actcompile
from tests.fidelity.measure import ALARM
from tests.passes.spare.test_apart import JOINS, Joined, Residual

DRAWS, MOST = 40, 0.02
NODES, EDGES, WIDTH, CLASSES = 1200, 4800, 16, 3


class Layered(nn.Module):
    """A graph layer between a linear one and BatchNorm."""

    def __init__(self, conv):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv = nn.Linear(8, WIDTH), conv()
        self.norm, self.out = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x, edges):
        x = self.first(x)
        return self.out(self.norm(self.conv(x, edges) + x).relu())


MODELS = {
    **{join: lambda join=join: Joined(join) for join in JOINS},
    "residual": lambda: Residual(2),
    "crystal graph": lambda: Layered(lambda: CGConv(WIDTH, batch_norm=True)),
    "gated graph": lambda: Layered(lambda: ResGatedGraphConv(WIDTH, WIDTH)),
    "graph transformer": lambda: Layered(lambda: GPSConv(WIDTH, None, heads=2)),
}


def gradients(function, model, inputs, target):
    model.zero_grad()
    F.cross_entropy(function(*inputs), target).backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_the_mean_over_draws_is_within_two_percent(name):
    """Along each gradient's own direction and two random ones. A false alarm in a million runs of all, at most."""
    torch._dynamo.reset()
    model = MODELS[name]()
    torch.manual_seed(1)
    inputs = [torch.randn(NODES, 8)]
    if isinstance(model, Layered):
        inputs.append(torch.randint(0, NODES, (2, EDGES)))
    target = torch.randint(0, CLASSES, (NODES,))
    exact = gradients(model, model, inputs, target)
    ours = copy.deepcopy(model)
    compressed = actcompile.compress(ours, inner="aot_eager", min_bytes=0, replay=0, bits=2)
    drawn = [gradients(compressed, ours, inputs, target) for _ in range(DRAWS)]
    assert any(row.codec.startswith("quantize(2 bits") for g in actcompile.explain(ours).graphs for row in g.rows)
    whole = torch.stack([v.norm() for v in exact.values()]).norm()
    limit = float(student.isf(ALARM / (2 * 3 * len(exact) * len(MODELS)), DRAWS - 1))
    for parameter, truth in exact.items():
        for direction in (truth, torch.randn_like(truth), torch.randn_like(truth)):
            along = direction / direction.norm().clamp_min(1e-12)
            samples = torch.stack([((d[parameter] - truth) * along).sum() for d in drawn])
            allowed = MOST * max(truth.norm(), 0.05 * whole)
            off = samples.mean().abs() - allowed
            assert off < limit * samples.std() / DRAWS**0.5, (parameter, float(samples.mean() / truth.norm()))
