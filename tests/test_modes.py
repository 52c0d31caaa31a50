"""Gradients in eval mode are exact, in training mode rounded, whichever came first and wherever the graph was cut."""

import pytest
import torch
from torch import nn
from torch_geometric.nn import SAGEConv

import actcompile
from actcompile import Config, compress, explain
from tests.helpers import SAVED, gnn, graph, step

INPUTS = graph()


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Layers(nn.Module):
    """No layer of it reads `training`. `between` runs after the first one."""

    def __init__(self, between=lambda: None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.between = SAGEConv(16, 32), SAGEConv(32, 4), between

    def forward(self, x, edges):
        x = self.a(x, edges).sigmoid()
        self.between()
        return self.b(x.sin(), edges)


class Loop(Layers):
    """A break in a loop: Dynamo leaves this function to Python and compiles what it calls."""

    def forward(self, x, edges):
        for _ in range(2):
            torch._dynamo.graph_break()
            y = rows(self, x, edges)
        return y


def rows(model, x, edges):
    return model.b(model.a(x, edges).sigmoid().sin(), edges)


def rounded(function, model):
    """Whether its gradients are off by more than float32 rounding of eager's, and of every draw others."""
    exact = step(lambda *inputs: type(model).forward(model, *inputs), INPUTS, model.parameters())[1:]
    found = [step(function, INPUTS, model.parameters(), seed)[1:] for seed in (0, 1)]
    close = [all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(f, exact, strict=True)) for f in found]
    assert close[0] == close[1]
    return not close[0]


WAYS = {
    "compress": lambda model, **options: compress(model, **SAVED, **options),
    "backend": lambda m, **options: torch.compile(m, backend=actcompile.backend, options={**SAVED, **options}),
    "in place": lambda m, **options: m.compile(backend=actcompile.backend, options={**SAVED, **options}) or m,
    "its forward": lambda m, **options: torch.compile(
        m.forward, backend=actcompile.backend, options={**SAVED, **options}
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", [True, False])
def test_the_mode_of_the_compiled_module_decides(way, first):
    model = Layers()
    run = WAYS[way](model)
    for training in (first, not first, first):
        model.train(training)
        assert rounded(run, model) == training


@pytest.mark.parametrize("kind", [lambda: Layers(torch._dynamo.graph_break), Loop])
@pytest.mark.parametrize("way", ["compress", "backend"])
def test_it_decides_for_every_graph_of_a_model_with_breaks(kind, way):
    model = kind()
    run = WAYS[way](model)
    for training in (True, False, True):
        model.train(training)
        assert rounded(run, model) == training


def test_two_models_share_a_function_in_different_modes():
    first, second = Loop(), Loop().eval()
    for training in (True, False):
        first.train(training)
        second.train(not training)
        for model in (first, second):
            assert rounded(WAYS["backend"](model), model) == model.training


def test_modules_of_torch_itself():
    x = torch.randn(64, 16)
    model = compress(nn.Sequential(nn.Linear(16, 32), nn.Sigmoid(), nn.Linear(32, 4)), **SAVED)
    model(x).sum().backward()
    model.eval()
    model(x).sum().backward()
    trained, evaluated = explain(model).graphs
    assert trained.training and not evaluated.training
    assert any(r.codec.startswith("quantize") for r in trained.rows)
    assert not any(r.codec.startswith("quantize") for r in evaluated.rows)


def test_frozen_norms_are_trained():
    model = gnn(dropout=0.0)
    for norm in model.norms:
        norm.eval()
    assert rounded(compress(model, **SAVED), model)


def test_always_rounds_in_eval_mode():
    model = Layers().eval()
    assert rounded(compress(model, **SAVED, when="always"), model)
    with pytest.raises(ValueError, match="when must be one of 'training', 'always'"):
        Config(when="eval")


def test_a_function_is_trained():
    model = Layers().eval()
    run = torch.compile(lambda *inputs: model(*inputs), backend=actcompile.backend, options=SAVED)
    assert rounded(run, model)


def test_rules_hold_in_eval_mode_as_far_as_they_are_exact():
    rules = {"a": actcompile.keep(), "*": actcompile.bits(8)}
    report = explain(gnn().eval(), *INPUTS, config=Config(**SAVED, rules=rules))
    assert not any(r.codec.startswith("quantize") for g in report.graphs for r in g.rows)


def test_explain_says_so():
    model = gnn(dropout=0.0)
    assert explain(model, *INPUTS, options=SAVED).notes == ()
    told = explain(model.eval(), *INPUTS, options=SAVED)
    assert any("eval mode" in note and "model.train()" in note for note in told.notes)
    assert any("the model is in eval mode: gradients are exact" in r.reason for g in told.graphs for r in g.rows)
    assert "in eval mode" in str(told).splitlines()[0]
    compress(model, **SAVED)(*INPUTS).sum().backward()
    assert explain(model).graphs == told.graphs
    assert not explain(model, *INPUTS, options={"when": "always"}).notes


def test_graphs_without_gradients_are_not_reported():
    model = compress(Layers(), **SAVED).eval()
    with torch.no_grad():
        model(*INPUTS)
    assert explain(model).graphs == ()
