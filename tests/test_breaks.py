"""Models that Dynamo cuts in several graphs: what goes from one to the next is counted, and encoded."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import graph_break
from torch._dynamo.utils import graph_break_reasons
from torch_geometric.nn import SAGEConv

import actcompile
from actcompile import compress, explain
from actcompile.backend import Partitioner
from actcompile.tracing.call import Situation
from tests.helpers import EXACT, FAST, SAVED, assert_close, assert_equal, graph, quickly, step, uncompressed

INPUTS = graph(nodes=256, edges=1024)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)


class Chain(Base):
    """What a graph saves for itself is also what it hands on."""

    def forward(self, x, edges):
        h = self.a(x).sigmoid()
        graph_break()
        h = self.b(h).sigmoid()
        graph_break()
        return self.c(h).exp()


class Residual(Base):
    """One tensor goes to two later graphs."""

    def forward(self, x, edges):
        h = self.a(x).sigmoid()
        graph_break()
        g = self.b(h).sigmoid() + h
        graph_break()
        return self.c(g * h)


class Between(Base):
    """Python makes, and saves, a tensor between two graphs."""

    def forward(self, x, edges):
        h = self.a(x)
        print(end="")
        h = _in_python(h)
        return self.c(self.b(h).sin())


@torch.compiler.disable
def _in_python(h):
    return h.sigmoid()


class Indices(Base):
    """An index and a mask of an earlier graph, without gradients."""

    def forward(self, x, edges):
        h = self.a(x)
        keep = (edges[0] % 3 == 0)[:, None]
        graph_break()
        rows = edges[1] * 1
        w = self.b(h).sigmoid()
        return self.c(torch.where(keep, w.index_select(0, rows), 0.0).sin())


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = SAGEConv(16, 32), SAGEConv(32, 32), SAGEConv(32, 4)
        self.norm, self.dropout = nn.BatchNorm1d(32), 0.5

    def forward(self, x, edges):
        x = self.norm(self.a(x, edges)).relu()
        graph_break()
        x = F.dropout(self.b(x, edges).relu(), self.dropout, self.training)
        graph_break()
        return self.c(x, edges)


MODELS = [Chain, Residual, Between, Indices, Convolutions]


def held(output, *others):
    """Bytes that autograd holds for backward, apart from those of `others`."""
    own = {t.untyped_storage().data_ptr() for t in (output, *others)}
    seen, nodes, visited = {}, [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        names = [n for n in dir(node) if n.startswith("_saved_") or n in ("saved_tensors", "_tensors_no_vc_check")]
        for value in (getattr(node, name, None) for name in names):
            for t in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in own:
                    seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        nodes += [following for following, _ in node.next_functions]
    return sum(seen.values())


def really(function, model):
    return held(function(*INPUTS), *INPUTS, *model.parameters(), *model.buffers())


def plainly(kind):
    model = kind()
    return really(uncompressed(model), model)


OPTIONS = {"all": SAVED, "lossless": EXACT, "none": {**SAVED, "min_bytes": 40_000}}
SLOW = [(options, kind) for options in ("lossless", "none") for kind in (Chain, Between, Convolutions)]


@pytest.mark.parametrize(("options", "kind"), quickly([(o, kind) for o in OPTIONS for kind in MODELS], SLOW))
def test_the_report_is_what_is_held(options, kind):
    options = OPTIONS[options]
    plain, model = plainly(kind), kind()
    torch._dynamo.reset()
    told = explain(model, *INPUTS, options=options)
    torch._dynamo.reset()
    compress(model, **options)
    after = really(model, model)
    report = explain(model)
    assert len(report.graphs) > 1
    by_python = 256 * 32 * 4 if kind is Between else 0  # what eager operations save is no graph's
    assert abs(report.saved_bytes_after + by_python - after) <= 0.02 * after + 64  # seeds
    assert abs(report.saved_bytes_before + by_python - plain) <= 0.02 * plain
    if kind is not Between:  # a trace does not see what Python does there
        assert told.graphs == report.graphs


def test_it_is_small():
    plain, model = plainly(Convolutions), Convolutions()
    torch._dynamo.reset()
    assert really(compress(model, **SAVED), model) * 8 <= plain


SLOW = (None, Between), (None, Indices), (True, Chain), (True, Convolutions)


@pytest.mark.parametrize(("dynamic", "kind"), quickly([(d, kind) for d in (None, True) for kind in MODELS], SLOW))
def test_gradients(dynamic, kind):
    model = kind()
    reference = step(uncompressed(model, dynamic=dynamic), INPUTS, model.parameters())
    torch._dynamo.reset()
    exact = torch.compile(model, backend=actcompile.backend, options=EXACT | {"fuse": False}, dynamic=dynamic)
    assert_equal(step(exact, INPUTS, model.parameters()), reference)
    if kind is Convolutions:  # its dropout draws other numbers where a seed is drawn
        return
    torch._dynamo.reset()
    rounded = torch.compile(model, backend=actcompile.backend, options={**FAST, "bits": 8}, dynamic=dynamic)
    assert_close(step(rounded, INPUTS, model.parameters()), reference, within=0.05)


class Linear(Base):
    """Every gradient is linear in each saved tensor, and both graphs save `h`."""

    def forward(self, x, edges):
        h = self.a(x)
        g = self.b(h)
        graph_break()
        return self.c(g) + self.c(h)


def test_two_graphs_round_one_tensor_without_bias():
    """A z-test of each gradient's product with a vector of signs: false alarms below 1e-5 in all."""
    model, draws = Linear(), 256
    exact = step(model, INPUTS, model.parameters())[1:]
    ours = compress(model, **SAVED)
    found = [step(ours, INPUTS, model.parameters(), seed)[1:] for seed in range(draws)]
    assert any(r.codec.startswith("quantize") for r in rows_of(model, "an earlier graph"))
    for number, gradient in enumerate(exact):
        signs = torch.sign(torch.randn_like(gradient))
        off = torch.stack([((f[number] - gradient) * signs).sum() for f in found])
        assert off.mean().abs() <= 5 * off.std() / draws**0.5 + 1e-5 * gradient.norm()


