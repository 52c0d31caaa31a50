"""A mean's gradient is divided as it is summed up over edges, where it is needed behind that."""

import pytest
import torch
from torch import nn
from torch_geometric.nn import SAGEConv

from actcompile import compress, explain
from tests.helpers import graph

OPTIONS = {"inner": "aot_eager", "min_bytes": 0, "replay": 0}


class Linear(nn.Module):
    """Layers without an activation: the gradient of the input asks for nothing that is rounded."""

    def __init__(self, aggr: str) -> None:
        super().__init__()
        self.first, self.second = SAGEConv(128, 128, aggr=aggr), SAGEConv(128, 128, aggr=aggr)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x, edge_index), edge_index)


@pytest.mark.parametrize("aggr, scaled", [("mean", True), ("sum", False)])
def test_gradients_are_scaled_inside_of_sums(aggr, scaled):
    torch.manual_seed(0)
    model = Linear(aggr)
    x, edge_index = graph(20_000, 60_000, 128)  # so large that products are added up in place, behind the sums
    x.requires_grad_()
    (exact,) = torch.autograd.grad(model(x, edge_index).square().mean(), x)
    compress(model, **OPTIONS)
    (ours,) = torch.autograd.grad(model(x, edge_index).square().mean(), x)
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-8)
    (made,) = explain(model).graphs
    assert any(n.op.startswith("actcompile.edges") for n in made.backward_nodes) == scaled
