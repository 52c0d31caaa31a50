"""What a BatchNorm reads is rounded in its own units: where, and what that is worth."""

import pytest
import torch
from torch import nn
from torch_geometric.nn import GCNConv, SAGEConv

import actcompile
from actcompile.passes.codecs import standardise
from actcompile.passes.codecs.standardise import standard
from tests.helpers import SAVED, assert_close, gnn, graph, step, uncompressed

TWO = {**SAVED, "bits": 2, "nonlinear_bits": 2}
EIGHT = {**SAVED, "bits": 8, "nonlinear_bits": 8}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def codecs(model, *inputs, **options):
    graphs = actcompile.explain(model, *inputs, options={**SAVED, **options}).graphs
    return {row.name: row.codec for g in graphs for row in g.rows if row.codec.startswith("quantize")}


class Normed(nn.Module):
    """A layer whose columns have deviations near `scale` and means near `shift`, a norm, a layer."""

    def __init__(self, norm, scale=1.0, shift=0.0):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 32), norm, nn.Linear(32, 4)
        with torch.no_grad():
            self.first.weight.mul_(torch.as_tensor(scale).expand(32)[:, None])
            self.first.bias.add_(shift)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


def test_the_norm_s_input_and_nothing_else_of_a_gnn():
    found = codecs(gnn("sage"), *graph())
    assert [name for name, codec in found.items() if "standardised" in codec] == ["add"]
    assert not any("standardised" in codec for codec in codecs(gnn("sage"), *graph(), standardise=False).values())
    assert not any("standardised" in codec for codec in codecs(gnn("sage"), *graph(), preset="exact").values())


class WithoutDropout(nn.Module):
    """Two layers of PyG's with a norm between them: torch saves what ReLU has passed."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.norm, self.last = layer(16, 32), nn.BatchNorm1d(32), layer(32, 4)

    def forward(self, x, edge_index):
        return self.last(self.norm(self.first(x, edge_index)).relu(), edge_index)


@pytest.mark.parametrize(
    "layer, name",
    [
        pytest.param(lambda i, o: GCNConv(i, o, add_self_loops=False), "scatter_add_1", id="less a bias"),
        pytest.param(SAGEConv, "sub_1", id="less its mean"),
    ],
)
@pytest.mark.parametrize("dynamic", [None, True])
def test_what_is_saved_may_be_the_norm_s_input_less_one_number_a_column(layer, name, dynamic):
    model, inputs = WithoutDropout(layer), graph()
    parameters = [p for n, p in model.named_parameters() if not n.startswith("first") or n.endswith("weight")]
    exact = step(uncompressed(model, dynamic=dynamic), inputs, parameters)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="actcompile", options=EIGHT, dynamic=dynamic)
    assert_close(step(compiled, inputs, parameters), exact, 0.02)
    if not dynamic:
        torch._dynamo.reset()
        assert [n for n, codec in codecs(model, *inputs).items() if "standardised" in codec] == [name]


def forms(model):
    """The standardised forms that forward computes anyway."""
    seen = []

    def transform(split):
        seen.extend((node, form) for node in split.forward.graph.nodes if (form := standard(node)) is not None)

    uncompressed(model, transform)(torch.randn(64, 16))
    return seen


def test_what_is_saved_less_its_mean_is_encoded_as_it_is_read(monkeypatch):
    """The mean is taken off as the norm's input is encoded: nothing else is rounded, and no tensor is made for it."""
    inputs, results, read = graph(), [], []
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr(standardise, "_alike", lambda one, other: False)
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = actcompile.compress(WithoutDropout(SAGEConv), **TWO)
        torch.manual_seed(1)
        results.append(step(model, inputs, model.parameters()))
        (made,) = actcompile.explain(model).graphs
        nodes = {node.name: node for node in made.forward_nodes}
        read.append(["sub" in nodes[n.inputs[0]].op for n in nodes.values() if n.op.startswith("actcompile.quantize")])
    assert any(read[1]) and not any(read[0])
    for ours, as_before in zip(*results, strict=True):
        assert torch.equal(ours, as_before)


@pytest.mark.parametrize("norm", [nn.LayerNorm(32), nn.Identity()], ids=["by row", "none"])
def test_no_other_norm(norm):
    assert not forms(Normed(norm))


class Given(nn.BatchNorm1d):
    """What a norm in eval mode is with some versions of torch, written out."""

    def forward(self, x):
        return (x - self.running_mean) * torch.rsqrt(self.running_var + self.eps)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(32), Given(32)], ids=["torch's", "written out"])
def test_running_statistics_are_no_standard(norm):
    assert not forms(Normed(norm).eval())


