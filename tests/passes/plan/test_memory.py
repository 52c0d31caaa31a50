"""Predicted live bytes of a step against those that a run really holds, op by op."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import actcompile
from actcompile.passes.graph import _torch
from bench.measure import peak_of_tensors
from bench.models import build

MODELS = ("sage", "gcn", "gat", "gin", "sage_max", "edge_mlp")


class Live(TorchDispatchMode):
    """The largest sum of storages that were made inside and are alive, after any op."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (memory := tensor.untyped_storage()).data_ptr() not in given:
                self.storages[memory.data_ptr()] = (_torch.StorageWeakRef(memory), memory.nbytes())
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.storages.values()))
        return out


EXACT = {"bits": None, "nonlinear_bits": None}
CASES = [("gcn", {}), ("gat", {}), ("sage_max", EXACT), ("edge_mlp", {"fuse": False})]
CASES += [pytest.param(n, c, marks=pytest.mark.slow) for n in MODELS for c in ({}, EXACT, {"fuse": False})]


@pytest.mark.parametrize(("name", "config"), CASES, ids=str)
def test_peak_is_what_a_run_holds(name, config, monkeypatch):
    live, compiler = Live(), _torch.boxed_nop

    def watched(graph, inputs):
        run = compiler(graph, inputs)

        def inside(args):
            with live:  # around the compiled code alone: Dynamo would not run it inside of a mode
                return run(args)

        inside._boxed_call = True
        return inside

    monkeypatch.setattr(_torch, "boxed_nop", watched)
    torch.manual_seed(0)
    nodes, edges = 600, 4000
    x, edge_index = torch.randn(nodes, 32), torch.randint(nodes, (2, edges))
    model = actcompile.compress(build(name, 32, 16, hidden=64, layers=3), inner="aot_eager", min_bytes=0, **config)
    model(x, edge_index).sum().backward()
    model.zero_grad()
    live.peak = 0
    logits = model(x, edge_index)
    logits.sum().backward()
    (graph,) = actcompile.explain(model).graphs
    made = [row for row in graph.memory_after.rows if not row.name.startswith("tangents")]  # these are made outside
    assert live.peak == pytest.approx(replace(graph.memory_after, rows=tuple(made)).peak, rel=0.002)


@pytest.mark.parametrize("name", ["sage_max", pytest.param("gat", marks=pytest.mark.slow)])
def test_with_inductor_the_peak_is_near_what_torch_allocates(name):
    """Which results become tensors, and in which order, is Inductor's choice: the prediction follows its rules."""
    torch.manual_seed(0)
    nodes, edges = 20_000, 60_000
    x, edge_index = torch.randn(nodes, 32), torch.randint(nodes, (2, edges))
    model = actcompile.compress(build(name, 32, 16, hidden=64, layers=3))

    def run():
        model(x, edge_index).sum().backward()

    run()
    model.zero_grad()
    (graph,) = actcompile.explain(model).graphs
    assert peak_of_tensors(run) == pytest.approx(graph.memory_after.peak, rel=0.1)
