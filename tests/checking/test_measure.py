"""Predicted noise of the gradients against what rounding really does to them."""

import copy

import pytest
import torch
from torch.nn import functional as F

import actcompile
from bench.models import build

DRAWS = 24
FACTOR = 1.5


def setup(name, layers=3):
    torch.manual_seed(1)
    nodes, edges = 500, 3000
    x, edge_index, y = torch.randn(nodes, 32), torch.randint(nodes, (2, edges)), torch.randint(8, (nodes,))
    model = build(name, 32, 8, hidden=64, layers=layers, dropout=0.0)
    return model, (x, edge_index), lambda out: F.cross_entropy(out, y)


def gradients(model, inputs, loss):
    model.zero_grad()
    loss(model(*inputs)).backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (("gin", 4), ("gatv2", 4), ("sage_max", 2))]


@pytest.mark.parametrize(("name", "bits"), [("gcn", 2), ("gat", 4), *SLOW])
def test_noise_is_what_draws_show(name, bits):
    """24 draws tell the root of the mean square to a few per cent; 1-bit noise is beyond first order."""
    model, inputs, loss = setup(name, layers=2 if name.startswith("gat") else 3)
    options = {"inner": "aot_eager", "min_bytes": 0, "bits": bits}
    before = copy.deepcopy(model.state_dict())
    config = actcompile.measure(model, *inputs, loss=loss, **options)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    (graph,) = actcompile.explain(model, *inputs, config=config).graphs
    exact = gradients(copy.deepcopy(model), inputs, loss)
    compressed = actcompile.compress(copy.deepcopy(model), config)
    draws = torch.stack([gradients(compressed, inputs, loss) for _ in range(DRAWS)])
    error = float((draws - exact).square().sum(1).mean().sqrt() / exact.norm())
    assert graph.outlook.error / FACTOR < error < graph.outlook.error * FACTOR


def test_a_bound_on_the_error_holds():
    model, inputs, loss = setup("gcn", layers=4)
    options = {"inner": "aot_eager", "min_bytes": 0, "max_gradient_error": 0.03}
    config = actcompile.measure(model, *inputs, loss=loss, **options)
    exact = gradients(copy.deepcopy(model), inputs, loss)
    compressed = actcompile.compress(copy.deepcopy(model), config)
    draws = torch.stack([gradients(compressed, inputs, loss) for _ in range(DRAWS)])
    error = float((draws - exact).square().sum(1).mean().sqrt() / exact.norm())
    assert 0.0 < error < 0.03 * 1.1


def test_every_activation_that_is_rounded_is_measured_under_its_name():
    model, inputs, loss = setup("gat", layers=2)
    config = actcompile.measure(model, *inputs, loss=loss, inner="aot_eager", min_bytes=0)
    (graph,) = actcompile.explain(model, *inputs, config=config).graphs
    rounded = {row.key for row in graph.rows if row.codec.startswith(("quantize", "cast"))}
    assert rounded and rounded <= {key for key, _ in config.measured}


def test_bad_arguments_have_names():
    model, inputs, _ = setup("gcn")
    with pytest.raises(TypeError, match="model must be"):
        actcompile.measure(lambda x: x, *inputs)
    with pytest.raises(ValueError, match="probes must be"):
        actcompile.measure(model, *inputs, probes=0)
