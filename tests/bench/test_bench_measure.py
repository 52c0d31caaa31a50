"""Saved bytes are exact, for eager and compiled graphs alike; the peak is that of the step alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from bench.measure import peak_of_tensors, relative_error, saved_bytes, saved_tensors
from bench.variants import with_row_hooks


def test_eager_graph_to_the_byte() -> None:
    weight = torch.randn(8, 16, requires_grad=True)
    x = torch.randn(32, 8)
    out = (x @ weight).relu().square().sum()
    # relu keeps its result, and square keeps the same storage; the product keeps only inputs.
    assert saved_bytes(out, [x, weight]) == 32 * 16 * 4
    assert saved_bytes(out) == 32 * 16 * 4 + 32 * 8 * 4
    assert [tuple(t.shape) for t in saved_tensors(out, [x, weight])] == [(32, 16)]


def test_views_of_one_storage_count_once_and_whole() -> None:
    weight = torch.randn(10, requires_grad=True)
    base = torch.randn(10) + 0
    out = (weight[:4] * base[:4]).sum() + (weight[4:] * base[4:]).sum()
    assert saved_bytes(out, [weight]) == 40


def test_nothing_is_saved_without_gradients() -> None:
    with torch.no_grad():
        assert saved_bytes(nn.Linear(4, 4)(torch.randn(2, 4))) == 0


def test_compiled_graph_to_the_byte() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 16))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight).exp().sum(1)

    model, x = Product(), torch.randn(32, 8)
    out = torch.compile(model, backend="aot_eager")(x)
    assert saved_bytes(out, [x, *model.parameters()]) == 32 * 16 * 4  # exp's result
    out.sum().backward()


def test_two_compiled_graphs_and_eager_between_them_add_up() -> None:
    weight = torch.randn(32, requires_grad=True)
    part = torch.compile(lambda v: v.exp() * v.sin(), backend="aot_eager")
    first = part(weight)
    between = first.tanh()
    out = part(between)
    single = saved_bytes(first, [weight])
    assert single > 0
    # The second graph also keeps its input, which is tanh's result and counts once.
    assert saved_bytes(out, [weight]) == 2 * single + 32 * 4


def test_peak_is_what_the_step_allocates() -> None:
    # In a process of its own: the resident set of this one depends on the tests that ran before.
    program = (
        "import torch\n"
        "from bench.measure import Unmeasurable, peak_memory\n"
        "held = torch.ones(5_000_000)\n"
        "try:\n"
        "    print(peak_memory(lambda: torch.ones(50_000_000).sum()), peak_memory(lambda: held.sum()))\n"
        "except Unmeasurable as reason:\n"
        "    print('skip', reason)\n"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    if output[0] == "skip":
        pytest.skip(" ".join(output[1:]))
    large, small = map(int, output)
    assert 199_000_000 < large < 215_000_000
    assert small < 10_000_000


def test_relative_error() -> None:
    exact = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert relative_error(exact, exact) == 0
    assert relative_error([torch.tensor([3.0, 3.0]), torch.tensor([[0.0]])], exact) == pytest.approx(1.0)


def test_saved_tensor_hooks_baseline_keeps_a_quarter() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), torch.randn(256, 64)
    alive = [x, *model.parameters()]
    exact = model(x)
    exact.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    out = with_row_hooks(torch.compile(model, backend="aot_eager"))(x)
    kept = saved_bytes(out, alive)
    out.square().sum().backward()
    error = relative_error([p.grad for p in model.parameters() if p.grad is not None], gradients)
    assert kept < 0.3 * saved_bytes(model(x), alive)
    assert 0 < error < 0.05


def test_the_peak_of_tensors_is_of_what_is_alive_at_once() -> None:
    def step() -> torch.Tensor:
        first = torch.ones(1_000_000)
        second = first + 1  # 8 MB
        del first
        return second * 2  # 8 MB again

    assert 8_000_000 <= peak_of_tensors(step) <= 8_100_000
    assert 8_000_000 <= peak_of_tensors(step) <= 8_100_000  # nothing is left of the first call
