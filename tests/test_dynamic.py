"""Sizes that change from batch to batch, and sizes that depend on data."""

import copy
import logging

import pytest
import torch
from torch._dynamo import config as dynamo_config
from torch_geometric.data import Data

from actcompile import api, compress, explain
from actcompile.passes.split import is_size
from bench.sampling import neighbor_loader
from tests.helpers import EXACT, FAST, assert_equal, every_pass, gnn, graph, step, uncompressed

CAPTURE = {"capture_dynamic_output_shape_ops": True}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def compilations(monkeypatch):
    """The graphs that the backend was given."""
    graphs, compile_graph = [], api.compile_graph

    def counted(gm, inputs, config):
        graphs.append(gm)
        return compile_graph(gm, inputs, config)

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


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "dynamic"), [("gcn", True), ("gat", None)])
def test_self_loops_in_the_model_with_unbacked_sizes(name, dynamic, compilations):
    with dynamo_config.patch(**CAPTURE):
        model, inputs = gnn(name), graph()
        plain = copy.deepcopy(model)
        compress(model, dynamic=dynamic, **EXACT)
        ours = step(model, inputs, model.parameters())
        assert_equal(ours, step(uncompressed(plain, dynamic=dynamic), inputs, plain.parameters()))
        (made,) = explain(model).graphs
        assert made.bytes_after < made.bytes_before
        assert any("u0" in size for row in made.rows for size in row.shape)
        before = len(compilations)
        edges = inputs[1].clone()
        edges[1, :50] = edges[0, :50]  # more loops to replace: another number of edges, the same graph
        ours = step(model, (inputs[0], edges), model.parameters())
        assert len(compilations) == before
        assert_equal(ours, step(uncompressed(plain, dynamic=dynamic), (inputs[0], edges), plain.parameters()))


def test_self_loops_in_the_model_by_default(compilations):
    model, inputs = gnn("gcn"), graph()
    plain = copy.deepcopy(model)
    reference = step(uncompressed(plain), inputs, plain.parameters())
    torch._dynamo.reset()
    ours = step(compress(model, **EXACT), inputs, model.parameters())
    assert_equal(ours, reference)
    made = explain(model)
    assert len(made.graphs) > 1
    assert made.saved_bytes_after < made.saved_bytes_before


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
