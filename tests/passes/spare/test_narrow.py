"""Forward aggregates what weights made of the nodes, where that is narrower and nothing else needs the aggregate."""

import pytest
import torch
from torch_geometric import nn as pyg

from actcompile import compress, explain
from tests.helpers import FAST, assert_close, graph, step, uncompressed


class Stack(torch.nn.Module):
    def __init__(self, last, width=4):
        super().__init__()
        self.first, self.last = pyg.SAGEConv(16, 32), last(32, width)

    def forward(self, x, edges):
        return self.last(self.first(x, edges).tanh(), edges)


LAYERS = {
    "mean": lambda i, o: pyg.SAGEConv(i, o),
    "sum, no bias": lambda i, o: pyg.SAGEConv(i, o, aggr="sum", bias=False),
}


def aggregated(model):
    """The widths of what forward aggregates."""
    (made,) = explain(model).graphs
    return sorted(int(n.shape.split("x")[1]) for n in made.forward_nodes if n.op.startswith("actcompile.aggregate"))


@pytest.mark.parametrize("name", LAYERS)
def test_a_narrow_layer_aggregates_behind_its_product(name):
    model, inputs = Stack(LAYERS[name]), graph()
    reference = step(uncompressed(model), inputs, model.parameters())
    compress(model, **FAST, bits=8)
    ours = step(model, inputs, model.parameters())
    assert_close(ours[:1], reference[:1], within=1e-5)
    assert_close(ours, reference, within=0.05)
    assert aggregated(model) == [4, 16]


def test_a_wide_layer_and_an_aggregate_that_is_saved_stay():
    for model, options in ((Stack(LAYERS["mean"], 64), {}), (Stack(LAYERS["mean"]), {"rebuild": False})):
        torch._dynamo.reset()
        compress(model, **FAST, **options)
        step(model, graph(), model.parameters())
        assert aggregated(model) == [16, 32]
