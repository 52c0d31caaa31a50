"""Sizes that change from batch to batch, and sizes that depend on data."""

import copy
import logging

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.nn import GATConv, Sequential
from torch_geometric.utils import add_self_loops, dropout_edge, remove_self_loops

from actcompile import api, compress, explain
from actcompile.passes.graph.split import is_size
from bench.sampling import neighbor_loader
from tests.helpers import (
    EXACT,
    FAST,
    assert_close,
    assert_equal,
    every_pass,
    gnn,
    graph,
    held_bytes,
    quickly,
    step,
    uncompressed,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def compilations(monkeypatch):
    """The graphs that the backend was given."""
    graphs, compile_graph = [], api.compile_graph

    def counted(gm, *arguments):
        graphs.append(gm)
        return compile_graph(gm, *arguments)

    monkeypatch.setattr(api, "compile_graph", counted)
    return graphs


@pytest.fixture
def guards(caplog):
    """Which guards made Dynamo compile again."""
    torch._logging.set_logs(recompiles_verbose=True)
    logger = logging.getLogger("torch._dynamo.guards.__recompiles_verbose")
    logger.addHandler(caplog.handler)
    yield lambda: "\n".join(record.getMessage() for record in caplog.records)
    logger.removeHandler(caplog.handler)
    torch._logging.set_logs()


def batches(number: int):
    """Mini-batches as a NeighborLoader gives them: every one has other numbers of nodes and edges."""
    x, edges = graph(nodes=400, edges=2400)
    loader = neighbor_loader(Data(x=x, edge_index=edges), [5, 3], batch_size=20, shuffle=True)
    made = [(batch.x, batch.edge_index) for batch, _ in zip(loader, range(number), strict=False)]
    assert len({(x.shape, edges.shape) for x, edges in made}) > number // 2
    return made


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("options", [FAST, EXACT], ids=["rounded", "exact"])
def test_twenty_batches_compile_at_most_twice(options, dynamic, compilations, guards):
    model = compress(gnn(dropout=0.0), dynamic=dynamic, **options)
    reference = copy.deepcopy(model)
    plain = uncompressed(reference, dynamic=dynamic)
    for inputs in batches(20):
        ours = step(model, inputs, model.parameters())
        theirs = step(plain, inputs, reference.parameters())
        if options is EXACT:
            assert_equal(ours, theirs)
        else:
            torch.testing.assert_close(ours[0], theirs[0])
            assert all(torch.isfinite(g).all() for g in ours[1:])
    assert len(compilations) <= 2, guards()
    last = explain(model).graphs[-1]
    assert any(not s.isdigit() for row in last.rows for s in row.shape)
    assert options is EXACT or any(row.codec.startswith("quantize") for row in last.rows)


def gat_with_heads():
    torch.manual_seed(0)
    return Sequential("x, e", [(GATConv(16, 8, heads=4), "x, e -> x"), torch.nn.ELU(), (GATConv(32, 4), "x, e -> x")])


class Loops(torch.nn.Module):
    """A layer of the user's own: an edge list with self-loops, made anew, and a mean over it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(16, 32), torch.nn.Linear(32, 4)

    def aggregate(self, x, e):
        e, _ = add_self_loops(remove_self_loops(e)[0], num_nodes=x.shape[0])
        count = x.new_zeros(x.shape[0]).index_add(0, e[1], x.new_ones(e.shape[1]))
        return torch.zeros_like(x).index_add(0, e[1], x[e[0]]) / count[:, None]

    def forward(self, x, e):
        return self.last(self.aggregate(self.aggregate(self.first(x), e).relu(), e))


SELF_LOOPS = {"gcn": lambda: gnn("gcn", dropout=0.0), "gat": gat_with_heads, "own": Loops}


def with_loops(edges, number):
    """The same number of edges, the first of them loops at a node."""
    edges = edges.clone()
    edges[1, :number] = edges[0, :number]
    return edges


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "dynamic"), quickly([(n, d) for n in SELF_LOOPS for d in (None, True)], [("gcn", None), ("gat", True)])
)
def test_self_loops_in_the_model_are_one_graph_for_any_number_of_loops(name, dynamic):
    model, (x, edges) = SELF_LOOPS[name](), graph()
    plain = copy.deepcopy(model)
    compress(model, dynamic=dynamic, **EXACT)
    for loops in (2, 50, 255, 256):  # all but one, and all: the mask selects one edge, and none
        inputs = x, with_loops(edges, loops)
        for ours, exact in zip(*(step(m, inputs, m.parameters()) for m in (model, plain)), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    assert len(explain(model).graphs) == 1
    (made,) = explain(model).graphs
    assert made.bytes_after < made.bytes_before
    assert not any("depends on data" in row.reason for row in made.rows)
    assert not any("integers" in row.reason for row in made.rows)  # backward groups edges again, for a size it knows


@pytest.mark.parametrize("name", quickly(SELF_LOOPS, ["gcn"]))
def test_all_layers_are_compressed_with_self_loops_in_the_model(name):
    model, inputs = SELF_LOOPS[name](), graph(nodes=400, edges=2000)
    before = held_bytes(uncompressed(copy.deepcopy(model))(*inputs), [*inputs, *model.parameters()])
    torch._dynamo.reset()
    after = held_bytes(compress(model, **FAST)(*inputs), [*inputs, *model.parameters()])
    assert after < before / 4
    assert not any("depends on data" in row.reason for row in explain(model).graphs[0].rows)


@pytest.mark.parametrize("name", quickly(SELF_LOOPS, ["gcn"]))
def test_twenty_batches_with_self_loops_compile_at_most_twice(name, compilations, guards):
    model = compress(SELF_LOOPS[name](), **FAST)
    for inputs in batches(20):
        assert all(torch.isfinite(t).all() for t in step(model, inputs, model.parameters()))
    assert len(compilations) <= 2, guards()


@pytest.mark.parametrize("name", quickly(SELF_LOOPS, ["gcn"]))
def test_the_report_is_what_the_last_run_held(name):
    model, (x, edges) = compress(SELF_LOOPS[name](), dynamic=True, **FAST), graph(nodes=400, edges=2000)
    for nodes, edges_, loops in ((400, 2000, 10), (400, 2000, 1000), (300, 1500, 1400)):
        inputs = x[:nodes].clone(), with_loops(edges[:, :edges_] % nodes, loops)
        held = held_bytes(model(*inputs), [*inputs, *model.parameters()])
        report = explain(model)
        assert abs(report.saved_bytes_after - held) <= 0.02 * held + 64 * len(report.graphs[0].rows)
        assert not report.graphs[0].bounds


def test_without_a_run_sizes_that_depend_on_data_are_bounded():
    model, inputs = gnn("gcn"), graph(nodes=64, edges=256)
    (made,) = explain(model, *inputs, options=FAST).graphs
    assert made.bounds
    assert all(made.sizes[name] == 256 for name in made.bounds)
    assert f"{made.bounds[0]} at most 256" in str(explain(model, *inputs, options=FAST))


def test_edges_dropped_in_every_layer_have_sizes_of_their_own():
    class Dropping(Loops):
        def aggregate(self, x, e):
            return super().aggregate(x, dropout_edge(e, 0.5, training=True)[0])

    model, inputs = Dropping(), graph()
    plain = copy.deepcopy(model)
    compress(model, **EXACT, fast_dropout=False)  # eager draws torch's own numbers
    ours = step(model, inputs, model.parameters())
    assert_close(ours, step(plain, inputs, plain.parameters()), within=1e-5)
    (made,) = explain(model).graphs
    assert len(made.sizes) == 2


def test_no_pass_guards_on_a_size():
    seen = []

    def transform(split):
        sizes = [n.meta["val"] for _, n in split.pairs if is_size(n)]
        env = sizes[0].node.shape_env
        before = len(env.guards), len(env.deferred_runtime_asserts), dict(env.replacements)
        seen.append(any(str(c.codec).startswith("quantize") for c in every_pass(split, **FAST).choices))
        assert (len(env.guards), len(env.deferred_runtime_asserts), dict(env.replacements)) == before

    uncompressed(gnn(), transform, dynamic=True)(*graph())
    assert seen == [True]
