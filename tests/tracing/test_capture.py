"""Sizes that depend on data stay in the graphs of our backends, and nobody else sees the setting that does it."""

import copy
import random
import threading

import pytest
import torch
import torch_geometric.nn as pyg
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from actcompile import api, compress, explain
from actcompile.tracing.capture import SETTINGS, SIZES, whole_graphs
from tests.helpers import EXACT, FAST, assert_close, gnn, graph, held_bytes, step


@pytest.fixture(autouse=True)
def settings_are_left():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    assert not any(getattr(dynamo_config, setting) for setting in SETTINGS)
    torch._dynamo.reset()


class Selected(nn.Module):
    """Twice the rows with a positive first element, as two breaks of torch's own tracing have it."""

    def forward(self, x):
        x = x[x[:, 0] > 0] * 2
        return x[x[:, 1] > 0].sin()


class Branching(Selected):
    """Python asks for the number of rows in a loop, which Dynamo cannot leave halfway."""

    def forward(self, x):
        x = x[x[:, 0] > 0] * 2
        for _ in range(2):
            if x.shape[0] > 3:
                x = x.sin()
        return x


class Drawing(nn.Module):
    """Dynamo itself asks for the number of rows, as PyG's negative sampling has it: it draws numbers as it traces."""

    def forward(self, x):
        x = x[x[:, 0] > 0] * 2
        return x.sin() * random.Random(0).randint(1, x.shape[0])


class DrawingLater(nn.Module):
    """So does a graph that is handed tensors with such sizes by the one before."""

    def forward(self, x):
        x = x[x[:, 0] > 0] * 2
        torch._dynamo.graph_break()
        return x.sin() * random.Random(0).randint(1, x.shape[0])


class Pooled(nn.Module):
    """Layers over a batch of graphs whose number PyG's pooling asks for, so that torch's own tracing breaks there."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = (
            pyg.GINConv(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32))),
            nn.Linear(32, 2),
        )
        self.virtual = nn.Linear(32, 32)

    def forward(self, x, edges, batch):
        x = self.conv(x, edges).sin()
        x = x + self.virtual(pyg.global_mean_pool(x, batch))[batch].sigmoid()
        return self.head(pyg.global_max_pool(x, batch))


def molecules(graphs, each=20):
    """Features, edges and the graph of each node, [graphs * each]."""
    batch = torch.arange(graphs * each) // each
    ends = torch.randint(each, (2, 4 * graphs * each)) + batch.repeat(4) * each
    return torch.randn(graphs * each, 4), ends, batch


class Scaled(nn.Module):
    """A float that Python takes: gradients go through what it multiplies, and not through itself."""

    def forward(self, x):
        return (x.sin() / x.abs().max().item()).exp() * float(x.sum())


class Deciding(nn.Module):
    """Python branches by a number, in a loop that Dynamo cannot leave halfway."""

    def forward(self, x):
        for _ in range(2):
            if int((x > 0).sum()) > 3:
                x = x.sin()
        return x


class Counting(nn.Module):
    """Python counts up to a number."""

    def forward(self, x):
        for _ in range(int((x[0] > 0).sum()) + 1):
            x = x.sin()
        return x


class Remembering(nn.Module):
    """What Python keeps of a number is a number."""

    def forward(self, x):
        self.largest, self.scale = int((x > 0).sum()), x.abs().max().item()
        return x.sin() * self.largest


def counted(model, **options):
    """How often, and to how many graphs, `model` compiles for a backend that is not ours."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, **options)
    return counter, compiled


def test_a_backend_by_name_gets_one_graph():
    x, edges = graph()
    model = gnn("gcn")
    torch.compile(model, backend="actcompile", options=FAST)(x, edges).sum().backward()
    assert len(explain(model).graphs) == 1


def test_explain_traces_as_a_run_does():
    report = explain(gnn("gcn"), *graph(), options=FAST)
    assert len(report.graphs) == 1
    assert not any("graph break" in note for note in report.notes)


@pytest.mark.parametrize("kind", [Selected, Scaled])
def test_other_models_do_not_see_the_setting(kind):
    x = torch.randn(20, 4, requires_grad=True)
    counter, before = counted(kind())
    before(x)
    breaks = counter.frame_count
    assert breaks > 1
    ours = compress(kind(), **EXACT)
    for _ in range(2):
        ours(x).sum().backward()
        before(x)
        assert counter.frame_count == breaks  # nothing guards on the setting
    torch._dynamo.reset()
    ours(x).sum().backward()
    counter, after = counted(kind())
    after(x)
    assert counter.frame_count == breaks


