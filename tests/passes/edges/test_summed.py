"""What linear maps make of the same rows, and what is then added, is made by one map."""

import pytest
import torch
from torch import nn

from actcompile import compress, explain
from tests.helpers import EXACT, graph, step


class Gate(nn.Module):
    """Two products of an edge's features and three rows of nodes, two of them at the same end, in one gate."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.nodes = nn.ModuleList(nn.Linear(16, 32) for _ in range(4))
        self.edges = nn.ModuleList(nn.Linear(4, 32, bias=bias) for _ in range(2))

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        source, target = edge_index
        a, b, c, d = (layer(x) for layer in self.nodes)
        first = a.cos()[source] + self.edges[0](features)
        second = b.sin()[source] + c.cos()[target] + self.edges[1](features)
        return x.new_zeros(len(x), 32).index_add(0, target, torch.sigmoid(first + second) * d.sin()[source])


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_added_is_one_map(bias):
    torch.manual_seed(0)
    model = Gate(bias).double()
    x, edge_index = graph(50, 400)
    inputs = x.double().requires_grad_(), edge_index, torch.randn(400, 4).double().requires_grad_()
    wanted = [*inputs[::2], *model.parameters()]
    expected = step(model, inputs, wanted)
    compress(model, **EXACT)
    for ours, theirs in zip(step(model, inputs, wanted), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    (made,) = explain(model).graphs
    (forward,) = (n for n in made.forward_nodes if n.op.startswith("actcompile.edges"))
    assert len(forward.inputs) == 6 + bias  # edges, their features, one matrix for them, three rows of nodes, one bias
