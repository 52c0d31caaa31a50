"""Degrees are read from how edges are grouped, where they are: no row of ones for each edge, and eager's numbers."""

import pytest
import torch
from torch import nn

from tests.passes.edges.layers import graph
from tests.passes.edges.test_edges import called, check, graphs  # noqa: F401  a fixture

# ruff: noqa: F811  the fixture

ops, aten = torch.ops.actcompile, torch.ops.aten


class Degrees(nn.Module):
    """Sums over neighbours, divided by degrees that are counted as floats or integers, in rows of no or one column."""

    def __init__(self, dtype=torch.float64, number=1, dims=1, row=1, loops=False):
        super().__init__()
        self.dtype, self.number, self.dims, self.row, self.loops = dtype, number, dims, row, loops

    def forward(self, x, edge_index):
        if self.loops:
            edge_index = torch.cat([edge_index, torch.arange(x.shape[0]).expand(2, -1)], 1)
        source, target = edge_index
        by = edge_index[self.row]
        same = torch.full(by.shape, self.number, dtype=self.dtype)
        start = torch.zeros(x.shape[0], dtype=self.dtype)
        if self.dims == 2:
            by, same, start = by.unsqueeze(1), same.unsqueeze(1), start.unsqueeze(1)
        degrees = start.scatter_add(0, by, same).view(-1, 1)
        sums = torch.zeros_like(x).index_add(0, target, x[source].sin())
        return sums * degrees / (1 + degrees) + degrees


@pytest.mark.parametrize("edges", [90, 0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"number": 3},
        {"dtype": torch.long},
        {"dtype": torch.long, "number": 2, "dims": 2},
        {"row": 0},
    ],
    ids=str,
)
def test_degrees_are_read_from_how_edges_are_grouped(options, edges, graphs):
    model = Degrees(**options)
    check(model, graph(edges=edges))
    assert called(graphs, ops.degree.default)
    assert not called(graphs, aten.scatter_add.default, aten.index_add.default)


def test_degrees_of_edges_that_the_model_makes_are_counted_as_they_were(graphs):
    check(Degrees(loops=True), graph())
    assert not called(graphs, ops.degree.default)


def test_what_is_not_grouped_is_counted_as_it_was(graphs):
    def function(x, edge_index):
        return x * torch.zeros(x.shape[0], dtype=x.dtype).index_add(0, edge_index[0], x.new_ones(90)).view(-1, 1)

    class Only(nn.Module):
        forward = staticmethod(function)

    check(Only(), graph(edges=90))
    assert not called(graphs, ops.degree.default)


def test_degrees_of_negative_indices_and_of_nodes_that_are_out_of_range():
    by = torch.tensor([[0, -1, 2, 2], [0, 1, 2, 3]])
    assert ops.degree(by, 0, 4, []).tolist() == [1, 0, 2, 1]
    assert ops.degree(by[0].int(), -1, 4, list(ops.group_edges(by, 0, 4))).tolist() == [1, 0, 2, 1]
    with pytest.raises(IndexError, match="out of range"):
        ops.degree(by, 1, 3, [])
