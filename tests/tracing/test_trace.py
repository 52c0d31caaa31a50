"""A trace shows the graphs that ``torch.compile`` would make, runs nothing and leaves nothing behind."""

from __future__ import annotations

import copy
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import config as dynamo_config
from torch._dynamo import eval_frame
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_geometric.nn import GATConv, GCNConv, SAGEConv

from actcompile.tracing.trace import trace

CAPTURE = {"capture_dynamic_output_shape_ops": True}


def recorder() -> tuple[list[tuple[str, str]], Callable[..., Any]]:
    """The forward and backward graphs of every joint graph, and the backend that records them."""
    graphs: list[tuple[str, str]] = []

    def partition(joint: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        forward, backward = min_cut_rematerialization_partition(joint, inputs, **options)
        graphs.append((forward.print_readable(False), backward.print_readable(False)))
        return forward, backward

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        return gm

    table = select_decomp_table()
    return graphs, aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition, decompositions=table)


class Net(torch.nn.Module):
    def __init__(self, conv: Any, between: str = "") -> None:
        super().__init__()
        self.first, self.norm, self.last = conv(16, 32), torch.nn.BatchNorm1d(32), conv(32, 4)
        self.between = between

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        x = F.dropout(F.relu(self.norm(self.first(x, edges))), 0.5, self.training)
        if self.between == "break":
            torch._dynamo.graph_break()
        elif self.between == "print":
            print("between graphs", tuple(x.shape))
        elif self.between == "item":
            x = x * x.sum().item()
        elif self.between == "if" and x.sum() > 0:
            x = x + 1
        elif self.between == "tolist":
            x = x * len(x[:, 0].tolist())
        elif self.between == "numpy":
            x = x * float(x.detach().numpy().sum())
        return self.last(x, edges)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def graph(nodes: int = 50, edges: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(nodes, 16), torch.randint(0, nodes, (2, edges))


@pytest.mark.parametrize(
    ("conv", "between", "dynamic", "config"),
    [
        (SAGEConv, "", None, {}),
        (SAGEConv, "", True, {}),
        (SAGEConv, "break", None, {}),
        (SAGEConv, "break", True, {}),
        (SAGEConv, "print", None, {}),
        (GCNConv, "", None, CAPTURE),
        (GCNConv, "break", True, CAPTURE),
        (GATConv, "", None, CAPTURE),
    ],
)
def test_graphs_are_those_that_a_run_compiles(conv, between, dynamic, config):
    model, inputs = Net(conv, between), graph()
    with dynamo_config.patch(**config):
        traced, backend = recorder()
        result = trace(model, inputs, {}, backend, dynamic=dynamic)
        torch._dynamo.reset()
        compiled, backend = recorder()
        torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
    assert traced == compiled
    assert result.graphs == len(compiled) == (2 if between else 1)
    assert result.stopped is None
    assert len(result.breaks) == (1 if between else 0)


def test_a_size_that_is_dynamic_before_a_break_is_dynamic_after_it():
    x, edges = graph()
    torch._dynamo.mark_dynamic(x, 0)
    graphs, backend = recorder()
    trace(Net(SAGEConv, "break"), (x, edges), {}, backend)
    assert len(graphs) == 2
    assert all("Sym(" in forward for forward, _ in graphs)


def test_sizes_seen_before_decide_but_a_trace_adds_none():
    model, seen = Net(SAGEConv), graph(50)
    torch.compile(model, backend="eager")(*seen)
    for _ in range(2):  # the second would be dynamic in the nodes if the first left its sizes behind
        graphs, backend = recorder()
        trace(model, graph(50), {}, backend)
        assert "Sym(" not in graphs[0][0]
        graphs, backend = recorder()
        trace(model, graph(60), {}, backend)
        assert "Sym(" in graphs[0][0]


@pytest.mark.parametrize("between", ["if", "tolist"])
def test_needing_a_value_ends_the_trace_with_a_reason(between):
    graphs, backend = recorder()
    result = trace(Net(SAGEConv, between), graph(), {}, backend)
    assert len(graphs) == result.graphs == 1
    assert result.stopped is not None
    assert f'"{between}"' in result.stopped or "x = x *" in result.stopped  # the line of the model
    assert __file__ in result.stopped


@pytest.mark.parametrize("between", ["item", "numpy"])
def test_a_number_that_nothing_decides_by_stays_in_the_graph(between):
    graphs, backend = recorder()
    result = trace(Net(SAGEConv, between), graph(), {}, backend)
    assert len(graphs) == result.graphs == 1
    assert result.stopped is None and not result.breaks


@pytest.mark.parametrize("conv", [GCNConv, GATConv])
def test_self_loops_stay_in_the_graph(conv):
    graphs, backend = recorder()
    result = trace(Net(conv), graph(nodes=50, edges=200), {}, backend)
    assert result.stopped is None and not result.breaks
    assert len(graphs) == 1
    assert "u0 + 50" in graphs[0][0]  # the edges that are no loops, and a loop per node


def test_nothing_is_disturbed():
    model, inputs = Net(GATConv, "break"), graph()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    compiled(*inputs).sum().backward()
    frames, state = counter.frame_count, copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    backends, rng = dict(eval_frame.cached_backends), torch.get_rng_state()
    for nodes in (50, 70, 90):
        trace(compiled, graph(nodes), {}, recorder()[1])
        torch.set_rng_state(rng)
    trace(compiled, inputs, {}, recorder()[1])

    assert torch.equal(torch.get_rng_state(), rng)
    assert eval_frame.cached_backends == backends
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert not any("fake" in type(t).__name__.lower() for t in [*model.parameters(), *model.buffers()])
    compiled(*inputs).sum().backward()
    assert counter.frame_count == frames


@dynamo_config.patch(recompile_limit=2)
def test_traces_are_no_recompiles():
    """Neither of each other nor of what torch.compile makes of models of the class, in however many graphs."""
    for between, count in (("", 1), ("break", 2)):
        for _ in range(4):
            graphs, backend = recorder()
            trace(Net(SAGEConv, between), graph(), {}, backend)
            assert len(graphs) == count
        counter = CompileCounterWithBackend("aot_eager")
        torch.compile(Net(SAGEConv, between), backend=counter)(*graph())
        assert counter.frame_count == count


def test_a_cache_in_the_model_gets_no_fake_tensor():
    conv = GCNConv(16, 4, cached=True)
    trace(conv, graph(), {}, recorder()[1])
    assert conv._cached_edge_index is None


def test_gradients_are_on_under_no_grad():
    graphs, backend = recorder()
    with torch.no_grad():
        trace(Net(SAGEConv), graph(), {}, backend)
    assert len(graphs) == 1


def test_keyword_inputs_and_functions():
    model, (x, edges) = Net(SAGEConv), graph()
    graphs, backend = recorder()
    trace(lambda **inputs: model(**inputs).sum(), (), {"x": x, "edges": edges}, backend)
    assert len(graphs) == 1


def test_meta_inputs_are_on_the_model_s_device():
    x, edges = (t.to("meta") for t in graph())
    graphs, backend = recorder()
    trace(Net(SAGEConv), (x, edges), {}, backend)
    real, backend = recorder()
    torch._dynamo.reset()
    trace(Net(SAGEConv), graph(), {}, backend)
    assert graphs == real


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_here_is_an_error():
    with FakeTensorMode():
        x = torch.empty(50, 16, device="cuda")
    with pytest.raises(ValueError, match="cuda"):
        trace(lambda x: x.relu(), (x,), {}, recorder()[1])


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))],
)
def test_fake_inputs_keep_their_device(device):
    with FakeTensorMode():
        x, weight = torch.empty(50, 16, device=device), torch.empty(16, 8, device=device, requires_grad=True)
    devices: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        devices.extend(t.device.type for t in inputs)
        return gm

    assert trace(lambda x, weight: (x @ weight).relu(), (x, weight), {}, backend).graphs == 1
    assert devices == [device, device]


