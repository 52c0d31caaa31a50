"""What backward computes again from a model's inputs: which, exactly, and within which share of the work."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch_geometric.nn import GCNConv, GINConv, SAGEConv
from torch_geometric.utils import degree

import actcompile
from actcompile import Config, keep
from bench.models import build
from tests.helpers import EXACT, FAST, SAVED, assert_close, assert_equal, gnn, graph, quickly, step, uncompressed

INPUTS = graph(nodes=256, edges=1024)
REPLAY = {**FAST, "replay": 0.4}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def report(model, *inputs, **options):
    return actcompile.explain(model, *inputs, options={**REPLAY, "min_bytes": 512, **options}).graphs[0]


def replayed(graph_report):
    return {r.name: r for r in graph_report.rows if r.reason.startswith("backward computes it again")}


def sum_of_products(row):
    return row.module == "convs.0" and row.op == "aten.add.Tensor"


def test_a_first_layer_is_not_saved_and_the_others_are():
    made = report(gnn(layers=3), *INPUTS)
    rows = replayed(made)
    assert {r.module.split(".")[1] for r in rows.values() if r.module.startswith("convs")} == {"0"}
    assert any(map(sum_of_products, rows.values()))
    assert all(r.codec == "recompute" and r.bytes_after == 0 for r in rows.values())
    rounded = [r for r in made.rows if r.codec.startswith("quantize")]
    assert rounded and not any(r.module.startswith("convs.0") for r in rounded)
    assert made.bytes_after < report(gnn(layers=3), *INPUTS, replay=0).bytes_after


STEPS = [(name, dynamic) for name in ("sage", "gcn", "gin", "gat") for dynamic in (None, True)]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "dynamic"), quickly(STEPS, [("sage", True), ("gin", None), ("gcn", None), ("gat", True)])
)
def test_gradients_are_equal_to_the_bit(name, dynamic):
    """With dropout, and with the whole forward's work allowed. Loops that GCN and GAT add have unbacked sizes."""
    options = {**EXACT, "rebuild": False, "replay": 1.0, "fuse": name != "gat"}  # fused, an attention is one op
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        model = gnn(name, layers=3)
        reference = step(uncompressed(model, dynamic=dynamic), INPUTS, model.parameters())
        torch._dynamo.reset()
        assert replayed(report(model, *INPUTS, **options))
        torch._dynamo.reset()
        ours = torch.compile(model, backend="actcompile", options=options, dynamic=dynamic)
        assert_equal(step(ours, INPUTS, model.parameters()), reference)


class Two(nn.Module):
    def __init__(self, layer, wide):
        super().__init__()
        self.first, self.norm, self.last = layer(16, wide), nn.BatchNorm1d(wide), layer(wide, 4)

    def forward(self, x, edge_index):
        return self.last(self.norm(self.first(x, edge_index)).relu(), edge_index)


LAYERS = {
    "sage": SAGEConv,
    "gcn": lambda i, o: GCNConv(i, o, add_self_loops=False),
    "gin": lambda i, o: GINConv(nn.Sequential(nn.Linear(i, o), nn.ReLU(), nn.Linear(o, o))),
}


