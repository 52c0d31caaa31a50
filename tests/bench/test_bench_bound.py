"""The least that a step can take counts its products, and the rows that it sums up over edges."""

import torch
from torch import nn
from torch_geometric.nn import SAGEConv

from bench.bound import bound
from tests.helpers import graph


def test_products_and_rows_are_counted():
    x, edge_index = graph(30, 200, 16)
    first, second = SAGEConv(16, 8, aggr="sum"), nn.Linear(8, 4)
    found = bound(lambda: second(first(x, edge_index)).sum().backward())
    layer, last = 2 * 30 * 16 * 8, 2 * 30 * 8 * 4
    assert found["flops"] == 2 * 2 * layer + 3 * last  # weights' gradients, and for the last one its input's, too
    assert found["row_bytes"] == 200 * 16 * 4  # forward: the input needs no gradient
    x.requires_grad_()
    assert bound(lambda: first(x, edge_index).sum().backward())["row_bytes"] == 2 * 200 * 16 * 4
    assert found["seconds"] > 0


def test_a_step_that_multiplies_nothing():
    x = torch.randn(5, requires_grad=True)
    assert bound(lambda: x.sum().backward()) == {"flops": 0, "row_bytes": 0, "seconds": 0}
