"""Fused message passing where dtypes mix, indices count from the end, and ops are many: right, or left as it is."""

import pytest
import torch
from torch_geometric.utils import softmax

from tests.helpers import EXACT, step

N, E, WIDTH = 13, 40, 4


def sum_of(message, edge_index, nodes=N):
    return message.new_zeros(nodes, *message.shape[1:]).index_add(0, edge_index[1], message)


def largest_of(message, edge_index):
    index = edge_index[1].view(-1, 1).expand_as(message)
    return message.new_zeros(N, WIDTH).scatter_reduce(0, index, message, "amax", include_self=False)


def rounded_to_float32(x, y, edge_index):
    return largest_of((x[edge_index[0]] / 3).float() * 0.7, edge_index)


def float32_in_between(x, y, edge_index):
    return largest_of((x[edge_index[0]] / 3).float().double() * y[edge_index[1]], edge_index)


def doubled_from_float32(x, y, edge_index):
    return sum_of((x.float()[edge_index[0]] * 0.1).double() * y[edge_index[0]], edge_index)


def extremum_of_own(name, included, start):
    """An extremum that is not fused, of messages that C++ computes in another way than torch."""

    def function(x, y, edge_index):
        message = (x[edge_index[0]] * 0.7).exp().tanh() * y[edge_index[1]]
        index = edge_index[1].view(-1, 1).expand_as(message)
        return message.new_full((N, WIDTH), start).scatter_reduce(0, index, message, name, include_self=included)

    return function


def how_many_are_larger(x, y, edge_index):
    larger = (x[edge_index[0]] > y[edge_index[1]]).sum(-1, keepdim=True)
    return sum_of(x[edge_index[0]].sin() * larger, edge_index)


def how_many_edges_are_larger(x, y, edge_index):
    return x * (x[edge_index[0]] > y[edge_index[1]]).sum(0)


def from_the_end(x, y, edge_index):
    back = edge_index[0] - y.shape[0]
    return sum_of(torch.cat([x, x.sin()])[back] * y[back].tanh(), edge_index)


def of_many_ops(x, y, edge_index):
    message = x[edge_index[0]]
    for _ in range(300):
        message = message + 0.001 * message.sin()
    return sum_of(message, edge_index)


def of_many_ops_on_nodes(x, y, edge_index):
    for _ in range(450):
        x = x + 0.001 * y
    return x.sum(-1)


EXTREMA = [("amax", True, -0.1), ("amin", True, 0.1), ("amax", False, 0.1), ("amin", False, 0.0), ("amax", False, 0.0)]


@pytest.mark.parametrize("name, included, start", EXTREMA)
def test_an_extremum_meets_its_messages_whoever_computes_them(name, included, start):
    torch.manual_seed(0)
    torch._dynamo.reset()
    function = extremum_of_own(name, included, start)
    x, y = (torch.randn(N, WIDTH, requires_grad=True) for _ in range(2))
    inputs = x, y, torch.randint(N, (2, E))
    ours = step(torch.compile(function, backend="actcompile", options=EXACT), inputs, (x, y))
    torch.testing.assert_close(ours, step(function, inputs, (x, y)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        rounded_to_float32,
        float32_in_between,
        doubled_from_float32,
        how_many_are_larger,
        how_many_edges_are_larger,
        from_the_end,
        pytest.param(of_many_ops, marks=pytest.mark.slow),  # half a minute
        of_many_ops_on_nodes,
    ],
)
def test_gradients_are_those_of_eager(function):
    torch.manual_seed(0)
    torch._dynamo.reset()
    x, y = (torch.randn(N, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = x, y, torch.randint(N, (2, E))
    ours = step(torch.compile(function, backend="actcompile", options=EXACT), inputs, (x, y))
    for a, b in zip(ours, step(function, inputs, (x, y)), strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_attention_stays_finite_where_scores_are_large_and_rounded():
    """Rounded apart, a score may be above the largest of its node: e to that power would overflow."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    x = torch.randn(200, 2, requires_grad=True)
    edge_index, steep = torch.randint(200, (2, 1500)), torch.full((2,), 1e5, requires_grad=True)

    def attend(x, steep, edge_index):
        score = (x[edge_index[0]] * x[edge_index[1]]).tanh() * steep
        return sum_of(softmax(score, edge_index[1], num_nodes=200) * x[edge_index[0]], edge_index, 200)

    function = torch.compile(attend, backend="actcompile", options={**EXACT, "bits": 2, "nonlinear_bits": 8})
    ours = step(function, (x, steep, edge_index), (x, steep))
    assert all(t.isfinite().all() for t in ours)
