"""Fused message passing: the same gradients as eager's, no tensor of [edges, features], comparisons in forward only."""

import operator
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch_geometric import nn as pyg

import actcompile.backend  # noqa: F401  the module; `actcompile.backend` is the function
from actcompile.kernels.edges import group as grouping
from actcompile.kernels.edges import ops as edges_ops
from actcompile.kernels.edges.program import COMPARING, parse
from tests.helpers import EXACT, quickly, step, uncompressed
from tests.passes.edges.layers import GRAPHS, IN, LAYERS, REPEATED, WIDTH, Pooled, build, graph

ops = torch.ops.actcompile
PIPELINE = sys.modules["actcompile.backend"]


@pytest.fixture(autouse=True)
def graphs(monkeypatch) -> Iterator[list[tuple[torch.fx.Graph, torch.fx.Graph]]]:
    """The forward and backward graphs that are made; and no program may fail to compile."""
    made, partition, compile_source = [], PIPELINE.partition, edges_ops.compile_source

    def recording(*args, **kwargs):
        both = partition(*args, **kwargs)
        made.append(tuple(module.graph for module in both))
        return both

    def checked(*args):
        library = compile_source(*args)
        assert library is not None, args[0]
        return library

    monkeypatch.setattr(PIPELINE, "partition", recording)
    monkeypatch.setattr(edges_ops, "compile_source", checked)
    torch._dynamo.reset()
    yield made


def compiled(model, **options):
    return torch.compile(model, backend="actcompile", options={**EXACT, **options})


def assert_same(ours, expected, within=1e-10):
    assert len(ours) == len(expected)
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        if a is None or b is None:  # an input without influence: none, or zeros
            assert not any(t.any() for t in (a, b) if t is not None), f"number {i}"
            continue
        assert torch.equal(a.isfinite(), b.isfinite()), f"number {i}"
        assert (a - b).norm() <= within * b.norm().clamp_min(1e-2), (
            f"number {i}: {(a - b).abs().max()} of {b.abs().max()}"
        )


def check(model, inputs, *, within=1e-10, reference=None, **options):
    """One step of a compiled model against one of eager's, or of `reference`."""
    wanted = [*model.parameters(), *(t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad)]
    expected = step(model if reference is None else reference, inputs, wanted)
    assert_same(step(compiled(model, **options), inputs, wanted), expected, within)


def called(graphs, *targets):
    return [node for both in graphs for g in both for node in g.nodes if node.target in targets]


def of_inputs(node):
    """Whether a node of backward is computed of the model's inputs alone, which are never rounded."""
    if node.op == "placeholder":
        return node.name.startswith("primals")
    return all(map(of_inputs, node.all_input_nodes))


def draws(name):
    return name in ("GAT 2 heads", "GATv2 edges", "Transformer edges")  # dropout draws other numbers in eager


@pytest.mark.parametrize("name", quickly(LAYERS, REPEATED))
def test_gradients_are_those_of_eager(name, graphs):
    model, takes = build(name)
    inputs = graph("ties" if len(name) % 2 else "random", takes=takes)
    check(model, inputs, reference=uncompressed(model) if draws(name) else None)
    assert called(graphs, ops.edges.default, ops.aggregate.default) or name in NOTHING_TO_FUSE
    for _, backward in graphs:  # what is rounded is not compared: masks come from forward
        for node in backward.find_nodes(op="call_function", target=ops.edges.default):
            steps = {s.op for s in parse(node.args[0]).steps}
            assert not steps & COMPARING or of_inputs(node)


NOTHING_TO_FUSE = ("Arma", "segment", "scatter mul", "own across")


ON_GRAPHS = ("SAGE max", "GAT 2 heads averaged", "GCN", "own relu", "two SAGE")
SLOWLY = [(n, k) for n in ON_GRAPHS[2:] for k in GRAPHS if k not in ("ties", "one node", "no edges")]


