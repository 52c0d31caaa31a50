"""Products of messages are made by node, or inside of regions: nothing of [edges, features], and eager's gradients."""

import pytest
import torch
from torch import nn
from torch_geometric import nn as pyg

from actcompile.kernels.edges.program import parse
from tests.helpers import EXACT, quickly, step
from tests.passes.edges.layers import EDGE, IN, WIDTH, MLPOf, Own, build, graph, mlp
from tests.passes.edges.test_edges import assert_same, called, check, compiled, graphs, wide  # noqa: F401  a fixture

# ruff: noqa: F811  the fixture

ops, aten = torch.ops.actcompile, torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default)


def by_edge(made, count):
    """Products with a row for each edge, or along edges."""
    return [
        node.name
        for node in called(made, *PRODUCTS)
        if count in (*node.meta["val"].shape, *node.args[-2].meta["val"].shape)
    ]


@pytest.mark.parametrize(
    "name",
    ["EdgeConv", "EdgeConv sum", "EdgeConv mean", "CGConv", "learned", "filtered", "decoder"],
)
def test_nothing_of_an_mlp_has_a_row_for_each_edge(name, graphs):
    model, takes = build(name)
    inputs = graph(takes=takes)
    check(model, inputs)
    count = inputs[1].shape[1]
    assert wide(graphs, count, EDGE) == []
    assert by_edge(graphs, count) == []
    graphs.clear()
    torch._dynamo.reset()
    step(compiled(model, fuse=False), inputs, model.parameters())
    assert wide(graphs, count, EDGE) and by_edge(graphs, count)  # it does tell


@pytest.mark.parametrize("edges", [90, 0])
@pytest.mark.parametrize("name", ["PNA 1 towers", "PNA 3 towers", "PNA divided"])
def test_towers_are_multiplied_by_node(name, edges, graphs):
    model, takes = build(name)
    inputs = graph(takes=takes, edges=edges)
    check(model, inputs)
    assert not edges or (wide(graphs, edges, 1) == [] and by_edge(graphs, edges) == [])


@pytest.mark.parametrize("order", [(0, -1), (-1, 0), (1, 0)], ids=str)
def test_towers_are_counted_from_either_end(order, graphs):
    torch.manual_seed(0)
    weights = [torch.randn(2 * IN, IN, dtype=torch.float64, requires_grad=True) for _ in order]

    def function(x, edge_index):
        x = x.view(-1, 1, IN).repeat(1, 2, 1) * torch.tensor([[1.0], [2.0]], dtype=x.dtype)
        both = torch.cat([x[edge_index[0]], x[edge_index[1]]], -1)
        towers = torch.stack([both[:, t] @ w for t, w in zip(order, weights, strict=True)], 1)
        return torch.zeros_like(x).index_add(0, edge_index[1], towers.relu())

    inputs = graph()
    expected = step(function, inputs, [inputs[0], *weights])
    assert_same(step(compiled(function), inputs, [inputs[0], *weights]), expected)
    assert wide(graphs, 90, 1) == []


class Shared(nn.Module):
    """Layers that read the same encoded edge features, the first of them with the other sign."""

    def __init__(self, layer, count=3, sign=-1):
        super().__init__()
        self.sign = sign
        self.nodes, self.edges = nn.Linear(IN, WIDTH), nn.Linear(EDGE, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(count))

    def forward(self, x, edge_index, edge_attr):
        x, e = self.nodes(x), self.edges(edge_attr)
        for i, layer in enumerate(self.layers):
            x = x + layer(x, edge_index, e if i or self.sign > 0 else -e).tanh()
        return x


SHARED = {
    "ResGated": lambda: pyg.ResGatedGraphConv(WIDTH, WIDTH, edge_dim=WIDTH),
    "GINE": lambda: pyg.GINEConv(mlp(WIDTH), edge_dim=WIDTH),
    "Transformer": lambda: pyg.TransformerConv(WIDTH, 4, heads=2, edge_dim=WIDTH),
    "CG": lambda: pyg.CGConv(WIDTH, WIDTH),
}