def rows_of(model, op):
    return [r for g in explain(model).graphs for r in g.rows if r.op == op]


class Given(nn.Module):
    """All that it saves after the break is alive: what it was given, wherever that is found, and what it keeps."""

    def __init__(self):
        super().__init__()
        self.last, self.kept = nn.Linear(16, 4), None

    def forward(self, x, held):
        self.kept = x.sin()
        graph_break()
        return self.last(x * held["scale"][0].value * self.kept).sum()


class Holder:
    def __init__(self, value):
        self.value = value


def test_what_the_call_was_given_is_alive():
    """Also a tensor that the caller computed, with a gradient."""
    encoder, model = nn.Linear(16, 16), Given()
    compress(model, **FAST)
    model(encoder(INPUTS[0]), {"scale": [Holder(torch.rand(256, 16))]}).backward()
    assert len(explain(model).graphs) == 2
    assert not rows_of(model, "an earlier graph")
    assert encoder.weight.grad is not None


class Returned(Base):
    def forward(self, x, edges):
        h = self.a(x).sigmoid()
        graph_break()
        return h, self.b(h).sigmoid()


def test_what_the_model_returns_is_exact_and_its_last_graph_s_is_kept():
    model = Returned()
    reference = model(*INPUTS)
    assert_equal(list(compress(model, **SAVED)(*INPUTS)), list(reference))
    last = explain(model).graphs[-1]
    assert any(r.reason == "the model returns it, or a view of it" for r in last.rows)


class Loop(Base):
    """A break in a loop: Dynamo leaves forward to Python and compiles what it calls."""

    def forward(self, x, edges):
        x = self.a(x)
        for layer in (self.b, self.c):
            graph_break()
            x = sine(layer, x)
        return x


def sine(layer, x):
    return layer(x).sin()


@pytest.mark.parametrize("way", ["compress", "backend"])
def test_breaks_are_listed_after_a_run(way):
    for kind, what in ((Chain, "graph_break()`"), (Loop, "forward (" + __file__)):
        torch._dynamo.reset()
        model, before = kind(), len(graph_break_reasons)
        told = explain(model, *INPUTS, options=FAST)
        assert len(graph_break_reasons) == before
        run = compress(model, **FAST) if way == "compress" else torch.compile(model, backend="actcompile", options=FAST)
        for _ in range(2):
            run(*INPUTS).sum().backward()
        report = explain(run)
        assert len(report.notes) == (2 if kind is Chain else 1)
        assert all(note.startswith("graph break: ") and what in note for note in report.notes)
        assert {n for n in told.notes if "graph break" in n} == set(report.notes)
        assert "graph break" in str(report)


def test_where_a_graph_stands_is_part_of_its_identity():
    """Else a cached graph that encodes an input would be taken where the input is the model's own."""
    places = [Situation(), Situation(crossing=(0,)), Situation(crossing=(1,)), Situation(handed_on=True)]
    assert len({Partitioner(actcompile.Config(), place).uuid() for place in places}) == len(places)
