"""`bias` against the numbers: what it calls unbiased has no second difference; known non-linear cases are named."""

import functools
import itertools
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch._decomp import core_aten_decompositions
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch_geometric.nn import GATConv, GATv2Conv, GCNConv, GINConv, SAGEConv

from actcompile.passes.graph.bias import bias
from actcompile.passes.graph.linearity import RULES

aten = torch.ops.aten
NODES, EDGES, WIDTH = 9, 25, 4
PARTITIONS = {"min-cut": min_cut_rematerialization_partition, "default": default_partition}
DECOMPOSITIONS = {"inductor": select_decomp_table, "core": core_aten_decompositions, "none": dict}


class Attention(nn.Module):
    """Nodes attend to one another; every node's value is a weighted sum."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, edges):
        return torch.softmax(self.q(x) @ self.k(x).T / 2, dim=-1) @ x


class Aggregate(nn.Module):
    """Neighbours' features, weighted by edge, reduced by `reduce`."""

    def __init__(self, reduce):
        super().__init__()
        self.reduce, self.weight = reduce, nn.Parameter(torch.randn(EDGES, 1))

    def forward(self, x, edges):
        index = edges[1].unsqueeze(-1).expand(EDGES, WIDTH)
        return x.scatter_reduce(0, index, x[edges[0]] * self.weight, self.reduce)


class Gated(nn.Module):
    """The product of two activations."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, edges):
        return self.a(x) * self.b(x)


LAYERS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "relu": lambda: nn.ReLU(),
    "gelu": lambda: nn.GELU(),
    "dropout": lambda: nn.Dropout(0.5),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "batch norm in eval": lambda: nn.BatchNorm1d(WIDTH).eval(),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "softmax": lambda: nn.Softmax(-1),
    "attention": Attention,
    "sum": lambda: Aggregate("sum"),
    "mean": lambda: Aggregate("mean"),
    "max": lambda: Aggregate("amax"),
    "gated": Gated,
    "SAGE": lambda: SAGEConv(WIDTH, WIDTH),
    "SAGE max": lambda: SAGEConv(WIDTH, WIDTH, aggr="max"),
    "GCN": lambda: GCNConv(WIDTH, WIDTH, add_self_loops=False),
    "GIN": lambda: GINConv(nn.Linear(WIDTH, WIDTH)),
    "GAT": lambda: GATConv(WIDTH, WIDTH, add_self_loops=False),
    "GATv2": lambda: GATv2Conv(WIDTH, WIDTH, add_self_loops=False),
}


class Stack(nn.Module):
    """Layers one after another; those of torch look at no edges."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[layer]() for layer in layers)

    def forward(self, x, edges):
        for layer in self.layers:
            x = layer(x) if type(layer).__module__.startswith("torch.nn") else layer(x, edges)
        return x


@functools.lru_cache(maxsize=64)
def backward_of(layers, partition="min-cut", decompositions="inductor", seed=0):
    """The backward graph module of a stack of `layers`, and the arguments of one call of it, in float64."""
    torch.manual_seed(seed)
    stack = Stack(layers).double()
    x = torch.randn(NODES, WIDTH, dtype=torch.float64, requires_grad=True)
    edges = torch.randint(NODES, (2, EDGES))
    return backward_of_module(stack, x, edges, partition, decompositions)


def backward_of_module(model, x, edges, partition="min-cut", decompositions="inductor"):
    """The backward graph module of a model, and the arguments of one call of it."""
    caught = {}

    def forward(parameters, buffers, x, edges):
        return torch.func.functional_call(model, (parameters, buffers), (x, edges))

    def catch(module, _):
        def run(arguments):
            caught["module"], caught["arguments"] = module, list(arguments)
            return module(*arguments)

        run._boxed_call = True
        return run

    compiled = aot_function(
        forward,
        fw_compiler=lambda module, _: make_boxed_func(module.forward),
        bw_compiler=catch,
        partition_fn=PARTITIONS[partition],
        decompositions=DECOMPOSITIONS[decompositions](),
    )
    y = compiled(dict(model.named_parameters()), dict(model.named_buffers()), x, edges)
    y.backward(torch.randn_like(y))
    return caught["module"], caught["arguments"]


def placeholders(module):
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def floats(module):
    """Every float input, gradients and parameters too: the strictest choice of sources."""
    return [node for node in placeholders(module) if node.meta["val"].is_floating_point()]


