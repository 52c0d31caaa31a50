"""What codecs call on the CPU begins to be compiled with a graph, and not where a graph is only looked at."""

import importlib

import pytest
import torch

import actcompile
from actcompile.kernels import BlockFormat
from tests.helpers import SAVED, gnn, graph, step

module = importlib.import_module("actcompile.passes.write.prepare")


@pytest.fixture
def begun(monkeypatch):
    """What has begun to be compiled: formats with dtypes, and "bits"."""
    found = []
    monkeypatch.setattr(module, "prepare_format", lambda *format_of: found.append(format_of))
    monkeypatch.setattr(module, "prepare_bits", lambda: found.append("bits"))
    torch._dynamo.reset()
    return found


def test_each_format_begins_once_before_it_runs(begun, monkeypatch):
    model, inputs, called = gnn("sage", dropout=0.0), graph(), []
    compiled = importlib.import_module("actcompile.kernels.cpu").compiled
    monkeypatch.setattr(
        "actcompile.kernels.cpu.compiled", lambda fmt, dtype: (called.append((fmt, dtype)), compiled(fmt, dtype))[1]
    )
    step(actcompile.compress(model, **SAVED), inputs, model.parameters())
    assert called and set(called) == set(begun) - {"bits"} and len(begun) == len(set(begun))
    assert all(isinstance(fmt, BlockFormat) and dtype == torch.float32 for fmt, dtype in set(begun) - {"bits"})
    assert "bits" in begun


def test_nothing_begins_where_a_graph_is_explained(begun):
    model, inputs = gnn("sage", dropout=0.0), graph()
    assert actcompile.explain(model, *inputs, options=SAVED).saved_bytes_after
    assert not begun
