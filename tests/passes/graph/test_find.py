"""Every saved activation with its origin, its bytes, and a reason where it can't be compressed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from actcompile.passes.graph.find import dense_order, find
from actcompile.passes.graph.split import is_tensor
from tests.helpers import Mlp, gnn, graph, uncompressed

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def found(function, *inputs, dynamic=None):
    """What `find` lists for a function's only graph."""
    lists = []

    def note(split):
        made = find(split)
        assert [a.node for a in made] == [n for n, _ in split.pairs if is_tensor(n)]
        lists.append(made)

    uncompressed(function, note, dynamic=dynamic)(*inputs)
    return lists[0]


def reasons(activations):
    return {a.refusal.partition(":")[0] for a in activations if a.refusal}


torch.manual_seed(0)
X = torch.randn(64, 16)
W, V = torch.randn(16, 32, requires_grad=True), torch.randn(32, 4, requires_grad=True)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w, v: x @ w, "a view of an input, parameter or buffer"),
        (lambda x, w, v: (x * w.sum()).sum(), "an input, parameter or buffer"),
        (lambda x, w, v: (x @ w).exp(), "the model returns it, or a view of it"),
        (lambda x, w, v: (x @ w).exp().t(), "the model returns it, or a view of it"),
        (lambda x, w, v: (x @ w).double().sin() @ v.double(), "dtype torch.float64 is not handled"),
        (
            lambda x, w, v: (torch.fft.fft(x.double() @ w.double()) ** 2).abs().sum(),
            "dtype torch.complex128 is not handled",
        ),
    ],
)
def test_refusal(function, reason):
    assert reason in reasons(found(function, X, W, V))


def test_a_cast_of_a_parameter_is_refused_and_one_of_the_data_is_not():
    model = Mlp(dropout=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        made = found(model, X)
    refused = [a for a in made if a.refusal and "in another dtype" in a.refusal]
    assert [tuple(sorted(a.value.shape)) for a in refused] == [(4, 32)]
    assert any(a.value.shape == X.shape and a.refusal is None for a in made)


def test_memory_that_two_share_is_counted_once_and_divided():
    def function(x, w, edges):
        h, edges = x @ w, torch.cat([edges, edges.flip(0)], 1)
        return h.exp().index_select(0, edges[0]) * h.index_select(0, edges[1])

    made = [a for a in found(function, X, W, graph()[1]) if a.value.dtype == torch.int64]
    assert [a.value.shape for a in made] == [(512,), (512,)]
    assert [a.nbytes for a in made] == [512 * 8, 512 * 8]  # both rows of one tensor
    assert {a.refusal for a in made} == {None}


def test_a_piece_is_counted_with_all_the_memory_that_it_keeps():
    made = [a for a in found(lambda x, w, v: (x @ w)[:, :4].exp() @ v[:4], X, W, V) if a.refusal is None]
    assert [(tuple(a.value.shape), a.nbytes) for a in made] == [((64, 4), 64 * 4 * 4)]
    made = [a for a in found(lambda x, w, v: (x @ w).sin()[:, ::8] @ v[:4], X, W, V) if a.value.numel() == 64 * 4]
    assert [(a.refusal, a.nbytes) for a in made] == [(None, 64 * 32 * 4)]


def test_origin():
    model = nn.Sequential(nn.Linear(16, 32), nn.Sequential(nn.ReLU(), nn.Linear(32, 4)), nn.Softmax(1))
    made = {a.op: a for a in found(lambda x: model(x).log(), X)}
    assert {a.module for a in made.values()} <= {
        "",
        "0",
        "1.0",
        "1.1",
        "2",
        "model.0",
        "model.1.0",
        "model.1.1",
        "model.2",
    }
    assert all(a.source == "" or a.source.startswith("test_find.py") for a in made.values())
    assert any(a.source.endswith("model(x).log(), X)}") for a in made.values())


def test_origin_in_a_model_of_library_layers():
    made = [a for a in found(gnn(), *graph()) if a.refusal is None]
    by_module = {a.module.partition(".aggr")[0] for a in made}
    assert {"convs.0", "convs.1", "norms.0", "dropout"} <= by_module
    named = dict(gnn().named_modules())
    assert all(a.module in named for a in made)
    for a in made:
        assert a.source.startswith("models.py:") and ("convs" in a.source)
        assert a.uses and a.op.startswith(("aten.", "prims.", "actcompile.random_mask", "<built-in"))


def test_bytes_are_those_of_memory():
    made = found(gnn(), *graph())
    for a in made:
        expected = a.value.numel() * a.value.dtype.itemsize
        assert a.nbytes in (0, expected)
        assert (a.nbytes == 0) == (a.refusal is not None and "alive anyway" in a.refusal)


def test_an_index_is_bounded_by_what_it_indexes():
    def function(x, w, v):
        h, index = x @ w, (x[:, 0] * 3).long().abs() + 5
        return h.index_select(0, index).exp() @ v, F.embedding(index, h)

    bounds = {a.op: a.bound for a in found(function, X, W, V) if a.value.dtype == torch.int64}
    assert set(bounds.values()) == {64}


def test_symbolic_sizes_stay_symbolic():
    made = found(gnn(), *graph(), dynamic=True)
    assert any(isinstance(s, torch.SymInt) for a in made for s in a.value.shape)
    assert all(isinstance(a.nbytes, int) and isinstance(a.numel, int) for a in made)
    assert {a.nbytes for a in made} == {a.nbytes for a in found(gnn(), *graph())}


@pytest.mark.parametrize(
    ("value", "order"),
    [
        (torch.empty(3, 4, 5), [0, 1, 2]),
        (torch.empty(3, 4, 5).permute(2, 0, 1), [1, 2, 0]),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), [0, 2, 3, 1]),
        (torch.empty(4, 1).t(), None),
        (torch.empty(5, 8)[:, ::2], "gaps"),
        (torch.empty(5, 8)[:, :4], "gaps"),
        (torch.empty(5, 1).expand(5, 4), "gaps"),
        (torch.empty(8).as_strided((3, 4), (1, 1)), "gaps"),
        (torch.empty(()), []),
    ],
)
def test_dense_order(value, order):
    made = dense_order(value)
    if order == "gaps":
        assert made is None
    else:
        assert order is None or made == order
        assert value.permute(made).is_contiguous()
