"""Sparse adjacencies as inputs: they train as in eager, in one graph, and what is saved is compressed."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.nn import (
    ClusterGCNConv,
    EGConv,
    GATConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    GraphConv,
    HeteroConv,
    SAGEConv,
    TransformerConv,
)
from torch_geometric.utils import to_torch_csr_tensor

import actcompile
from actcompile import api, compress, edges_of, explain, traceable
from tests.helpers import EXACT, FAST, SAVED, assert_equal, leaves, step

LAYOUTS = {"csr": torch.sparse_csr, "coo": torch.sparse_coo}
LAYERS = {
    "SAGE": SAGEConv,
    "SAGE, sum": lambda i, o: SAGEConv(i, o, aggr="sum"),
    "SAGE, max": lambda i, o: SAGEConv(i, o, aggr="max"),
    "SAGE, min": lambda i, o: SAGEConv(i, o, aggr="min"),
    "GCN": GCNConv,
    "GCN, no self-loops": lambda i, o: GCNConv(i, o, add_self_loops=False),
    "GCN, not normalised": lambda i, o: GCNConv(i, o, normalize=False),
    "GAT": lambda i, o: GATConv(i, o // 2, heads=2),
    "GAT, filled": lambda i, o: GATv2Conv(i, o, fill_value="mean"),
    "GIN": lambda i, o: GINConv(nn.Linear(i, o), train_eps=True),
    "GraphConv": GraphConv,
    "Transformer": TransformerConv,
    "EGConv": lambda i, o: EGConv(i, o, num_heads=2, aggregators=["sum", "max", "symnorm"]),
}
ROWS = 40
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.*(beta state|invariant|Converting sparse|Lazy modules).*"),
]


@pytest.fixture
def compilations(monkeypatch):
    """The graphs that the backend was given."""
    graphs, compile_graph = [], api.compile_graph

    def counted(gm, *arguments):
        graphs.append(gm)
        return compile_graph(gm, *arguments)

    monkeypatch.setattr(api, "compile_graph", counted)
    return graphs


class Two(nn.Module):
    def __init__(self, layer, dtype=torch.float64):
        super().__init__()
        self.first, self.norm, self.last = layer(8, 16), nn.BatchNorm1d(16), layer(16, 4)
        self.to(dtype)

    def forward(self, x, adjacency):
        return self.last(self.norm(self.first(x, adjacency)).relu(), adjacency)


class Multiply(nn.Module):
    """A layer by hand: what it does with the adjacency and the transformed rows is given."""

    def __init__(self, product):
        super().__init__()
        self.linear, self.product = nn.Linear(8, 4).double(), product

    def forward(self, x, adjacency):
        return self.product(adjacency, self.linear(x)).square()


def adjacency(layout=torch.sparse_csr, rows=ROWS, columns=None, entries=200, loops=True, weights=None, dtype=None):
    """A random adjacency; with `weights`, of as many elements as it has entries, their gradient goes there."""
    columns = columns or rows
    where = torch.rand(rows, columns) < entries / rows / columns
    where[-1] = False  # a node without neighbours
    if not loops:
        where.fill_diagonal_(False)
    else:
        where[:3, :3] = True
    index = where.nonzero().t()
    value = torch.rand(index.shape[1], dtype=dtype or torch.float64) if weights is None else weights(index.shape[1])
    made = torch.sparse_coo_tensor(index, value, (rows, columns), is_coalesced=weights is None or None)
    made = made.coalesce()
    return made if layout == torch.sparse_coo else made.to_sparse(layout=layout)


def features(rows=ROWS, dtype=torch.float64):
    return torch.randn(rows, 8, dtype=dtype)


def assert_close(ours, reference, within):
    """Equal up to `within` of all of them together: a gradient that is zero but for rounding has no scale."""
    scale = torch.cat([t.flatten() for t in reference if t is not None]).abs().max()
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert (a is None) == (b is None), f"number {i}: {a} and {b}"
        if a is not None:
            error = float((a - b).abs().max() / scale)
            assert error < within, f"number {i} is {error} away"


def dense(value):
    return value if value.layout == torch.strided else value.to_dense()


@pytest.mark.parametrize(
    ("layer", "layout", "loops"),
    [
        *((layer, "csr", False) for layer in LAYERS),
        *((layer, "coo", False) for layer in ("SAGE", "GCN, no self-loops", "Transformer")),
        *((layer, layout, True) for layer in ("GCN", "GAT, filled") for layout in LAYOUTS),
    ],
)
def test_trains_as_in_eager_in_one_graph(layer, layout, loops):
    model, x, adj = Two(LAYERS[layer]), features(), adjacency(LAYOUTS[layout], loops=loops)
    expected = step(model, [x, adj], model.parameters())
    compress(model, **EXACT)
    assert_close(step(model, [x, adj], model.parameters()), expected, within=1e-10)
    assert len(explain(model).graphs) == 1


@pytest.mark.parametrize("layer", ["SAGE", "SAGE, max", "GCN", "GAT"])
def test_gradients_reach_the_adjacency_s_values(layer):
    kept = []

    def weights(number):
        kept.append(torch.rand(number, dtype=torch.float64, requires_grad=True))
        return kept[-1]

    model, x, adj = Two(LAYERS[layer]), features(), adjacency(weights=weights)
    wanted = [*model.parameters(), *kept]

    def gradients():
        out = model(x, adj)
        return torch.autograd.grad(out.square().sum(), wanted, retain_graph=True, allow_unused=True)

    expected = gradients()
    compress(model, **EXACT)
    assert_close(list(gradients()), list(expected), within=1e-10)
    assert (expected[-1] is None) == (layer == "GAT")  # it does not look at the values
    assert len(explain(model).graphs) == 1


@pytest.mark.parametrize("layer", ["SAGE", "GCN"])
def test_rounded_gradients_are_within_noise(layer):
    x, adj = features(512, torch.float32), adjacency(rows=512, entries=3000, dtype=torch.float32)
    model = Two(LAYERS[layer], torch.float32)
    expected = step(model, [x, adj], model.parameters())[1:]
    compress(model, **SAVED)
    draws = [step(model, [x, adj], model.parameters(), seed)[1:] for seed in range(16)]
    total = torch.cat([g.flatten() for g in expected]).norm()
    mean = [torch.stack(g).mean(0) for g in zip(*draws, strict=True)]
    off = torch.cat([(a - b).flatten() for a, b in zip(mean, expected, strict=True)]).norm() / total
    one = torch.cat([(a - b).flatten() for a, b in zip(draws[0], expected, strict=True)]).norm() / total
    assert 0 < one < 0.5
    assert off < one / 2  # noise falls with the root of 16; a bias would stay


def test_bipartite_and_hetero():
    square, wide = adjacency(), adjacency(torch.sparse_coo, rows=30, columns=ROWS)

    class Hetero(nn.Module):
        def __init__(self):
            super().__init__()
            convs = {("u", "to", "u"): SAGEConv(8, 4), ("u", "of", "v"): TransformerConv((8, 8), 4)}
            self.conv = HeteroConv(convs).double()

        def forward(self, x, adjacencies):
            return self.conv(x, adjacencies)

    inputs = {"u": features(), "v": features(30)}, {("u", "to", "u"): square, ("u", "of", "v"): wide}
    model = Hetero()
    expected = step(model, inputs, model.parameters())
    compress(model, **EXACT)
    assert_close(step(model, inputs, model.parameters()), expected, within=1e-10)
    assert len(explain(model).graphs) == 1


def test_inside_of_data():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two(SAGEConv)

        def forward(self, data):
            return self.two(data.x, data.adj_t)

    model, data = Model(), Data(x=features(), adj_t=adjacency())
    expected = step(model, [data], model.parameters())
    compress(model, **EXACT)
    assert_close(step(model, [data], model.parameters()), expected, within=1e-10)
    assert len(explain(model).graphs) == 1
    assert data.adj_t.layout == torch.sparse_csr


@pytest.mark.parametrize("layer", ["SAGE", "GCN", "GAT"])
def test_changing_batches_compile_twice(layer, compilations):
    model = LAYERS[layer](8, 4).double()
    reference = copy.deepcopy(model)
    compress(model, **EXACT)
    for batch in range(5):
        rows = ROWS + 3 * batch
        x, adj = features(rows), adjacency(rows=rows, entries=200 + 11 * batch, loops=False)
        expected = step(reference, [x, adj], reference.parameters())
        assert_close(step(model, [x, adj], model.parameters()), expected, within=1e-10)
    assert len(compilations) == 2


def test_a_changed_adjacency_is_seen():
    model, x, adj = GCNConv(8, 4).double(), features(), adjacency(loops=False)
    reference = copy.deepcopy(model)
    compress(model, **EXACT)
    for change in (
        lambda: None,
        lambda: adj.values().mul_(3),
        lambda: adj.col_indices()[:2].copy_(torch.tensor([0, 1])),
    ):
        change()
        expected = step(reference, [x, adj], reference.parameters())
        assert_close(step(model, [x, adj], model.parameters()), expected, within=1e-10)


def test_what_was_counted_dies_with_the_adjacency():
    from actcompile.adjacency.inputs import _counted

    model, adj = compress(GCNConv(8, 4).double(), **EXACT), adjacency()
    model(features(), adj)
    before = len(_counted)
    del adj
    assert len(_counted) == before - 1


def test_a_cached_adjacency_stays():
    model, x, adj = GCNConv(8, 4, cached=True).double(), features(), adjacency()
    reference = copy.deepcopy(model)
    compress(model, **EXACT)
    for _ in range(3):
        expected = step(reference, [x, adj], reference.parameters())
        assert_close(step(model, [x, adj], model.parameters()), expected, within=1e-10)


PRODUCTS = {
    "@": lambda a, h: a @ h,
    "sparse.mm": torch.sparse.mm,
    "spmm": torch.spmm,
    "mm": lambda a, h: a.mm(h),
    "vector": lambda a, h: a @ h[:, 0],
    "addmm": lambda a, h: torch.sparse.addmm(h, a, h),
    "sizes": lambda a, h: h.new_zeros(a.shape[0], 4) + (a @ h) / a._nnz(),
}


@pytest.mark.parametrize(
    ("product", "layout"),
    [*((p, torch.sparse_csr) for p in PRODUCTS), ("@", torch.sparse_coo), ("@", torch.sparse_csc)],
)
def test_products_by_hand(product, layout):
    model, x, adj = Multiply(PRODUCTS[product]), features(), adjacency(layout)
    expected = step(model, [x, adj], model.parameters())
    compress(model, **EXACT)
    assert_close(step(model, [x, adj], model.parameters()), expected, within=1e-10)
    assert len(explain(model).graphs) == 1


OUTSIDE = {
    "transpose": lambda a, h: a.t() @ h,
    "to_dense": lambda a, h: a.to_dense() @ h,
    "scaled": lambda a, h: (a * 2) @ h,
}


@pytest.mark.parametrize("product", OUTSIDE)
def test_what_is_not_traced_is_as_in_eager(product):
    model, x, adj = Multiply(OUTSIDE[product]), features(), adjacency()
    expected = step(model, [x, adj], model.parameters())
    compress(model, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(step(model, [x, adj], model.parameters()), expected, within=1e-10)


def test_says_once_what_is_not_traced(monkeypatch):
    monkeypatch.setattr("actcompile.adjacency.stand_in._said", set())
    model = compress(Multiply(lambda a, h: a.to_dense() @ h), **EXACT)
    with pytest.warns(UserWarning, match=r"Multiply: to_dense of a sparse adjacency is not traced.*edges_of"):
        model(features(), adjacency())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(features(), adjacency())


def test_one_that_is_not_coalesced_goes_in_as_it_is(monkeypatch):
    monkeypatch.setattr("actcompile.adjacency.stand_in._said", set())
    adj = torch.sparse_coo_tensor(torch.randint(0, ROWS, (2, 200)), torch.rand(200).double(), (ROWS, ROWS))
    model, x = Two(SAGEConv), features()
    expected = step(model, [x, adj], model.parameters())
    compress(model, **EXACT)
    with pytest.warns(UserWarning, match="not coalesced"):
        assert_close(step(model, [x, adj], model.parameters()), expected, within=1e-10)


@pytest.mark.parametrize("shape", [(ROWS - 1, 8), (ROWS + 1, 8)])
def test_wrong_sizes_raise_as_in_eager(shape):
    model = compress(Multiply(lambda a, h: a @ h), **EXACT)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(torch.randn(shape, dtype=torch.float64), adjacency())


def test_a_returned_adjacency_is_sparse():
    model = GATConv(8, 4, add_self_loops=False).double()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = model

        def forward(self, x, adj):
            return self.conv(x, adj, return_attention_weights=True)

    own, x, adj = Model(), features(), adjacency()
    expected, (wanted, _) = own(x, adj)
    out, (returned, _) = compress(own, **EXACT)(x, adj)
    assert returned.layout == torch.sparse_csr
    assert type(returned) is torch.Tensor
    torch.testing.assert_close(returned.values(), wanted.values())
    torch.testing.assert_close(out, expected)


def test_a_layer_with_an_adjacency_of_its_own_makes_several_graphs_and_is_right():
    model = ClusterGCNConv(8, 4, diag_lambda=0.5)
    x, adj = features(dtype=torch.float32), adjacency(dtype=torch.float32)
    expected = step(model, [x, adj], model.parameters())
    compress(model, **EXACT)
    assert_close(step(model, [x, adj], model.parameters()), expected, within=1e-5)


def test_aggregates_are_not_saved_where_the_gradient_can_be_aggregated():
    model = Two(SAGEConv, torch.float32)
    report = explain(model, features(dtype=torch.float32), adjacency(dtype=torch.float32), options=SAVED)
    assert any("aggregates the gradient instead" in a.reason for g in report.graphs for a in g.rows)


def test_explain_does_not_run_the_model():
    model = Two(GCNConv, torch.float32)
    x, adj = features(dtype=torch.float32), adjacency(dtype=torch.float32)
    report = explain(model, x, adj, options=FAST)
    assert len(report.graphs) == 1
    assert report.saved_bytes_after < report.saved_bytes_before / 3
    compress(model, **FAST)(x, adj)
    assert explain(model).saved_bytes_before == report.saved_bytes_before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_edges_of_is_what_layers_take(layout):
    model, x, adj = Two(GraphConv), features(), adjacency(LAYOUTS[layout], loops=False)
    index, weight = edges_of(adj)
    assert index.dtype == torch.int64
    expected = GraphConv(8, 4).double()
    torch.testing.assert_close(expected(x, adj), expected(x, index, weight))
    torch.testing.assert_close(dense(to_torch_csr_tensor(index.flip(0), weight, (ROWS, ROWS))), dense(adj))
    assert model(x, index).shape == (ROWS, 4)


def test_edges_of_hands_gradients_on_and_takes_what_is_not_coalesced():
    weight = torch.rand(200, dtype=torch.float64, requires_grad=True)
    adj = torch.sparse_coo_tensor(torch.randint(0, ROWS, (2, 200)), weight, (ROWS, ROWS))
    edges_of(adj)[1].sum().backward()
    assert torch.equal(weight.grad, torch.ones(200, dtype=torch.float64))


def test_the_backend_takes_what_traceable_makes(compilations):
    model, x, adj = Two(GCNConv), features(), adjacency()
    expected = step(model, [x, adj], model.parameters())
    compiled = torch.compile(model, backend="actcompile", options=EXACT)
    assert_close(step(compiled, [x, traceable(adj)], model.parameters()), expected, within=1e-10)
    assert len(compilations) == 1


def test_traceable_says_what_it_can_not_take():
    with pytest.raises(TypeError, match=r"adjacency must be a torch\.sparse tensor"):
        traceable(torch.eye(3))
    with pytest.raises(ValueError, match="not coalesced"):
        traceable(torch.sparse_coo_tensor(torch.zeros(2, 2, dtype=torch.long), torch.ones(2), (3, 3)))
    with pytest.raises(ValueError, match="no sparse matrix"):
        traceable(torch.ones(3).to_sparse())


def test_models_without_sparse_inputs_are_called_as_before():
    model, x = Two(SAGEConv), features()
    index = torch.randint(0, ROWS, (2, 200))
    compress(model, **EXACT)
    assert_equal([model(x, index)], [model(x, adjacency=index)])
    assert all(type(t) is torch.Tensor for t in leaves(model(x, index)))
    assert actcompile.explain(model).graphs


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["SAGE", "SAGE, max", "GCN", "GAT"])
def test_with_inductor(layer):
    model = Two(LAYERS[layer], torch.float32)
    reference = copy.deepcopy(model)
    compress(model, bits=None, nonlinear_bits=None, min_bytes=0)
    for batch in range(3):
        rows = ROWS + 3 * batch
        x, adj = features(rows, torch.float32), adjacency(rows=rows, dtype=torch.float32)
        expected = step(reference, [x, adj], reference.parameters())
        assert_close(step(model, [x, adj], model.parameters()), expected, within=1e-4)
    assert len(explain(model).graphs) == 2