def curvature(module, arguments, source, seed=0):
    """`|f(s + d) - 2 f(s) + f(s - d)|`, relative, the largest over the outputs, along a random `d` the size of `s`."""
    place = placeholders(module).index(source)
    generator = torch.Generator().manual_seed(seed)
    value = arguments[place]
    step = torch.randn(value.shape, dtype=value.dtype, generator=generator)
    runs = [
        [out for out in module(*arguments[:place], value + t * step, *arguments[place + 1 :]) if out is not None]
        for t in (-1, 0, 1)
    ]
    worst = 0.0
    for low, middle, high in zip(*runs, strict=True):
        scale = max(1.0, *(out.abs().max().item() for out in (low, middle, high)))
        bend = (low - 2 * middle + high).nan_to_num(nan=torch.inf).abs().max().item()
        worst = max(worst, bend / scale)
    return worst


def mean_over_roundings(module, arguments, sources, seed=0):
    """The mean of each output when every source is `s + d` or `s - d`, all combinations equally likely."""
    generator = torch.Generator().manual_seed(seed)
    places = [placeholders(module).index(source) for source in sources]
    steps = [torch.randn(arguments[i].shape, dtype=torch.float64, generator=generator) for i in places]
    runs = []
    for signs in itertools.product((-1, 1), repeat=len(sources)):
        rounded = list(arguments)
        for place, sign, step in zip(places, signs, steps, strict=True):
            rounded[place] = arguments[place] + sign * step
        runs.append([out for out in module(*rounded) if out is not None])
    return [torch.stack(outs).mean(0) for outs in zip(*runs, strict=True)]


def verdicts(function, *inputs):
    """What `bias` says of each input of a traced function, by position, and the traced module."""
    module = make_fx(function)(*inputs)
    return module, [bias(module.graph, placeholders(module))[source] for source in placeholders(module)]


def by_hand(*calls, output=-1, meta=True):
    """The verdict on `s` of a graph of `calls`, each `(target, arguments of s)`, that gives back the call `output`."""
    graph = fx.Graph()
    s = graph.placeholder("s")
    s.meta["val"] = value = torch.randn(4, 4, dtype=torch.float64)
    nodes = [graph.call_function(target, arguments(s)) for target, arguments in calls]
    for node in nodes:
        node.meta.update({"val": value} if meta else {})
    graph.output((nodes[output],))
    return bias(graph, [s])[s]


