"""Programs over edges on a GPU, against plain torch in float64 on the CPU, and hubs."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from actcompile.kernels.edges.group import group, grouping, remembered_nbytes
from actcompile.kernels.edges.ops import aggregate, edges, group_edges
from actcompile.kernels.edges.program import OPS, Operand, Output, Program, Step, run_reference
from tests.kernels.edges.programs import GRAPHS, data, graph, programs
from tests.kernels.edges.test_edges import SIZES, each

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_gpu(program, operands, by, others, nodes, *sizes):
    used = 1 + max((o.index for o in program.operands if o.where == "take"), default=-1)
    indices = [other.cuda() for other in others[:used]]
    return edges(program.dump(), by.cuda(), -1, nodes, *sizes, indices, [-1] * used, [o.cuda() for o in operands], [])


@pytest.mark.parametrize("floats", [("float64",), ("float32", "bfloat16")], ids=["double", "single"])
@settings(max_examples=4, phases=[Phase.generate])
@given(st.data())
def test_random_programs(floats, drawn):
    """Where float32 loses digits, the reference on the CPU loses as many."""
    program, exact = drawn.draw(programs(floats))
    sizes = drawn.draw(st.sampled_from(SIZES))  # each is compiled for, in a second or more
    for kind in drawn.draw(st.permutations(GRAPHS))[:4]:
        index = drawn.draw(st.sampled_from((torch.int32, torch.int64)))
        by, others, nodes = graph(kind, index, drawn.draw(st.integers(0, 99)))
        operands = data(program, nodes, len(by), *sizes)
        ours = on_gpu(program, operands, by, others, nodes, *sizes)
        expected = run_reference(program, operands, by, others, nodes, *sizes)
        for a, b, to_the_bit, output in zip(ours, expected, exact, program.outputs, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            if output.dtype == "bool" or (to_the_bit and output.kind not in ("sum", "dot", "total")):
                torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)
                continue
            rtol = 1e-11 if floats == ("float64",) else 2e-2 if output.dtype == "bfloat16" else 1e-4
            finite = b.double().nan_to_num(7, 1e30, -1e30)
            assert ((a.cpu().double().nan_to_num(7, 1e30, -1e30) - finite).abs() <= rtol * (1 + finite.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 40, 128, 300])
@pytest.mark.parametrize("hub", [0, 1000, 200_000])
def test_sums_with_hubs_are_right_and_the_same_every_time(hub, columns, dtype):
    generator = torch.Generator().manual_seed(0)
    nodes, count = 5000, 40_000 + hub
    edge_index = torch.randint(nodes, (2, count), generator=generator)
    edge_index[1, :hub] = 77
    edge_index = edge_index[:, torch.randperm(count, generator=generator)]
    x, weight = torch.randn(nodes, columns, generator=generator), torch.rand(count, 1, generator=generator)
    x, weight = x.to(dtype), weight.to(dtype)
    rows = x.double()[edge_index[0]] * weight.double()
    exact = torch.zeros(nodes, columns, dtype=torch.float64).index_add(0, edge_index[1], rows)
    size = torch.zeros(nodes, columns, dtype=torch.float64).index_add(0, edge_index[1], rows.abs())
    on_device = edge_index.cuda()
    runs = [
        aggregate(x.cuda(), weight.cuda(), on_device, 0, on_device, 1, nodes, grouped)
        for grouped in ([], [], list(group_edges(on_device, 1, nodes)))
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    eps = torch.finfo(dtype).eps
    assert ((runs[0].cpu().double() - exact).abs() <= eps * exact.abs() + 1e-6 * size).all()


@pytest.mark.parametrize("op", ["exp", "log", "log1p", "expm1", "sigmoid", "tanh", "erf", "sin", "cos", "rsqrt"])
def test_functions_are_as_exact_as_those_of_torch(op):
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)) * 3
    x[0, :5] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    by = torch.zeros(512, dtype=torch.long)
    (ours,) = on_gpu(each(op, "float32"), [x], by, [], 1, 1, 64)
    torch.testing.assert_close(ours.cpu(), OPS[op][1](x.double()).float(), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_bfloat16_is_rounded_to_nearest_even():
    rows = (Operand("edge", -1, "c", "float32"),)
    program = Program(rows, (Step("bfloat16", ("o0",), "c"),), (Output("edge", "v0", "c", "float32"),))
    x = torch.randn(512, 64)
    (ours,) = on_gpu(program, [x], torch.zeros(512, dtype=torch.long), [], 1, 1, 64)
    assert torch.equal(ours.cpu(), x.bfloat16().float())


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_grouping(kind, index):
    by, _, nodes = graph(kind, index)
    for made in (group_edges(by.cuda(), -1, nodes), group_edges(by, -1, nodes)):
        assert torch.equal(made[1].cpu().long(), by.argsort(stable=True))
        assert torch.equal(made[0].cpu().diff().long(), torch.bincount(by.long(), minlength=nodes))
    remembered, before = by.cuda(), remembered_nbytes()
    assert grouping(remembered, -1, nodes) is grouping(remembered, -1, nodes)
    del remembered
    assert remembered_nbytes() == before


def test_a_node_that_is_not_there_is_an_error():
    with pytest.raises(IndexError, match="smaller than 5"):
        group(torch.tensor([0, 5]).cuda(), -1, 5)
