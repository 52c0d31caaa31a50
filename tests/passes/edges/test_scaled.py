"""Rows beside multiples of themselves are multiplied with weights once: nothing as wide is made; eager's gradients."""

import pytest
import torch
from torch import nn
from torch_geometric import nn as pyg

from tests.passes.edges.layers import IN, graph
from tests.passes.edges.test_edges import check, graphs  # noqa: F401  a fixture

# ruff: noqa: F811  the fixture

DEGREES = torch.tensor([1, 3, 5, 2])
SCALERS = ["identity", "amplification", "attenuation"]


class Beside(nn.Module):
    """A sum over neighbours, as it is and scaled by what `scales` make of degrees, times weights for each tower.

    order: of the node's own rows (0), the sums (1), and the sums with scales (2, 3), side by side.
    """

    def __init__(self, order, towers=1, width=2, learned=False):
        super().__init__()
        self.order = order
        self.weights = nn.ModuleList(nn.Linear(len(order) * IN, width) for _ in range(towers))
        self.by = nn.Parameter(torch.tensor(0.7)) if learned else 0.7

    def forward(self, x, edge_index):
        towers = len(self.weights)
        source, target = edge_index
        by_degree = torch.zeros(x.shape[0], dtype=x.dtype).index_add(0, target, torch.ones_like(target, dtype=x.dtype))
        s, t = by_degree.add(1).log() * self.by, self.by / (by_degree + 2)
        x = x.unsqueeze(1) * torch.arange(1, towers + 1, dtype=x.dtype).view(-1, 1)
        sums = torch.zeros_like(x).index_add(0, target, x[source].sigmoid())
        parts = [x, sums, sums * s.view(-1, 1, 1), t.view(-1, 1, 1) * sums]
        both = torch.cat([parts[i] for i in self.order], -1)
        return torch.cat([linear(both[:, i]) for i, linear in enumerate(self.weights)], -1).tanh()


def widest(graphs):
    """The most columns of a value with a row for each node."""
    values = [n.meta.get("val") for both in graphs for g in both for n in g.nodes if n.op == "call_function"]
    rows = [v.shape for v in values if isinstance(v, torch.Tensor) and v.dim() > 1 and v.shape[0] == 23]
    return max(shape[1:].numel() for shape in rows)


@pytest.mark.parametrize(("order", "towers"), [((0, 1, 2, 3), 1), ((2, 3), 1), ((3, 0, 2, 1), 2)], ids=str)
def test_what_is_scaled_is_as_narrow_as_the_result(order, towers, graphs):
    torch.manual_seed(0)
    check(Beside(order, towers).double(), graph(nodes=23))
    assert widest(graphs) <= towers * max(IN, 2 * len(order))


@pytest.mark.parametrize("width", [2, 4 * IN])
def test_scales_that_are_learned_have_eagers_gradients(width):
    torch.manual_seed(0)
    check(Beside((0, 1, 2, 3), width=width, learned=True).double(), graph(nodes=23))


def test_products_that_are_wider_than_what_is_scaled_stay(graphs):
    torch.manual_seed(0)
    check(Beside((0, 1, 2, 3), width=4 * IN).double(), graph(nodes=23))
    assert widest(graphs) == 4 * IN


@pytest.mark.parametrize("towers", [1, 2])
def test_scalers_of_pna(towers, graphs):
    torch.manual_seed(0)
    layer = pyg.PNAConv(IN, 4, ["mean", "max", "std"], SCALERS, DEGREES, towers=towers, divide_input=False)
    check(layer.double(), graph(nodes=23))
    assert widest(graphs) <= towers * 3 * IN