@pytest.mark.parametrize(("name", "kind"), quickly([(n, k) for n in ON_GRAPHS for k in GRAPHS], SLOWLY))
def test_gradients_on_any_graph(name, kind):
    if name == "two SAGE" and kind == "one node":
        pytest.skip("a norm over one row")
    model, takes = build(name)
    check(model, graph(kind, takes=takes))


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("name", [n for n in LAYERS if not n.startswith("two")])
def test_gradients_of_every_layer_on_any_graph(name, kind, fuse):
    if name == "learned with a norm" and kind == "one node":
        pytest.skip("a norm over equal rows: what ReLU sees of it is rounding")
    if name == "SuperGAT" and kind == "no edges":
        pytest.skip("no index for torch, in eager too")
    model, takes = build(name)
    check(model, graph(kind, takes=takes), reference=uncompressed(model) if draws(name) else None, fuse=fuse)


@pytest.mark.parametrize("name", ["two SAGE", "two GCN", "two GAT", "two max", "GATv2 edges", "EdgeConv", "own relu"])
def test_without_fusing_gradients_are_those_of_eager_too(name, graphs):
    model, takes = build(name)
    check(model, graph(takes=takes), reference=uncompressed(model) if draws(name) else None, fuse=False)
    assert not called(graphs, ops.edges.default, ops.aggregate.default)


def wide(graphs, count, heads):
    """Calls that make a float tensor with a row for each edge and more than `heads` columns."""
    found = []
    for both in graphs:
        for node in (n for g in both for n in g.nodes if n.op == "call_function"):
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
                rows, *sizes = map(str, value.shape)
                columns = torch.Size(map(int, sizes)).numel() if all(s.isdigit() for s in sizes) else 1
                if (rows == str(count) or "u" in rows) and columns > heads and not is_packed(node):
                    found.append((node.name, node.target, tuple(value.shape)))
    return found


def is_packed(node):
    return node.target in (ops.pack_bits.default, operator.getitem) and "bits" in str(node.args)


HEADS = {"two SAGE": 1, "SAGE max": 1, "SAGE min": 1, "two max": 1, "GCN": 1, "two GCN": 1, "GCN weighted": 1, "GIN": 1}
HEADS |= {"GAT": 1, "two GAT": 2, "GAT 2 heads": 2, "GATv2": 2, "Transformer": 2, "TAG": 1, "SG": 1, "index_add": 1}


@pytest.mark.parametrize("name", quickly(HEADS, {*REPEATED, "GCN weighted", "GIN", "GAT", "two GAT", "TAG"}))
def test_nothing_has_a_row_of_features_for_each_edge(name, graphs):
    model, takes = build(name)
    inputs = graph(takes=takes)
    check(model, inputs, reference=uncompressed(model) if draws(name) else None)
    assert wide(graphs, inputs[1].shape[1], HEADS[name]) == []
    graphs.clear()
    torch._dynamo.reset()
    if "GAT" not in name:
        step(compiled(model, fuse=False), inputs, model.parameters())
        assert wide(graphs, inputs[1].shape[1], HEADS[name])  # it does tell


@pytest.mark.parametrize("name", ["SAGE max", "GCN", "GAT", "own gate", "Transformer edges"])
def test_in_float32(name):
    model, takes = build(name, torch.float32)
    reference = uncompressed(model) if draws(name) else None
    check(model, graph(dtype=torch.float32, takes=takes), within=2e-5, reference=reference)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["SAGE max", "index_add"])
def test_indices_of_either_width(name, index):
    model, takes = build(name)
    x, edge_index, *extra = graph(takes=takes)
    if index == torch.int32 and name == "SAGE max":
        pytest.skip("torch's scatter takes int64 only")
    check(model, (x, edge_index.to(index), *extra))