def test_a_model_between_our_graphs_does_not_see_the_setting():
    counter, inner = counted(Selected())
    inner(torch.randn(20, 4))
    breaks = counter.frame_count
    torch._dynamo.reset()
    counter, inner = counted(Selected())

    class Outer(nn.Module):
        def forward(self, x):
            x = x[x[:, 0] > 0] * 2
            torch._dynamo.graph_break()
            return call(x).sin()

    call = torch._dynamo.disable(lambda x: inner(x))
    compress(Outer(), **EXACT)(torch.randn(20, 4, requires_grad=True)).sum().backward()
    assert counter.frame_count == breaks


def test_another_thread_does_not_see_the_setting(monkeypatch):
    """It traces its model before or after, not while the setting is there, which newer versions keep per thread."""
    x = torch.randn(20, 4, requires_grad=True)
    counter, plain = counted(Selected())
    plain(x)
    breaks = counter.frame_count
    assert breaks > 1
    torch._dynamo.reset()
    counter, plain = counted(Selected())
    other, compile_graph = threading.Thread(target=lambda: plain(x)), api.compile_graph

    def watched(*arguments):
        assert getattr(dynamo_config, SIZES)
        other.start()
        other.join(timeout=1)
        return compile_graph(*arguments)

    monkeypatch.setattr(api, "compile_graph", watched)
    compress(Selected(), **EXACT)(x)
    other.join()
    assert counter.frame_count == breaks


@pytest.mark.parametrize("asking", [Branching, Drawing, DrawingLater, Deciding, Counting])
def test_a_size_that_python_asks_for_ends_the_graph_as_it_did(asking):
    x = torch.randn(20, 4, requires_grad=True)
    counter, compiled = counted(asking())
    compiled(x)
    model = compress(asking(), **EXACT)
    assert_close(step(model, (x,), [x]), step(asking(), (x,), [x]), within=1e-6)
    assert min(1, counter.frame_count) <= len(explain(model).graphs) <= counter.frame_count


def test_the_number_of_graphs_is_in_the_graph():
    model = Pooled()
    plain = copy.deepcopy(model)
    compress(model, **EXACT)
    for graphs in (5, 7, 1, 12):
        inputs = molecules(graphs)
        ours, exact = step(model, inputs, model.parameters()), step(plain, inputs, plain.parameters())
        assert_close(ours, exact, within=1e-5)
    report = explain(model)
    assert len(report.graphs) == 2 and not report.notes  # for the first sizes, and for any
    inputs = molecules(9)
    held = held_bytes(model(*inputs), [*inputs, *model.parameters()])
    assert abs(explain(model).graphs[-1].bytes_after - held) <= 0.02 * held


def test_the_number_of_graphs_is_a_guess_before_a_run():
    (made,) = explain(Pooled(), *molecules(6), options=FAST).graphs
    assert made.guesses and not made.bounds and all(made.sizes[name] == 120 for name in made.guesses)
    assert f"{made.guesses[0]} perhaps 120" in str(explain(Pooled(), *molecules(6), options=FAST))


@pytest.mark.parametrize("numbered", [Scaled, Remembering])
def test_numbers_that_python_has_stay_what_they_are(numbered):
    model, plain = compress(numbered(), **EXACT), numbered()
    for rows in (20, 21, 33):
        x = torch.randn(rows, 4, requires_grad=True)
        assert_close(step(model, (x,), [x]), step(plain, (x,), [x]), within=1e-5)
        for name in vars(plain).keys() & {"largest", "scale"}:
            kept, value = vars(model)[name], vars(plain)[name]
            assert type(kept) is type(value) and kept == value


def test_what_a_compiler_cannot_do_with_such_sizes_is_done_without(monkeypatch):
    compile_graph, tried = api.compile_graph, []

    def fails(gm, *arguments):
        tried.append(any(free_unbacked_symbols(n.meta["example_value"]) for n in gm.graph.nodes if n.op != "output"))
        if tried[-1]:
            raise KeyError("u0")
        return compile_graph(gm, *arguments)

    monkeypatch.setattr(api, "compile_graph", fails)
    x = torch.randn(20, 4, requires_grad=True)
    model = compress(Selected(), **EXACT)
    assert_close(step(model, (x,), [x]), step(Selected(), (x,), [x]), within=1e-6)
    counter, compiled = counted(Selected())
    compiled(x)
    assert tried[0] and tried.count(False) == counter.frame_count


def test_other_errors_are_raised_at_once():
    calls = []

    @whole_graphs
    def broken(gm, inputs):
        calls.append(gm)
        raise ZeroDivisionError("no such codec")

    with pytest.raises(BackendCompilerFailed, match="no such codec"):
        torch.compile(nn.Linear(4, 4), backend=broken)(torch.randn(2, 4))
    assert len(calls) == 1


def test_the_user_s_own_setting_stays():
    with dynamo_config.patch({SIZES: True}):
        counter, compiled = counted(Selected())
        compress(Selected(), **EXACT)(torch.randn(20, 4, requires_grad=True))
        assert getattr(dynamo_config, SIZES)
        compiled(torch.randn(20, 4))
        assert counter.frame_count == 1
