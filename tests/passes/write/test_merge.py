"""Regions that read the same rows are one pass over the edges, with the results of each."""

import operator
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_geometric import nn as gnn

from actcompile import compress, explain
from actcompile.kernels.edges.program import Operand, Output, Program, Step
from actcompile.passes.graph.split import call
from actcompile.passes.write.merge import merge
from tests.helpers import EXACT, graph, step
from tests.kernels.edges import test_edges_products
from tests.kernels.edges.programs import data, programs
from tests.kernels.edges.programs import graph as graph_of

edges = torch.ops.actcompile.edges.default


def calls(several, sizes, seed):
    """A graph of one call of `edges` for each program, and its inputs. Rows of the same kind are the same rows."""
    by, others, nodes = graph_of("random", seed=seed)
    traced, given_as = fx.Graph(), {}
    for program in several:
        for kind, tensor in zip(program.operands, data(program, nodes, len(by), *sizes, seed), strict=True):
            given_as.setdefault((kind, tensor.shape), tensor)
    tensors = [by, *others, *given_as.values()]
    placeholders = [traced.placeholder(f"x{i}") for i in range(len(tensors))]
    with FakeTensorMode() as mode:
        for node, tensor in zip(placeholders, tensors, strict=True):
            node.meta["val"] = mode.from_tensor(tensor)
    inputs = dict(zip(given_as, placeholders[3:], strict=True))
    results = []
    for program in several:
        shapes = [t.shape for t in data(program, nodes, len(by), *sizes, seed)]
        operands = [inputs[key] for key in zip(program.operands, shapes, strict=True)]
        ends = max([o.index for o in program.operands if o.where == "take"] + [-1]) + 1
        made = call(
            traced, edges, program.dump(), placeholders[0], -1, nodes, *sizes, placeholders[1 : 1 + ends], [-1] * ends,
            operands, [],
        )  # fmt: skip
        results += [call(traced, operator.getitem, made, i) for i in range(len(program.outputs))]
    traced.output(tuple(results))
    return fx.GraphModule({}, traced), tensors


def compare(several, sizes, seed):
    module, tensors = calls(several, sizes, seed)
    expected = module(*tensors)
    merge(module.graph, ())
    module.graph.lint()
    module.recompile()
    for ours, theirs in zip(module(*tensors), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, equal_nan=True)
    return len(module.graph.find_nodes(op="call_function", target=edges))


@settings(max_examples=6 if settings.get_current_profile_name() == "ci" else 100, phases=[Phase.generate])  # compiled
@given(st.data())
def test_results_are_those_of_each_alone(drawn):
    made = programs(("float64",)) if drawn.draw(st.booleans()) else test_edges_products.programs("float64")
    several = [drawn.draw(made.map(lambda p: p[0] if isinstance(p, tuple) else p)) for _ in range(2)]
    compare(
        [*several, several[0]], drawn.draw(st.sampled_from([(1, 33), (3, 16), (2, 5)])), drawn.draw(st.integers(0, 9))
    )


WIDE = Operand("take", 0, "c", "float64")
FACTOR = Operand("take", -1, "c", "float64")
SUM = Program((WIDE, FACTOR), (Step("mul", ("o0", "o1"), "c"),), (Output("sum", "v0", "c", "float64"),))


@pytest.mark.parametrize(
    ("other", "number"),
    [
        (replace(SUM, outputs=(Output("max", "v0", "c", "float64"),)), 1),
        (replace(SUM, outputs=(Output("total", "o0", "c", "float64"),)), 1),
        (Program((Operand("take", 0, "hc", "float64"),), (), (Output("sum", "o0", "hc", "float64"),)), 2),
    ],
    ids=["the same rows", "summed up over all edges", "other rows"],
)
def test_what_reads_the_same_rows_is_one_pass(other, number):
    assert compare([SUM, other], (1, 24), 0) == number


@pytest.mark.parametrize(
    ("layer", "backward"),
    [
        (lambda: gnn.ResGatedGraphConv(32, 32, edge_dim=8), 2),
        (lambda: gnn.PNAConv(32, 32, ["mean", "max", "std"], ["identity"], torch.tensor([0, 2, 4])), None),
        (lambda: gnn.SAGEConv(32, 32, aggr=["mean", "max", "sum"]), None),
    ],
    ids=["gates", "several aggregators", "aggregators of what is given"],
)
def test_layers(layer, backward):
    """The three gradients of a gated layer's rows, and those of three weights, are two passes: one by either end."""
    torch.manual_seed(0)
    first, second = layer().double(), layer().double()
    x, edge_index = graph(60, 240, 32)
    x, features = x.double(), (torch.randn(240, 8).double(),) if backward else ()

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x, edge_index, *features):
            return self.second(self.first(x, edge_index, *features).relu(), edge_index, *features)

    model = Two()
    expected = step(model, (x, edge_index, *features), model.parameters())
    compress(model, **EXACT)
    ours = step(model, (x, edge_index, *features), model.parameters())
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    (made,) = explain(model).graphs
    passes = [n for n in made.backward_nodes if n.op.startswith("actcompile.edges")]
    if backward:
        assert len(passes) == 2 * backward  # for each layer, none of which waits for the other