@settings(max_examples=settings.default.max_examples // 10)  # each compiles
@given(
    layer=st.sampled_from(sorted(LAYERS)),
    wide=st.sampled_from([8, 32, 48]),
    nodes=st.integers(20, 90),
    edges=st.integers(1, 300),
    share=st.sampled_from([0.1, 0.4, 1.0]),
)
def test_gradients_in_float64_are_those_of_eager(layer, wide, nodes, edges, share):
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, edge_index = graph(nodes, edges)
    model, x = Two(LAYERS[layer], wide).double(), x.double()
    ours = torch.compile(model, backend="actcompile", options={**EXACT, "replay": share}, dynamic=False)
    exact = step(model, (x, edge_index), model.parameters())
    assert_equal_up_to_order(step(ours, (x, edge_index), model.parameters()), exact)


def assert_equal_up_to_order(ours, exact):
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class Degrees(nn.Module):
    """Divides by whole numbers, as relational convolutions do."""

    def __init__(self, dtype):
        super().__init__()
        self.first, self.last, self.dtype = nn.Linear(16, 32), nn.Linear(32, 4), dtype

    def forward(self, x, edge_index):
        count = degree(edge_index[1], x.shape[0], self.dtype).clamp(min=1)[:, None]
        return self.last((self.first(x) / count).square())


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.float32])
@pytest.mark.parametrize("dynamic", [None, True])
def test_sums_of_whole_numbers(dtype, dynamic):
    model = Degrees(dtype)
    exact = step(model, INPUTS, model.parameters())
    for share in (0.0, 1.0):
        torch._dynamo.reset()
        ours = torch.compile(model, backend="actcompile", options={**EXACT, "replay": share}, dynamic=dynamic)
        assert_close(step(ours, INPUTS, model.parameters()), exact, 1e-5)


@pytest.mark.parametrize(("features", "again"), [(16, True), (200, False)])
def test_backward_makes_no_larger_tensor_than_the_rest_of_the_step(features, again):
    """Messages as wide as the features: wider than any other, they would be the peak of the step."""
    torch.manual_seed(0)
    model = build("sage", features, 4, hidden=32, layers=3)
    made = report(model, *graph(nodes=256, edges=1024, features=features), replay=1.0, fuse=False)
    assert any(map(sum_of_products, replayed(made).values())) == again
    assert (f"1024, {features}" in made.backward) == again


def test_constants_are_left_to_the_plan():
    made = report(gnn(layers=3), *INPUTS)
    assert any(r.reason.startswith("a constant") for r in made.rows)
    assert not any("full" in r.op for r in replayed(made).values())


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.4, 1.0])
def test_no_more_than_the_share_is_done_again(share):
    rows = replayed(report(gnn(layers=3), *INPUTS, replay=share))
    spent = [int(r.reason.split(": ")[1].split("%")[0]) for r in rows.values()]
    assert sum(spent) <= 100 * share + len(spent)  # each is rounded to a whole number
    assert any(map(sum_of_products, rows.values())) == (share >= 0.4)  # the norm's input: an aggregate and two products
    assert bool(rows) or share < 0.2


def test_not_what_a_rule_keeps_nor_what_is_off():
    kept = report(gnn(layers=3), *INPUTS, rules={"convs.0": keep()})
    assert not any(r.module.startswith("convs.0") for r in replayed(kept).values())
    assert not replayed(report(gnn(layers=3), *INPUTS, replay=0))


class Deep(nn.Module):
    """No dropout, no norm: every layer could be computed from the inputs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).sigmoid()
        return x


def test_one_layer_and_no_more():
    x = torch.randn(64, 16)
    made = report(Deep(), x, replay=1.0)
    assert len(replayed(made)) == 1
    assert sum(r.codec.startswith("quantize") for r in made.rows) == 2  # the last result is the model's own


class Changing(nn.Module):
    """Its forward changes the buffer that its first product was made with."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)
        self.register_buffer("scale", torch.ones(64, 16))

    def forward(self, x):
        out = self.last(self.first(x * self.scale).sigmoid())
        self.scale.add_(1)
        return out


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.last(self.first(x + torch.rand_like(x)).sigmoid())


@pytest.mark.parametrize("model", [Changing, Random])
def test_what_would_come_out_otherwise_is_not_done_again(model):
    model, x = model(), torch.randn(64, 16)
    assert not replayed(report(model, x, replay=1.0))
    reference = step(uncompressed(model), (x,), model.parameters())
    if isinstance(model, Changing):
        model.scale.fill_(1)
    torch._dynamo.reset()
    ours = torch.compile(model, backend="actcompile", options={**EXACT, "replay": 1.0})
    assert_equal(step(ours, (x,), model.parameters()), reference)


