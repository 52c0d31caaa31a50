"""Fused message passing on CUDA: the gradients of eager, and regions where there would be messages."""

import pytest
import torch

import actcompile.backend  # noqa: F401
from tests.helpers import step
from tests.passes.edges.layers import build, graph
from tests.passes.edges.test_edges import assert_same, called, compiled, graphs, ops  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

FUSED = ("SAGE max", "GAT", "GATv2", "own relu", "own gate", "two max")
SUMS = ("GCN weighted", "two SAGE")


def on_gpu(name, kind, dtype):
    model, takes = build(name, dtype)
    inputs = [t.detach().cuda().requires_grad_(t.requires_grad) for t in graph(kind, dtype=dtype, takes=takes)]
    model.cuda()
    return model, inputs, [*model.parameters(), *(t for t in inputs if t.requires_grad)]


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "ties") for name in (*FUSED, *SUMS)), ("SAGE max", "no edges"), ("GAT", "isolated")]
)
def test_gradients_are_those_of_eager(name, kind, graphs):  # noqa: F811
    model, inputs, wanted = on_gpu(name, kind, torch.float64)
    assert_same(step(compiled(model), inputs, wanted), step(model, inputs, wanted))
    assert called(graphs, ops.edges.default if name in FUSED else ops.aggregate.default)


@pytest.mark.parametrize("name", ["SAGE mean", "SAGE max", "GAT without self-loops", "own relu"])
def test_in_bfloat16(name):
    model, inputs, wanted = on_gpu(name, "random", torch.float32)

    def under_autocast(*args):
        with torch.autocast("cuda", torch.bfloat16):
            return model(*args).float()

    exact = step(model, inputs, wanted)
    for ours, eager, c in zip(
        step(compiled(under_autocast), inputs, wanted), step(under_autocast, inputs, wanted), exact, strict=True
    ):
        assert (ours - c).norm() < 3 * ((eager - c).norm() + 0.02 * c.norm() + 1e-3)


@pytest.mark.parametrize("name", ["two max", "two GAT"])
def test_through_inductor(name):
    model, inputs, wanted = on_gpu(name, "random", torch.float32)
    assert_same(step(compiled(model, inner="inductor"), inputs, wanted), step(model, inputs, wanted), within=1e-4)


def test_edges_that_change_in_place_are_grouped_anew():
    model, (x, edge_index), wanted = on_gpu("SAGE max", "random", torch.float64)
    function = compiled(model)
    for seed in range(3):
        edge_index.copy_(graph(seed=seed)[1])
        assert_same(step(function, (x, edge_index), wanted), step(model, (x, edge_index), wanted))


def test_a_cuda_graph_does_not_keep_the_edges_that_it_was_made_with():
    model, (x, edge_index), wanted = on_gpu("SAGE max", "random", torch.float32)
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        function = compiled(model, inner="inductor")
        for seed in range(5):
            edge_index = graph(seed=seed)[1].cuda()
            ours = [g.clone() for g in step(function, (x, edge_index), wanted)]
            assert_same(ours, step(model, (x, edge_index), wanted), within=1e-4)