@pytest.mark.parametrize("layer", ["sage", "max", "gat", "gatv2", "transformer"])
def test_bipartite_graphs(layer, graphs):
    torch.manual_seed(0)
    make = {
        "sage": lambda: pyg.SAGEConv((IN, IN), WIDTH),
        "max": lambda: pyg.SAGEConv((IN, IN), WIDTH, aggr="max"),
        "gat": lambda: pyg.GATConv((IN, IN), 4, heads=2, add_self_loops=False),
        "gatv2": lambda: pyg.GATv2Conv((IN, IN), 4, heads=2, add_self_loops=False),
        "transformer": lambda: pyg.TransformerConv((IN, IN), 4, heads=2),
    }[layer]
    model = make().double()

    class Bipartite(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model

        def forward(self, here, there, edge_index):
            return self.layer((here, there), edge_index)

    here, there = (torch.randn(n, IN, dtype=torch.float64, requires_grad=True) for n in (11, 17))
    check(Bipartite(), (here, there, torch.stack([torch.randint(11, (40,)), torch.randint(17, (40,))])))
    assert called(graphs, ops.edges.default, ops.aggregate.default)


@pytest.mark.parametrize("name", ["sage", "max"])
def test_from_target_to_source(name, graphs):
    torch.manual_seed(0)
    check(pyg.SAGEConv(IN, WIDTH, aggr={"sage": "mean", "max": "max"}[name], flow="target_to_source").double(), graph())
    assert called(graphs, ops.edges.default, ops.aggregate.default)


def test_no_sources_at_all():
    """A batch whose other end is empty."""

    def add(x, y, edge_index):
        return torch.zeros_like(y).index_add(0, edge_index[1], x[edge_index[0]]) + y

    x, y = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (0, 5))
    expected = step(add, (x, y, torch.empty(2, 0, dtype=torch.long)), (x, y))
    assert_same(step(compiled(add), (x, y, torch.empty(2, 0, dtype=torch.long)), (x, y)), expected)