@pytest.mark.parametrize("edges", [90, 0])
@pytest.mark.parametrize("name", SHARED)
def test_gradients_of_shared_edge_features_wait_for_no_other_layer(name, edges, graphs):
    torch.manual_seed(0)
    model = Shared(SHARED[name]).double()
    x, edge_index, edge_attr = graph(takes="attr", edges=edges)
    check(model, (x, edge_index, edge_attr.detach()))
    assert not edges or (wide(graphs, edges, EDGE) == [] and by_edge(graphs, edges) == [])


@pytest.mark.parametrize("edges", [90, 0])
def test_gradients_of_edge_features_that_something_else_reads_are_eagers(edges):
    torch.manual_seed(0)
    check(Shared(SHARED["ResGated"]).double(), graph(takes="attr", edges=edges))


def test_parameters_with_the_same_gradient_have_one_each():
    """Added up over two steps, they would else be added twice to one tensor."""
    torch.manual_seed(0)
    x, edge_index, edge_attr = graph(takes="attr")
    a, b, c = (nn.Linear(size, WIDTH).double() for size in (EDGE, EDGE, IN))

    def function(x, edge_index, edge_attr):
        message = torch.sigmoid(a(edge_attr) + b(edge_attr) + c(x)[edge_index[0]])
        return torch.zeros(len(x), WIDTH, dtype=x.dtype).index_add(0, edge_index[1], message)

    parameters = [*a.parameters(), *b.parameters(), *c.parameters()]

    def gradients(call):
        for p in parameters:
            p.grad = None
        for _ in range(2):
            call(x, edge_index, edge_attr.detach()).square().sum().backward()
        return [p.grad.clone() for p in parameters]

    expected = gradients(function)
    torch._dynamo.reset()
    assert_same(gradients(compiled(function)), expected)


def test_outputs_that_are_the_same_are_two():
    """A user who writes to one changes no other, as in eager."""
    torch.manual_seed(0)
    x, edge_index = graph()
    weights = torch.randn(IN, IN, dtype=torch.float64, requires_grad=True)

    def function(x, edge_index):
        x = x @ weights
        message = [torch.sigmoid(x[edge_index[0]] - x[edge_index[1]]) for _ in range(2)]
        first, second = (torch.zeros_like(x).index_add(0, edge_index[1], m) for m in message)
        return first, second, first.view(-1)

    first, second, view = compiled(function)(x, edge_index)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert view.data_ptr() == first.data_ptr()  # what shares memory in eager goes on to


def test_products_of_products_of_edge_features_are_as_narrow_as_these(graphs):
    torch.manual_seed(0)
    x, edge_index, edge_attr = graph(takes="attr")
    check(Shared(SHARED["ResGated"], sign=1).double(), (x, edge_index, edge_attr.detach()))
    calls = [n for both in graphs for g in both for n in g.find_nodes(op="call_function", target=ops.edges.default)]
    sizes = {
        tuple(node.meta["val"].shape)
        for call in calls
        for operand, node in zip(parse(call.args[0]).operands, call.args[8], strict=True)
        if operand.where == "matrix"
    }
    assert sizes == {(EDGE, WIDTH)}


IN_FLOAT32 = ("EdgeConv", "learned of edges", "learned of three", "mesh", "decoder", "filtered")


@pytest.mark.parametrize("name", quickly(IN_FLOAT32, IN_FLOAT32[3:]))
def test_in_float32(name):
    model, takes = build(name, torch.float32)
    check(model, graph(dtype=torch.float32, takes=takes), within=2e-5)


@pytest.mark.parametrize("name", ["two EdgeConv", "learned of edges", "mesh"])
def test_batches_of_any_size_are_compiled_for_once(name, graphs):
    model, takes = build(name)
    function = torch.compile(model, backend="actcompile", options=EXACT, dynamic=True)
    for nodes, count in ((23, 90), (31, 64), (12, 120), (40, 20), (9, 9)):
        inputs = graph(nodes=nodes, edges=count, takes=takes, seed=nodes)
        wanted = [*model.parameters(), inputs[0]]
        assert_same(step(function, inputs, wanted), step(model, inputs, wanted))
    assert len(graphs) <= 2


