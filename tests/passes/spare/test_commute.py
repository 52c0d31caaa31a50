"""Where backward maps a gradient instead of saving a layer's aggregate: which, exactly, and without a bias."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch_geometric.nn import GINConv, SAGEConv

import actcompile
from actcompile import keep
from actcompile.passes.graph.find import find
from actcompile.passes.spare.commute import commute
from actcompile.passes.spare.masks import masks
from bench.models import Stack
from tests.helpers import EXACT, FAST, SAVED, assert_close, gnn, graph, step, uncompressed

ROWS, EDGES, WIDTH = 24, 60, 8
STEPS = ("scatter_add", "index_add", "index_put", "gather", "by row", "by edge", "halve", "plus itself", "twice")


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def apply(name, x, source, target, by_row, by_edge):
    """One linear map of rows; it leaves the shape as it is."""
    wide = target[:, None].expand(-1, x.shape[1])
    zeros = torch.zeros_like(x)
    match name:
        case "scatter_add":
            return zeros.scatter_add(0, wide, x[source])
        case "index_add":
            return zeros.index_add(0, target, x.index_select(0, source))
        case "index_put":
            return zeros.index_put((target,), x[source], accumulate=True)
        case "gather":
            return x.gather(0, source[: x.shape[0], None].expand(-1, x.shape[1]))
        case "by row":
            return x * by_row
        case "by edge":
            return zeros.scatter_add(0, wide, by_edge * x[source]) / (by_row + 2)
        case "halve":
            return x / 2
        case "plus itself":
            return x + x[source[: x.shape[0]]]
    return x + x


def layer(steps, h, root, weight, indices, factors):
    """What a layer does with the result `x` of the one before: its aggregate times weights, and its root weights."""
    x = h.sigmoid()
    aggregate = x
    for name in steps:
        aggregate = apply(name, aggregate, *indices, *factors)
    return x @ root + aggregate @ weight


def commuted(function, inputs, parameters):
    """A step's result in float64 with the pass alone, and what it did."""
    made = []

    def transform(split):
        made.extend(commute(split, [a for a in find(split) if a.node.op != "placeholder"], kind=lambda _: None))

    return step(uncompressed(function, transform), inputs, parameters), made


def problem(columns):
    torch.manual_seed(0)
    h, root, weight = (torch.randn(s, dtype=torch.float64) for s in ((ROWS, WIDTH), (WIDTH, columns), (WIDTH, columns)))
    indices = torch.randint(0, ROWS, (2, EDGES)).unbind()
    factors = torch.rand(ROWS, 1, dtype=torch.float64), torch.rand(EDGES, 1, dtype=torch.float64)
    parameters = [t.requires_grad_() for t in (h, root, weight)]
    return parameters, indices, factors


@settings(max_examples=settings.default.max_examples // 3)
@given(steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=4), columns=st.integers(1, 2 * WIDTH))
def test_the_gradients_are_those_of_before(steps, columns):
    torch._dynamo.reset()
    parameters, indices, factors = problem(columns)

    def function(h, root, weight):
        return layer(steps, h, root, weight, indices, factors)

    ours, _ = commuted(function, parameters, parameters)
    assert_close(ours, step(function, parameters, parameters), 1e-13)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("columns", [3, WIDTH, WIDTH + 1])
def test_what_is_mapped_is_not_saved_where_the_gradient_is_no_wider(name, columns):
    parameters, indices, factors = problem(columns)
    ours, made = commuted(
        lambda h, root, weight: layer([name], h, root, weight, indices, factors), parameters, parameters
    )
    summed_with_others = name in ("plus itself", "twice")  # backward adds the root's gradient first
    assert len(made) == (columns <= WIDTH and not summed_with_others)
    torch._dynamo.reset()
    exact = step(lambda h, root, weight: layer([name], h, root, weight, indices, factors), parameters, parameters)
    assert_close(ours, exact, 1e-13)


def SumSAGE(i, o):
    return SAGEConv(i, o, aggr="sum")


def GIN(i, o):
    return GINConv(nn.Linear(i, o))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("layer", [SAGEConv, SumSAGE, GIN], ids=lambda f: f.__name__)
def test_layers_of_pyg(layer, dynamic):
    torch.manual_seed(0)
    model, inputs = Stack(layer, 16, 4, hidden=32, layers=3), graph()
    exact = step(uncompressed(model, dynamic=dynamic), inputs, model.parameters())
    made = []
    torch._dynamo.reset()

    def transform(split):
        masks(split)
        wanted = [a for a in find(split) if a.refusal is None and a.value.is_floating_point()]
        made.extend(commute(split, wanted, kind=lambda _: None))

    ours = step(uncompressed(model, transform, dynamic=dynamic), inputs, model.parameters())
    assert {m.activation.module.split(".")[1] for m in made} == {"1", "2"}  # the first layer's input has no gradient
    # A bias before BatchNorm has a gradient of zero, and noise for its direction.
    named = [n for n, _ in model.named_parameters()]
    kept = [k for k, n in enumerate(named) if not (n.startswith(("convs.0", "convs.1")) and n.endswith("bias"))]
    assert_close([ours[0]] + [ours[k + 1] for k in kept], [exact[0]] + [exact[k + 1] for k in kept], 1e-4)