@settings(max_examples=10, deadline=None)
@given(
    layers=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=3),
    partition=st.sampled_from(sorted(PARTITIONS)),
    decompositions=st.sampled_from(sorted(DECOMPOSITIONS)),
    seed=st.integers(0, 2**31),
)
def test_unbiased_means_affine_in_each_and_exact_in_the_mean_of_all(layers, partition, decompositions, seed):
    module, arguments = backward_of(tuple(layers), partition, decompositions, seed)
    unbiased = [source for source, found in bias(module.graph, floats(module)).items() if not found.biased]
    for source in unbiased:
        assert curvature(module, arguments, source, seed) < 1e-10, source
    exact = [out for out in module(*arguments) if out is not None]
    for out, mean in zip(exact, mean_over_roundings(module, arguments, unbiased[:6], seed), strict=True):
        torch.testing.assert_close(mean, out, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decompositions", ["inductor", "none"])
@pytest.mark.parametrize("layer", LAYERS)
def test_verdicts_on_each_layer_are_exact(layer, decompositions):
    """Between linear layers, so that what the layer gets and gives is computed and needs gradients."""
    module, arguments = backward_of(("linear", layer, "linear"), decompositions=decompositions)
    for source, found in bias(module.graph, floats(module)).items():
        # Whether an element equals the maximum changes at single points, which steps pass over; so does what is divided
        # by the number of those that do.
        if found.op != "aten.eq.Tensor" and not ("max" in layer and found.steep):
            bend = curvature(module, arguments, source)
            assert found.biased == (bend > 1e-10), (source, found.op, bend)


# Ops in the backward graphs of the layers above that have no rule, and are meant to have none.
WITHOUT_RULE = {
    *("aten.full", "aten.scalar_tensor"),  # take no tensor
    *("aten.eq", "aten.le", "aten.gt", "aten.clamp", "aten.clamp_min", "aten.leaky_relu"),
    *("aten.exp", "aten.erf", "aten.rsqrt", "aten.var_mean"),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_no_op_is_without_a_rule_by_accident(layer):
    for decompositions in ("inductor", "none"):
        module, _ = backward_of(("linear", layer, "linear"), decompositions=decompositions)
        called = [node.target for node in module.graph.nodes if node.op == "call_function"]
        names = {str(target.overloadpacket) for target in called if target is not operator.getitem}
        assert names <= set(RULES) | WITHOUT_RULE


@pytest.mark.parametrize("layer", ["linear", "dropout", "sum", "mean", "gated", "GCN", "GIN", "batch norm in eval"])
def test_no_activation_is_biased(layer):
    module, _ = backward_of(("linear", layer, "linear"))
    activations = [node for node in floats(module) if not node.name.startswith("primals")]
    assert {source.name for source, found in bias(module.graph, activations).items() if found.biased} == set()


@pytest.mark.parametrize(
    ("layer", "decompositions", "expected"),
    [
        ("relu", "inductor", {"aten.le.Scalar"}),
        ("relu", "none", {"aten.threshold_backward.default"}),
        ("gelu", "inductor", {"aten.erf.default"}),
        ("batch norm", "none", {"aten.native_batch_norm_backward.default"}),
        ("layer norm", "inductor", {"aten.var_mean.correction"}),
        ("softmax", "none", {"aten._softmax_backward_data.default"}),
        ("max", "inductor", {"aten.div.Tensor"}),  # by the number of those that are the maximum
        ("SAGE", "none", {"aten.div.Tensor"}),  # by the number of neighbours
    ],
)
def test_the_op_that_biases_a_layer_is_named(layer, decompositions, expected):
    module, _ = backward_of(("linear", layer, "linear"), decompositions=decompositions)
    assert {found.op for found in bias(module.graph, floats(module)).values() if found.biased} == expected


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda s, g: g * s * s, "aten.mul.Tensor"),
        (lambda s, g: g + s @ s.T, "aten.mm.default"),
        (lambda s, g: g * s.pow(2), "aten.pow.Tensor_Scalar"),
        (lambda s, g: g * s.exp(), "aten.exp.default"),
        (lambda s, g: g * s.abs().rsqrt(), "aten.rsqrt.default"),
        (lambda s, g: g * torch.var(s, 0), "aten.var.correction"),
        (lambda s, g: g / s, "aten.div.Tensor"),
        (lambda s, g: torch.where(s > 0, g, 0.1), "aten.gt.Scalar"),
        (lambda s, g: g[s.sigmoid().mul(3).long().flatten()], "aten.sigmoid.default"),
        (lambda s, g: g * s.to(torch.int64), "aten._to_copy.default"),
        (lambda s, g: g * s.amax(0), "aten.amax.default"),
        (lambda s, g: g * s.view(torch.int64).double(), "aten.view.dtype"),
        (lambda s, g: g * s.to(torch.float8_e4m3fn).double(), "aten._to_copy.default"),
        (lambda s, g: aten.scatter_reduce(g, 0, torch.zeros(4, 4, dtype=torch.int64), s, "prod"),
         "aten.scatter_reduce.two"),
    ],
)  # fmt: skip
def test_nonlinear_cases(function, op):
    inputs = [torch.randn(4, 4, dtype=torch.float64) for _ in "sg"]
    module, (found, _) = verdicts(lambda s, g: (function(s, g),), *inputs)
    assert found.op == op
    assert curvature(module, inputs, placeholders(module)[0]) > 1e-6


def test_a_number_is_summed_up_over_a_dimension_that_it_has_not():
    x = torch.randn(5)
    assert [d.biased for d in verdicts(lambda x: x.sum().sum(-1) + x.mean().mean(0), x)[1]] == [False]
    assert [d.biased for d in verdicts(lambda x: x.sum().sum(-1) * x.mean(), x)[1]] == [True]


def test_sources_are_judged_apart():
    a, b, g = (torch.randn(4, 4, dtype=torch.float64) for _ in range(3))
    assert [v.biased for v in verdicts(lambda a, b, g: a * b * g, a, b, g)[1]] == [False, False, False]
    assert [v.op for v in verdicts(lambda a, b, g: (a * b) @ (g * b), a, b, g)[1]] == ["", "aten.mm.default", ""]
    expected = ["aten.exp.default", "aten.sin.default", ""]
    assert [v.op for v in verdicts(lambda a, b, g: a.exp() * b.sin(), a, b, g)[1]] == expected


def test_outputs_of_one_op_are_judged_apart():
    def grads(output):
        def function(x, mean, invstd, g):
            return aten.native_batch_norm_backward(g, x, None, None, None, mean, invstd, True, 0.1, [True] * 3)[output]

        x, mean, invstd, g = torch.randn(5, 4), torch.randn(4), torch.randn(4), torch.randn(5, 4)
        return [found.biased for found in verdicts(function, x, mean, invstd, g)[1]]

    assert grads(0) == [True, True, True, False]
    assert grads(1) == grads(2) == [False, False, False, False]


