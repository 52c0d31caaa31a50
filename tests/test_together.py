"""Inductor's C++ kernels of a graph, compiled together: few sources, the same kernels, for our backends alone."""

import copy
import os
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import actcompile
from actcompile import together
from actcompile.together import compile_together, get_compile_threads, joined, shared_out
from tests.helpers import EXACT, assert_close, step, uncompressed

INDUCTOR = {**EXACT, "inner": "inductor"}

SCALED = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(const float* in_ptr0, float* out_ptr0, const int64_t ks0, const double ks1)
{
    for (int64_t i = 0; i < ks0; i++) out_ptr0[i] = static_cast<float>(in_ptr0[i] * ks1);
}
"""
HELPED = """
#include <torch/csrc/inductor/cpp_prefix.h>
#include <stdexcept>
static float next(float x) { return x + 1; }
extern "C" void kernel(float* in_out_ptr0)
{
    if (in_out_ptr0[0] < 0) throw std::runtime_error("kernel: below zero");
    in_out_ptr0[0] = next(in_out_ptr0[0]);
}
"""


@pytest.fixture
def sources(monkeypatch):
    """How many kernels each source has that is compiled, or found compiled, inside the test."""
    made = []

    def noted(parts):
        made.append(len(parts))
        return joined(parts)

    monkeypatch.setattr(together, "joined", noted)
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 8))
def test_sources_are_shared_out_evenly(lengths, parts):
    texts = ["x" * length for length in lengths]
    found = shared_out(texts, parts)
    assert sorted(i for part in found for i in part) == list(range(len(texts)))
    assert len(found) == min(parts, len(texts)) and all(part == sorted(part) for part in found)
    loads = [sum(lengths[i] for i in part) for part in found]
    assert not loads or max(loads) - min(loads) <= max(lengths)


@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_that_are_compiled_together_are_those_of_their_sources(threads, sources, monkeypatch):
    texts = [SCALED, HELPED, HELPED.replace("x + 1", "x + 2")]
    with mock.patch.dict(get_compile_threads.__globals__, get_compile_threads=lambda: threads):  # Inductor asks it, too
        monkeypatch.setattr(together, "get_compile_threads", lambda: threads)
        scaled, helped, again = compile_together(texts)
    assert sorted(sources) == ([3] if threads == 1 else [1, 2])
    x, out = torch.randn(5), torch.full((6,), 7.0)
    scaled(x, out, 5, 0.5)
    assert torch.equal(out[:5], x * 0.5) and out[5] == 7
    for kernel, more in ((helped, 1), (again, 2)):
        y = torch.ones(1)
        kernel(y)
        assert y == 1 + more
        with pytest.raises(RuntimeError, match="below zero"):
            kernel(torch.tensor([-1.0]))
        with pytest.raises(RuntimeError, match="wrong number of arguments"):
            kernel(y, y)
    with pytest.raises(RuntimeError, match="expected a number"):
        scaled(x, out, "5", 0.5)
    with pytest.raises(RuntimeError):
        scaled(None, out, 5, 0.5)


class Layers(torch.nn.Module):
    """Every source that is compiled for it takes seconds: torch's headers are large."""

    def __init__(self, *widths):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(i, o) for i, o in zip(widths, widths[1:], strict=False))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).sin()
        return x


def test_forward_and_backward_are_compiled_together_and_other_models_are_not(sources, monkeypatch):
    monkeypatch.setattr(together, "get_compile_threads", lambda: 2)
    model, x, plain = Layers(16, 24, 32, 8), torch.randn(33, 16), Layers(16, 8)
    exact = step(plain, [x], plain.parameters())
    assert_close(step(torch.compile(plain), [x], plain.parameters()), exact, 1e-5)
    assert not sources
    reference = step(uncompressed(model), [x], model.parameters())
    assert_close(step(actcompile.compress(model, **INDUCTOR), [x], model.parameters()), reference, 1e-5)
    assert len(sources) == 4 and sum(sources) > 4  # two for forward, two for backward


def test_what_does_not_compile_together_is_compiled_one_by_one(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(together, "joined", lambda sources: "no C++")
    torch._dynamo.reset()
    model, x = Layers(16, 24, 8), torch.randn(35, 16)
    reference = step(uncompressed(model), [x], model.parameters())
    with caplog.at_level("WARNING"):
        assert_close(step(actcompile.compress(model, **INDUCTOR), [x], model.parameters()), reference, 1e-5)
    assert "one by one" in caplog.text


def test_what_is_found_compiled_is_found_together(sources, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = Layers(16, 24, 8), torch.randn(34, 16)
    files = []
    for _ in range(2):
        compressed = copy.deepcopy(model)
        step(actcompile.compress(compressed, **INDUCTOR), [x], compressed.parameters())
        torch._dynamo.reset()
        files.append(sorted(path.name for path in tmp_path.rglob("*.main.so")))
    assert files[0] and files[0] == files[1]
    assert sources[: len(sources) // 2] == sources[len(sources) // 2 :]