def test_errors_of_backend_and_model_are_raised():
    def broken(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        raise ZeroDivisionError("no such codec")

    x, edges = graph()
    with pytest.raises(BackendCompilerFailed, match="no such codec"):
        trace(Net(SAGEConv), (x, edges), {}, broken)
    with pytest.raises(RuntimeError, match="size|shape"):
        trace(Net(SAGEConv), (x[:, :3], edges), {}, recorder()[1])


def large() -> None:
    """Traces a model whose activations are over 20 GB; prints by how many MB the process grew."""
    trace(Net(SAGEConv), graph(), {}, recorder()[1])  # torch's own imports come first
    torch._dynamo.reset()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = torch.nn.Module()
    model.a, model.b = SAGEConv(256, 256), SAGEConv(256, 256)
    model.norm = torch.nn.BatchNorm1d(256)
    model.forward = lambda x, e: model.b(F.dropout(model.norm(model.a(x, e)).relu(), 0.5), e)
    x = torch.empty(1, 256).expand(5_000_000, 256)
    edges = torch.zeros(2, 1, dtype=torch.int64).expand(2, 20_000_000)
    graphs, backend = recorder()
    trace(model, (x, edges), {}, backend)
    assert "f32[5000000, 256]" in graphs[0][1]
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def test_no_activation_is_allocated():
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1000


if __name__ == "__main__":
    large()
