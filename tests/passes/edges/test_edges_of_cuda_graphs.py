"""What is fused of graphs on CUDA, which need not be there."""

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from actcompile.kernels.edges.program import parse
from actcompile.passes.edges.edges import edges

NODES, EDGES, WIDTH = 23, 90, 8
OPS = torch.ops.actcompile


def fused(function, dtype=torch.float32, device="cuda:0", index_device=None):
    """The graph of a function of rows and edges, fused. It is traced on the CPU, and then said to be elsewhere."""
    with FakeTensorMode() as mode:
        x, edge_index = torch.empty(NODES, WIDTH, dtype=dtype), torch.empty(2, EDGES, dtype=torch.long)
        graph = make_fx(lambda *inputs: (function(*inputs),), decomposition_table=select_decomp_table())(
            x, edge_index
        ).graph
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and (value.dim() or node.op == "call_function"):
            place = torch.device(device if value.is_floating_point() or index_device is None else index_device)
            node.meta["val"] = FakeTensor(mode, value.to("meta"), place)
    found = edges(graph, 1, ())
    graph.lint()
    return graph, found


def summed(x, edge_index):
    return torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]])


def largest(x, edge_index):
    index = edge_index[1].view(-1, 1).expand(-1, WIDTH)
    return torch.zeros_like(x).scatter_reduce(0, index, x[edge_index[0]], "amax", include_self=False)


def scored(x, edge_index):
    return (x[edge_index[0]] * x[edge_index[1]]).sum(-1)


def gated(x, edge_index):
    return torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]] * x[edge_index[1]].sigmoid())


def targets(graph):
    return {node.target for node in graph.nodes}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("function", [largest, scored, gated])
def test_what_would_hold_messages_is_fused(function, dtype):
    graph, _ = fused(function, dtype)
    (node,) = graph.find_nodes(op="call_function", target=OPS.edges.default)
    assert {o.dtype for o in parse(node.args[0]).operands} == {str(dtype)[6:]}
    assert all(v.is_cuda for n in graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_of_rows_are_fused(dtype):
    assert OPS.aggregate.default in targets(fused(summed, dtype)[0])


def test_what_is_on_another_device_is_left_to_torch():
    graph, _ = fused(scored, index_device="cpu")
    assert OPS.edges.default not in targets(graph)
    graph, _ = fused(lambda x, e: (x[e[0]] * x[e[1]] * x.new_ones(())).sum(-1))
    assert OPS.edges.default in targets(graph)


def test_half_precision_is_not_fused_on_the_cpu():
    assert OPS.edges.default not in targets(fused(largest, torch.float16, "cpu")[0])