class Encoded(nn.Module):
    """A linear layer that no norm reads, and its columns' deviations and means spread far."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4, bias=False)
        with torch.no_grad():
            self.first.weight.mul_(10 ** torch.linspace(-2, 2, 32)[:, None])
            self.first.bias.add_(10 ** torch.linspace(2, -1, 32))

    def forward(self, x):
        return self.last(self.first(x))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("bits", [2, 8])
def test_what_a_linear_layer_returns_has_its_own_statistics(bits, dynamic):
    model, x = Encoded(), torch.randn(256, 16)
    options = {**SAVED, "bits": bits}
    with_it, without = (codecs(model, x, **options, standardise=on) for on in (True, False))
    assert ["standardised" in codec for codec in with_it.values()] == [True]
    assert ["standardised" in codec for codec in without.values()] == [False]
    exact = step(uncompressed(model, dynamic=dynamic), [x], list(model.last.parameters()))

    def error(**changed):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="actcompile", options={**options, **changed}, dynamic=dynamic)
        ours = step(compiled, [x], list(model.last.parameters()))
        scale = model.first(x).std(0)  # of each column of the gradient
        return float(((ours[1] - exact[1]) / scale).norm() / (exact[1] / scale).norm())

    assert error() < error(standardise=False) / 10


def test_the_mean_of_gradients_through_own_statistics_is_exact():
    """False alarm: |z| of 128 elements passes 5 with 7e-5."""
    model, x = Encoded(), torch.randn(256, 16)
    compiled = torch.compile(model, backend="actcompile", options={**SAVED, "bits": 2})
    parameters = list(model.last.parameters())
    draws = torch.stack([step(compiled, [x], parameters, seed)[1] for seed in range(200)]).double()
    exact = step(model, [x], parameters)[1]
    z = (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)
    assert draws.std(0).min() > 0 and z.abs().max() < 5


def test_own_statistics_are_counted_and_dead_code_goes():
    model, x = Encoded(), torch.randn(256, 16)
    (ours,) = actcompile.explain(model, x, options={**SAVED, "bits": 8}).graphs
    (row,) = (r for r in ours.rows if "standardised" in r.codec)
    assert row.bytes_after == 256 * 32 + 4 * (256 * 32 // 64) + 2 * 4 * 32
    (exact,) = actcompile.explain(model, x, options={**SAVED, "bits": None, "nonlinear_bits": None}).graphs
    assert "rsqrt" not in exact.forward


@pytest.mark.parametrize("rows, standardised", [(63, False), (64, True)])
def test_few_rows_are_not_worth_statistics(rows, standardised):
    (codec,) = codecs(Encoded(), torch.randn(rows, 16), bits=8).values()
    assert ("standardised" in codec) == standardised


def test_the_form_is_the_norm_s_own():
    (node, form), *_ = forms(Normed(nn.BatchNorm1d(32)))  # then the centred input
    assert node.meta["val"].shape == form.result.meta["val"].shape == (64, 32)
    (mean,) = form.plus
    assert mean.meta["val"].numel() == form.scale.meta["val"].numel() == 32 and not form.minus
    assert form.result.args[0].args == (node, mean) and form.result.args[1] is form.scale


@pytest.mark.parametrize("dynamic", [None, True])
def test_columns_of_any_scale_keep_their_gradients(dynamic):
    """At 8 bits, with columns whose deviations span four orders of magnitude, and whose means are larger still."""
    model = Normed(nn.BatchNorm1d(32), 10 ** torch.linspace(-2, 2, 32), 10 ** torch.linspace(2, -1, 32))
    x = torch.randn(256, 16)
    parameters = list(model.parameters())[2:]  # a bias before BatchNorm has a gradient of zero
    exact = step(uncompressed(model, dynamic=dynamic), [x], parameters)

    def rounded(**options):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="actcompile", options={**EIGHT, **options}, dynamic=dynamic)
        return step(compiled, [x], parameters)

    assert_close(rounded(), exact, 0.03)
    with pytest.raises(AssertionError):
        assert_close(rounded(standardise=False), exact, 0.3)


def test_statistics_that_torch_does_not_save_are_saved():
    def function(x, w):
        h = x @ w
        variance, mean = torch.var_mean(h, 0, correction=0, keepdim=True)
        seen = ((h - mean) * torch.rsqrt(variance + 1e-5)).detach()
        return (h * h).sum(1), seen.amax(0)

    x, w = torch.randn(64, 16), torch.randn(16, 32, requires_grad=True)
    exact = step(uncompressed(function), [x, w], [w])
    torch._dynamo.reset()
    assert any("standardised" in codec for codec in codecs(function, x, w, **EIGHT).values())
    torch._dynamo.reset()
    assert_close(step(torch.compile(function, backend="actcompile", options=EIGHT), [x, w], [w]), exact, 0.01)


def test_in_bfloat16():
    model = Normed(nn.BatchNorm1d(32))
    x = torch.randn(32, 16)

    def cast(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float()

    parameters = list(model.parameters())[2:]
    exact = step(uncompressed(cast), [x], parameters)
    torch._dynamo.reset()
    ours = step(torch.compile(cast, backend="actcompile", options=EIGHT), [x], parameters)
    assert_close(ours, exact, 0.05)


def test_infinities_still_show():
    model = Normed(nn.BatchNorm1d(32))
    x = torch.randn(64, 16)
    x[3, 2] = float("inf")
    gradients = step(torch.compile(model, backend="actcompile", options=TWO), [x], model.parameters())[1:]
    assert not torch.isfinite(gradients[0]).all()


def test_the_field_is_checked():
    with pytest.raises(TypeError, match="standardise must be True or False, got 1"):
        actcompile.Config(standardise=1)


def test_the_units_themselves_stay_exact():
    """With no least size, the norm's statistics could be rounded, too, and all that is decoded with them."""
    (made,) = actcompile.explain(gnn("sage"), *graph(nodes=256, edges=1024), options={**SAVED, "min_bytes": 64}).graphs
    assert any("standardised" in row.codec for row in made.rows)
    assert any("in its units" in row.reason for row in made.rows)
    assert all(row.codec == "keep" for row in made.rows if "rsqrt" in row.name)