def test_products_stay_with_edges_where_there_are_few(graphs):
    model = Own(lambda i, j, e: j, aggr="sum").double()
    large = nn.Linear(16, 1100)  # too large to be multiplied with edge by edge
    model.function = MLPOf(lambda i, j, e: torch.cat([i, j], -1), large).double()
    inputs = graph(nodes=40, edges=12, takes="attr")
    check(model, inputs)
    assert by_edge(graphs, 12)
    graphs.clear()
    torch._dynamo.reset()
    inputs = graph(nodes=12, edges=40, takes="attr")
    check(model, inputs)
    assert not by_edge(graphs, 40)


class Relative(nn.Module):
    """Messages of where neighbours are, as PointNet's: positions are large, and their differences small."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(IN + 2, 8)

    def forward(self, x, position, edge_index):
        row, col = edge_index
        message = self.layers(torch.cat([x[row], position[row] - position[col]], -1))
        index = col.view(-1, 1).expand_as(message)
        return x.new_zeros(x.shape[0], 8).scatter_reduce(0, index, message, "amax", include_self=False)


def test_small_differences_of_large_rows_are_as_exact_as_in_eager():
    torch.manual_seed(0)
    model, (x, edge_index) = Relative(), graph(dtype=torch.float32)
    position = 1000 + 0.01 * torch.randn(23, 2)
    double = Relative().double()
    double.load_state_dict(model.state_dict())
    exact = step(double, (x.double(), position.double(), edge_index), list(double.parameters()))
    ours = step(compiled(model), (x, position, edge_index), list(model.parameters()))
    for a, b in zip(ours, exact, strict=True):
        assert (a.double() - b).norm() <= 2e-6 * b.norm()


def test_a_value_that_the_model_returns_is_made_all_the_same():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2 * IN, 8)

        def forward(self, x, edge_index):
            message = self.lin(torch.cat([x[edge_index[0]], x[edge_index[1]]], -1))
            return x.new_zeros(x.shape[0], 8).index_add(0, edge_index[1], message.relu()), message

    torch.manual_seed(0)
    check(Both().double(), graph())


class Columns(nn.Module):
    """Messages of some columns of some columns of a product, as LSTMs and heads cut them."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2 * IN, 16, bias=False)

    def forward(self, x, edge_index):
        message = self.lin(torch.cat([x[edge_index[0]], x[edge_index[1]]], -1))
        cut = message[:, 4:][:, :8]
        return x.new_zeros(x.shape[0], 8).index_add(0, edge_index[1], cut + cut.tanh())


def test_columns_of_columns_of_a_product():
    torch.manual_seed(0)
    check(Columns().double(), graph())


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bit_weights_are_no_coarser_where_a_node_has_many_edges(dtype, size):
    """A sum of bfloat16 in bfloat16 stops at some 256 times its summands, and torch takes sums by node so."""
    torch.manual_seed(0)
    pairs = MLPOf(lambda x, edges: torch.cat([x[edges[0]], x[edges[1]]], -1), nn.Linear(2 * IN, size))
    edge_index = torch.stack([torch.randint(23, (9000,)), torch.zeros(9000, dtype=torch.int64)])
    x, weight = torch.rand(23, IN), 0.1 * torch.rand(9000, size)
    exact = torch.autograd.grad((pairs(x, edge_index) * weight).sum(), list(pairs.parameters()))
    pairs.to(dtype)
    outputs = compiled(pairs)(x.to(dtype), edge_index)
    ours = torch.autograd.grad((outputs * weight.to(dtype)).sum(), list(pairs.parameters()))
    for a, b in zip(ours, exact, strict=True):
        assert (a.float() - b).norm() <= 0.01 * b.norm()