def test_the_gradients_have_less_noise():
    model = gnn(layers=3, dropout=0.0)
    exact = step(model, INPUTS, model.parameters())

    def error(options):
        torch._dynamo.reset()
        ours = torch.compile(model, backend="actcompile", options={**options, "min_bytes": 512})
        found = [step(ours, INPUTS, model.parameters(), seed) for seed in range(8)]
        return sum(float((a - b).norm() ** 2) for f in found for a, b in zip(f[1:], exact[1:], strict=True))

    assert error(REPLAY) < error(SAVED)


def test_it_works_under_inductor():
    model = gnn(layers=2, dropout=0.0)
    exact = step(model, INPUTS, model.parameters())
    torch._dynamo.reset()
    options = {"min_bytes": 512, "bits": None, "nonlinear_bits": None, "replay": 1.0}
    assert replayed(report(model, *INPUTS, **options))
    torch._dynamo.reset()
    ours = torch.compile(model, backend="actcompile", options=options)
    assert_close(step(ours, INPUTS, model.parameters())[:1], exact[:1], 1e-5)
    for a, b in zip(step(ours, INPUTS, model.parameters()), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [True, -0.1, 1.5, "all"])
def test_the_field_is_checked(value):
    with pytest.raises(ValueError, match="replay must be a number from 0 to 1"):
        Config(replay=value)


class Typed(nn.Module):
    """A matrix for each edge by its type, as FastRGCNConv and RGATConv take it, behind another layer."""

    def __init__(self):
        super().__init__()
        self.first, self.matrices = nn.Linear(16, 32), nn.Parameter(torch.randn(3, 32, 4))

    def forward(self, x, edge_index, kinds):
        x = self.first(x).tanh()
        messages = torch.bmm(x[edge_index[0]][:, None], self.matrices[kinds])[:, 0]
        return messages.new_zeros(x.shape[0], 4).index_add(0, edge_index[1], messages)


@pytest.mark.parametrize("share", [0.01, 0.4])
def test_what_is_taken_of_parameters_is_taken_again_whatever_the_share(share):
    """That moves no more bytes than decoding would, and makes no larger tensor."""
    x, edge_index = INPUTS
    inputs, model = (x, edge_index, torch.arange(1024) % 3), Typed()
    made = report(model, *inputs, replay=share)
    assert ("1024", "32", "4") in {r.shape for r in replayed(made).values()} | {
        (r.shape[0], *r.shape[:0:-1]) for r in replayed(made).values()
    }
    ours = torch.compile(model, backend="actcompile", options={**EXACT, "replay": share})
    exact = step(model, inputs, model.parameters())
    assert_close(step(ours, inputs, model.parameters()), exact, 1e-5)


def test_by_default_nothing_is_made_again_that_makes_the_peak():
    """Auto is as good as the better of with and without, for shallow models and deep ones."""
    for layers in (1, 2, 3):
        model = gnn(layers=layers, hidden=64, dropout=0.0)
        found = {}
        for replay in ("auto", 0, 0.4):
            made = actcompile.explain(model, *INPUTS, config=Config(**{**FAST, "replay": replay}))
            found[replay] = made.graphs[0].memory_after.peak
        assert found["auto"] <= 1.02 * min(found.values())


def test_by_default_a_first_layer_is_made_again_that_makes_no_peak():
    model = build("sage", 128, 40, hidden=256, layers=2)
    x, edge_index = (t.to("meta") for t in graph(nodes=20_000, edges=140_000, features=128))
    auto, never = (
        actcompile.explain(model.to("meta"), x, edge_index, options={"replay": replay}) for replay in ("auto", 0)
    )
    assert any("computes it again from inputs" in row.reason for row in auto.graphs[0].rows)
    assert auto.saved_bytes_after < never.saved_bytes_after
    assert auto.graphs[0].memory_after.peak <= 1.02 * never.graphs[0].memory_after.peak