@pytest.mark.parametrize("pool", [pyg.global_add_pool, pyg.global_mean_pool, pyg.global_max_pool])
def test_batches_of_graphs(pool):
    torch.manual_seed(0)
    x, edge_index = graph()
    check(Pooled(pool).double(), (x, edge_index, torch.arange(23) // 6))


@pytest.mark.parametrize("name", ["SAGE max", "two GCN", "GAT 2 heads averaged", "own gate", "two SAGE"])
def test_batches_of_any_size_are_compiled_for_once(name, graphs):
    model, takes = build(name)
    function = torch.compile(model, backend="actcompile", options=EXACT, dynamic=True)
    for nodes, count in ((23, 90), (31, 64), (12, 120), (40, 41), (9, 9)):
        inputs = graph(nodes=nodes, edges=count, takes=takes, seed=nodes)
        wanted = [*model.parameters(), inputs[0]]
        assert_same(step(function, inputs, wanted), step(model, inputs, wanted))
    assert len(graphs) <= 2


def test_edges_that_change_in_place_are_grouped_anew():
    model, _ = build("SAGE max")
    x, edge_index = graph()
    function, wanted = compiled(model), [*model.parameters(), x]
    for seed in range(3):
        edge_index.copy_(graph(seed=seed)[1])
        assert_same(step(function, (x, edge_index), wanted), step(model, (x, edge_index), wanted))


def test_edges_are_grouped_once_for_all_layers_and_steps(monkeypatch):
    model, _ = build("two SAGE")
    x, edge_index = graph()
    function, made = compiled(model), []
    monkeypatch.setattr(grouping, "group", lambda *args, group=grouping.group: made.append(args[1:]) or group(*args))
    for _ in range(3):
        step(function, (x, edge_index), [*model.parameters(), x])
    assert sorted(made) == [(0, 23), (1, 23)]


class Returning(nn.Module):
    """Returns what it attends to."""

    def __init__(self):
        super().__init__()
        self.layer = pyg.GATConv(IN, 4, heads=2, add_self_loops=False)

    def forward(self, x, edge_index):
        out, (_, weight) = self.layer(x, edge_index, return_attention_weights=True)
        return out, weight


class Messages(nn.Module):
    """Returns its messages, too."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(IN, WIDTH)

    def forward(self, x, edge_index):
        message = self.first(x)[edge_index[0]].sin()
        return torch.zeros(x.shape[0], WIDTH, dtype=x.dtype).index_add(0, edge_index[1], message), message


@pytest.mark.parametrize("make", [Returning, Messages])
def test_what_is_returned_of_edges_is_right(make):
    torch.manual_seed(0)
    check(make().double(), graph())


def test_a_message_that_a_hook_changes_is_right():
    model, takes = build("own gate")
    model.register_message_forward_hook(lambda module, inputs, out: out * 2)
    check(model, graph(takes=takes), reference=uncompressed(model))  # PyG leaves the hook out of what is compiled


def test_ties_share_their_gradient_as_in_torch(graphs):
    def largest(x, edge_index):
        index = edge_index[1].view(-1, 1).expand(-1, x.shape[1])
        zeros = torch.zeros(5, x.shape[1], dtype=x.dtype)
        return zeros.scatter_reduce(0, index, x[edge_index[0]], "amax", include_self=False)

    x = torch.tensor([[1.0], [1.0], [0.0], [0.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    edge_index = torch.tensor([[0, 1, 0, 2, 3, 4, 4], [0, 0, 0, 1, 1, 2, 2]])
    expected = step(largest, (x, edge_index), [x])
    assert_same(step(compiled(largest), (x, edge_index), [x]), expected)
    assert called(graphs, ops.edges.default)


@pytest.mark.parametrize("name", ["SAGE max", "own relu", "GAT without self-loops", "two SAGE", "scatter max"])
def test_in_bfloat16_gradients_are_finite_and_near(name):
    """Under autocast a maximum is compared with messages as they were rounded, or its ties were none."""
    model, takes = build(name, torch.float32)
    inputs = graph(dtype=torch.float32, takes=takes)
    wanted = [*model.parameters(), inputs[0]]

    def under_autocast(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return model(*args).float()

    expected, exact = step(under_autocast, inputs, wanted), step(model, inputs, wanted)
    ours = step(compiled(under_autocast), inputs, wanted)
    for a, b, c in zip(ours, expected, exact, strict=True):
        if a is not None:
            noise = (b - c).norm() + 0.02 * c.norm() + 1e-3
            assert (a - c).norm() < 3 * noise


SHORT = ("SAGE mean", "SAGE max", "own relu", "scatter max", "scatter sum")
IN_16_BITS = [(name, dtype) for name in SHORT for dtype in (torch.bfloat16, torch.float16)]
REPEATED_IN_16 = [(name, torch.float16) for name in ("SAGE mean", "own relu", "scatter max")]


@pytest.mark.parametrize(("name", "dtype"), quickly(IN_16_BITS, REPEATED_IN_16))
def test_16_bit_models(name, dtype):
    model, takes = build(name, dtype)
    inputs = graph(dtype=dtype, takes=takes)
    wanted = [*model.parameters(), inputs[0]]
    expected = step(model, inputs, wanted)
    for a, b in zip(step(compiled(model), inputs, wanted), expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.isfinite().all()
            assert (a - b).float().norm() < 0.1 * b.float().norm() + 0.1


class Largest(nn.Module):
    """The largest of messages that are made of sums or maxima over neighbours, or of a start where that is included."""

    def __init__(self, kind, included):
        super().__init__()
        self.linear, self.kind, self.included = nn.Linear(IN, WIDTH), kind, included

    def forward(self, x, edge_index):
        h, (source, target) = self.linear(x), edge_index
        index = target.view(-1, 1).expand(-1, WIDTH)
        if self.kind == "sum":
            made = torch.zeros_like(h).index_add(0, target, h[source])[target]
        else:
            made = torch.zeros_like(h).scatter_reduce(0, index, h[source], "amax", include_self=False)
            made = {"target": made[target], "source": made[source], "both": made[target] + h[source]}[self.kind]
        start = h.new_full(h.shape, 0.1)
        return start.scatter_reduce(0, index, F.gelu(made), "amax", include_self=self.included)


@pytest.mark.parametrize(
    ("kind", "included"), [("sum", False), ("target", True), ("target", False), ("source", True), ("both", False)]
)
def test_a_maximum_that_is_not_fused_is_compared_with_what_torch_computes(kind, included):
    """A message that is computed anew elsewhere may differ in the last bit: none would be the largest, 0 / 0."""
    torch.manual_seed(0)
    check(Largest(kind, included), graph(dtype=torch.float32), within=1e-5)
