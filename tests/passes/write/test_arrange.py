"""Edges that a graph makes are arranged once for each direction, whatever the number of layers that go over them."""

import operator

import pytest
import torch
from torch import nn
from torch_geometric import nn as gnn
from torch_geometric.utils import add_self_loops

from actcompile.kernels.edges import ops as edges_ops
from actcompile.kernels.edges.ops import ARRANGED, aggregate, arrange_edges, edges, group_edges
from actcompile.kernels.edges.program import Operand, Output, Program, Step
from actcompile.passes.write.arrange import arrange
from tests.passes.edges.test_edges import called, check, graphs  # noqa: F401

ops = torch.ops.actcompile
NODES, EDGES, WIDTH = 23, 90, 5
PRODUCT = Program(
    (Operand("take", 0, "c", "float64"), Operand("take", 1, "c", "float64")),
    (Step("mul", ("o0", "o1"), "c"),),
    (Output("sum", "v0", "c", "float64"),),
).dump()


class Looped(nn.Module):
    """Layers over edges with self-loops that the model adds."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, edge_index):
        edge_index, _ = add_self_loops(edge_index, num_nodes=x.shape[0])
        for layer in self.layers:
            x = layer(x, edge_index).relu()
        return x


def inputs(negative=False):
    torch.manual_seed(0)
    edge_index = torch.randint(NODES, (2, EDGES))
    return torch.randn(NODES, WIDTH, dtype=torch.float64, requires_grad=True), edge_index - NODES * negative


@pytest.mark.parametrize("layers", [1, 3])
def test_once_for_each_direction(layers, graphs):  # noqa: F811
    model = Looped(*(gnn.SAGEConv(WIDTH, WIDTH) for _ in range(layers))).double()
    check(model, inputs())
    sums, shared = called(graphs, ops.aggregate.default, ops.edges.default), called(graphs, ops.arrange_edges.default)
    assert len(sums) == 2 * layers and len(shared) == (2 if layers > 1 else 0)


@pytest.mark.parametrize("make", [gnn.GCNConv, gnn.GATConv, gnn.GATv2Conv])
def test_self_loops_of_layers(make, graphs):  # noqa: F811
    model = Looped(*(make(WIDTH, WIDTH, add_self_loops=False) for _ in range(3))).double()
    check(model, inputs(), within=1e-9)
    assert called(graphs, ops.arrange_edges.default)


class Backwards(nn.Module):
    """Sums over edges and their reverses, of an index that counts from the end."""

    def forward(self, x, edge_index):
        ends = torch.cat([edge_index, edge_index.flip(0)], 1)
        for _ in range(2):
            x = torch.zeros_like(x).index_add(0, ends[1] % NODES, x[ends[0]])
        return x


def test_indices_that_count_from_the_end(graphs):  # noqa: F811
    check(Backwards(), inputs(negative=True))
    assert called(graphs, ops.arrange_edges.default)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("negative", [True, False])
def test_what_is_arranged_is_read_as_the_index_is(kernels, negative, monkeypatch):
    x, edge_index = inputs(negative)
    x = x.detach()
    if not kernels:
        monkeypatch.setattr(edges_ops, "kernel_for", lambda *_: None)
    by = edge_index[1] % NODES
    grouped = list(group_edges(by, -1, NODES))
    source = arrange_edges(edge_index, 0, NODES, grouped[1])
    assert source.dtype == torch.int32 and torch.equal(source.long(), (edge_index[0] % NODES)[grouped[1].long()])
    expected = aggregate(x, None, edge_index, 0, by, -1, NODES, grouped)
    assert torch.equal(aggregate(x, None, source, ARRANGED, by, -1, NODES, grouped), expected)
    expected = edges(PRODUCT, by, -1, NODES, 1, WIDTH, [edge_index, edge_index], [0, 1], [x, x], grouped)[0]
    ours = edges(PRODUCT, by, -1, NODES, 1, WIDTH, [source, edge_index], [ARRANGED, 1], [x, x], grouped)[0]
    assert torch.equal(ours, expected)


def test_an_index_out_of_range_is_an_error():
    _, edge_index = inputs()
    order = group_edges(edge_index, 1, NODES)[1]
    with pytest.raises(IndexError, match="out of range"):
        arrange_edges(edge_index, 0, int(edge_index[0].max()), order)


def test_op_is_registered_in_order():
    _, edge_index = inputs()
    order = group_edges(edge_index, 1, NODES)[1]
    torch.library.opcheck(arrange_edges.overload, (edge_index, 0, NODES, order))


def test_groupings_that_are_alike_become_one_unless_they_are_returned():
    graph = torch.fx.Graph()
    by, other = graph.placeholder("by"), graph.placeholder("other")
    made = [
        [graph.call_function(operator.getitem, (grouping, i)) for i in (0, 1)]
        for grouping in (graph.call_function(ops.group_edges.default, args) for args in
                         ((by, 0, NODES), (by, 0, NODES), (by, 1, NODES), (other, 0, NODES), (by, 0, NODES)))
    ]  # fmt: skip
    used = [graph.call_function(ops.degree.default, (starts,)) for starts, _ in made]
    graph.output((*used, made[4][1]))
    arrange(graph)
    assert [node.args[0] for node in used] == [made[i][0] for i in (0, 0, 2, 3, 4)]
    assert graph.output_node().args[0][-1] is made[4][1]
    graph.lint()