def aggregates(graph_report):
    return {r.name: r for r in graph_report.rows if r.reason.startswith("backward aggregates")}


def test_the_report_says_what_is_multiplied_instead():
    made = actcompile.explain(gnn(layers=3), *graph(nodes=256, edges=1024), options={**FAST, "min_bytes": 512})
    rows = aggregates(made.graphs[0])
    assert set(rows) == {"div_1", "div_2"}
    assert all(r.bytes_before == 256 * 32 * 4 and r.bytes_after == 0 and r.codec == "drop" for r in rows.values())
    assert "multiplies it with dropout/mul_8: the same product" in rows["div_1"].reason
    zeros = [r for r in made.graphs[0].rows if r.name.startswith("full_")]  # of the width of what was mapped before
    assert [(r.codec, r.bytes_after) for r in zeros] == [("drop", 0)] and zeros[0].reason.startswith("a constant")


@pytest.mark.parametrize("options", [EXACT, {**FAST, "rebuild": False}], ids=["lossless", "off"])
def test_not_where_gradients_are_to_be_equal_to_the_bit(options):
    made = actcompile.explain(gnn(layers=3), *graph(nodes=256, edges=1024), options={**options, "min_bytes": 512})
    assert not aggregates(made.graphs[0])


def test_a_rule_for_the_layer_holds():
    rules = {"convs.1": keep()}
    made = actcompile.explain(
        gnn(layers=3), *graph(nodes=256, edges=1024), options={**FAST, "min_bytes": 512, "rules": rules}
    )
    assert set(aggregates(made.graphs[0])) == {"div_2"}


class StraightThrough(torch.autograd.Function):
    """Takes rows in forward; its backward is not the transpose of that."""

    @staticmethod
    def forward(ctx, x, index):
        return x[index]

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def straight(h, root, weight, index):
    x = h.sigmoid()
    return x @ root + StraightThrough.apply(x, index) @ weight


def both(h, root, weight, index):
    """The aggregate is read by another op, too."""
    x = h.sigmoid()
    aggregate = x[index]
    return x @ root + aggregate @ weight + (aggregate * aggregate).sum(1, keepdim=True)


def returned(h, root, weight, index):
    x = h.sigmoid()
    aggregate = x[index]
    return x @ root + aggregate @ weight, aggregate


def other_index(h, root, weight, index):
    """Two maps: neither's transpose is the other's."""
    x = h.sigmoid()
    return x @ root + (x[index] @ weight)[index.flip(0)]


def some_columns(h, root, weight, index):
    """A gather whose index is narrower than what it indexes: it leaves columns out."""
    x = h.sigmoid()
    return x @ root + x.gather(0, index[:, None].expand(-1, 4)) @ weight[:4]


def one_column(h, root, weight, index):
    x = h.sigmoid()
    return x @ root, x.gather(0, index[:, None]) @ weight[:1, :1]


def one_row(h, root, weight, index):
    """One row, added at several places."""
    x = h.sigmoid()
    return x @ root + torch.zeros_like(x).index_put((index[:9],), x[:1], accumulate=True) @ weight


@pytest.mark.parametrize(
    "function",
    [straight, both, returned, other_index, some_columns, one_column, one_row],
    ids=lambda f: f.__name__,
)
def test_what_else_is_done_stays_right(function):
    parameters, _, _ = problem(4)
    index = torch.randperm(ROWS)
    ours, made = commuted(lambda *p: function(*p, index), parameters, parameters)
    torch._dynamo.reset()
    assert_close(ours, step(lambda *p: function(*p, index), parameters, parameters), 1e-13)
    assert len(made) == (function is other_index)  # there the inner map alone is moved


def test_the_mean_gradient_is_exact():
    """False alarm: |z| of 1,024 elements passes 5.5 with 4e-5."""
    torch.manual_seed(0)
    x, w, v, u = torch.randn(64, 16), torch.randn(16, 32), torch.randn(32, 8), torch.randn(32, 8)
    parameters = [t.requires_grad_() for t in (w, v, u)]
    index = torch.randint(0, 64, (2, 256))

    def function(x, w, v, u):
        h = (x @ w).relu()
        aggregate = torch.zeros_like(h).index_add(0, index[1], h[index[0]])
        return h @ v + aggregate @ u

    made = actcompile.explain(function, x, *parameters, options={**SAVED, "bits": 2}).graphs[0]
    assert aggregates(made)
    torch._dynamo.reset()
    ours = torch.compile(function, backend="actcompile", options={**SAVED, "bits": 2})
    draws = [step(ours, [x, *parameters], parameters, seed) for seed in range(200)]
    exact = step(function, [x, *parameters], parameters)
    for i in (-2, -1):
        drawn = torch.stack([d[i] for d in draws]).double()
        z = (drawn.mean(0) - exact[i]) / (drawn.std(0) / len(draws) ** 0.5)
        assert drawn.std(0).min() > 0 and z.abs().max() < 5.5
    assert_close([d[-3] for d in draws[:1]], [exact[-3]], 1e-5)  # the first weights' gradient sees no rounded value