def test_the_first_op_that_reaches_an_output_is_named():
    exp, double = (aten.exp.default, lambda s: (s,)), (aten.mul.Tensor, lambda s: (s, 2.0))
    square = (aten.mul.Tensor, lambda s: (s, s))
    assert not by_hand(exp, double).biased
    assert by_hand(exp, square).op == "aten.mul.Tensor"
    graph_both = make_fx(lambda s: (s.exp() + s * s, s.sin()))(torch.randn(3))
    assert bias(graph_both.graph, placeholders(graph_both))[placeholders(graph_both)[0]].op == "aten.exp.default"


@torch.library.custom_op("actcompile_test_bias::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    """Linear, which nobody told the table."""
    return 2 * x


def test_what_is_unknown_is_nonlinear():
    times = (aten.mul.Tensor, lambda s: (s, 2.0))
    custom = torch.ops.actcompile_test_bias.double.default
    assert by_hand((custom, lambda s: (s,))).op == "actcompile_test_bias.double.default"
    assert by_hand((torch.ops.higher_order.cond, lambda s: (s,)), times).op == "cond"
    assert by_hand((torch.relu, lambda s: (s,)), times).op == "relu"
    assert by_hand(times).op == ""
    assert by_hand(times, meta=False).op == "aten.mul.Tensor"


def test_an_op_that_writes_counts_even_where_its_result_is_unused():
    times = (aten.mul.Tensor, lambda s: (s, 2.0))
    assert by_hand((aten.add_.Tensor, lambda s: (s, 1.0)), times).op == "aten.add_.Tensor"

    def through_a_view(s):
        y = torch.zeros(3, dtype=torch.float64)
        view = y.view(3, 1)
        y.copy_(s)
        return view * view

    assert verdicts(through_a_view, torch.randn(3, dtype=torch.float64))[1][0].op == "aten.copy_.default"


def test_a_value_may_stand_for_a_source():
    module = make_fx(lambda s: s.exp() * s)(torch.randn(3))
    s, exp, _, _ = module.graph.nodes
    assert bias(module.graph, [s])[s].op == "aten.exp.default"
    assert not bias(module.graph, [exp])[exp].biased


def test_a_source_must_be_of_the_graph():
    module = make_fx(lambda s: s * 2)(torch.randn(3))
    other = make_fx(lambda s: s * 2)(torch.randn(3))
    for source in (module.graph.output_node(), placeholders(other)[0]):
        with pytest.raises(ValueError, match="sources: .* is no value"):
            bias(module.graph, [source])


@pytest.mark.parametrize(
    ("function", "steep"),
    [
        (lambda s, g: g / s, True),
        (lambda s, g: g * s.log(), True),
        (lambda s, g: g * s.abs().rsqrt(), True),
        (lambda s, g: g * (s.relu() + 1e-3) ** 0.4, True),
        (lambda s, g: g * s**-1, True),
        (lambda s, g: g * s**3, False),
        (lambda s, g: g * s.exp(), False),
        (lambda s, g: g / (s.exp() + 1), False),
        (lambda s, g: g / s.mean(0), False),
        (lambda s, g: g * (s.var(0) + 1e-5).rsqrt(), False),
        (lambda s, g: s / (g + 3), False),
    ],
)
def test_what_is_steep_near_zero_is_told(function, steep):
    inputs = [torch.rand(40, 4, dtype=torch.float64) for _ in "sg"]
    _, (found, _) = verdicts(lambda s, g: (function(s, g),), *inputs)
    assert found.steep == steep


@pytest.mark.parametrize(
    ("function", "vanishing"),
    [
        (lambda s, g: g / s, False),
        (lambda s, g: g / (3 * s.abs()).sqrt(), False),
        (lambda s, g: g / (s * g), False),
        (lambda s, g: g / (s.square().sum(1, keepdim=True).sqrt() + 1e-12), False),
        (lambda s, g: g / (s + 1e-16), False),
        (lambda s, g: g / (s + g), True),
        (lambda s, g: g / (s - 0.5), True),
        (lambda s, g: g / (s[:20] - s[20:]).repeat(2, 1), True),
    ],
)
def test_what_rounding_may_make_zero_of_is_told(function, vanishing):
    inputs = [torch.rand(40, 4, dtype=torch.float64) for _ in "sg"]
    _, (found, _) = verdicts(lambda s, g: (function(s, g),), *inputs)
    assert found.vanishing == vanishing
