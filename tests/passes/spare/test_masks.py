"""Masks are exact to the bit whatever is rounded, and merge only where the gradient stays the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actcompile
from actcompile.passes.graph.split import is_tensor
from actcompile.passes.spare.masks import hoist_comparisons, masks, merge_masks
from tests.helpers import FAST, assert_close, assert_equal, gnn, graph, ops, step, uncompressed

torch.manual_seed(0)
X, W, V = torch.randn(64, 16), torch.randn(16, 32), torch.randn(32, 4)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def against_reference(function, transform):
    """Runs with and without a pass; asserts equal gradients; returns the split that the pass worked on."""
    parameters, splits = [W.clone().requires_grad_(), V.clone().requires_grad_()], []

    def note(split):
        transform(split)
        splits.append(split)

    reference = step(uncompressed(function), [X, *parameters], parameters)
    torch._dynamo.reset()
    assert_equal(step(uncompressed(function, note), [X, *parameters], parameters), reference)
    return splits[0]


def saved(split, dtype):
    return [n for n, p in split.pairs if is_tensor(n) and n.meta["val"].dtype == dtype]


def upstream(x, w, v):  # min-cut saves what the sine reads, and recomputes the comparison
    h = (x @ w).sin()
    return torch.where(h > 0.25, h, h.cos()) @ v


def with_tensor(x, w, v):
    h = (x @ w).sin()
    return torch.where(h > torch.linspace(-1, 1, 32), h, h.cos()) @ v


def with_range(x, w, v):
    h = (x @ w).sin()
    return torch.where(h > torch.arange(32) / 16 - 1, h, h.cos()) @ v


def with_literal(x, w, v):
    h = (x @ w).sin()
    return torch.where(h > torch.tensor([0.25] * 32), h, h.cos()) @ v


def absolute(x, w, v):
    h = x @ w
    return (h.abs() * h) @ v


def jump(x, w, v):  # a mask that is used in backward only to recompute a float with a jump
    h = x @ w
    return (torch.where(h > 0, h, h + 10) * h) @ v


def lookup(x, w, v):  # an index made of a float
    h = x @ w
    return (h.sin() * torch.arange(64.0)[(h.sin().abs() * 63).long()].sin()) @ v


COMPARISONS = [upstream, with_tensor, with_range, with_literal, absolute, jump, lookup]


@pytest.mark.parametrize("function", COMPARISONS, ids=lambda f: f.__name__)
def test_what_a_float_decides_is_decided_before_it_is_rounded(function):
    split = against_reference(function, hoist_comparisons)
    rounded = {p for n, p in split.pairs if n.meta["val"].is_floating_point() and n.op != "placeholder"}
    assert rounded
    for node in split.backward.graph.nodes:  # no comparison, and no index, depends on a float that may be rounded
        if node.op == "call_function" and any(n in rounded for n in node.all_input_nodes):
            rounded.add(node)
            assert node.meta["val"].is_floating_point(), node.format_node()


@pytest.mark.parametrize("function", COMPARISONS, ids=lambda f: f.__name__)
def test_gradients_are_near_with_eight_bits(function):
    parameters = [W.clone().requires_grad_(), V.clone().requires_grad_()]
    reference = step(uncompressed(function), [X, *parameters], parameters)
    torch._dynamo.reset()
    options = {**FAST, "bits": 8, "nonlinear_bits": 8}
    ours = step(torch.compile(function, backend=actcompile.backend, options=options), [X, *parameters], parameters)
    assert_close(ours, reference, within=0.1)


def test_relu_s_mask_is_exact_with_two_bits():
    """The gradient that reaches a bias through ReLU alone depends on nothing but the mask."""
    norm, weight = nn.BatchNorm1d(32), W.clone().requires_grad_()
    shift = torch.zeros(32, requires_grad=True)

    def function(x):
        return norm(x @ weight).add(shift).relu()

    options = {**FAST, "nonlinear_bits": 2}
    reference = step(uncompressed(function), [X], [weight, shift])
    torch._dynamo.reset()
    ours = step(torch.compile(function, backend=actcompile.backend, options=options), [X], [weight, shift])
    assert torch.equal(ours[2], reference[2])  # of shift: exact
    assert not torch.equal(ours[1], reference[1])  # of weight: through the rounded input of the norm
    report = actcompile.explain(function, X, options=options)
    assert any(row.codec.startswith("quantize(2") for row in report.graphs[0].rows)


def test_floats_that_stay_decide_in_backward():
    def transform(split):
        before = list(split.pairs)
        hoist_comparisons(split, kept=[p for _, p in split.pairs])
        assert split.pairs == before

    against_reference(upstream, transform)


def relu_dropout(x, w, v):
    return F.dropout((x @ w).relu(), 0.5) @ v


def dropout_relu(x, w, v):
    return F.dropout(x @ w, 0.5).relu() @ v


def norm_relu_dropout(x, w, v):
    return F.dropout(F.layer_norm(x @ w, (32,)).relu(), 0.5) @ v


def leaky_dropout(x, w, v):
    return F.dropout(F.leaky_relu(x @ w), 0.5) @ v


def mask_used_twice(x, w, v):
    h = x @ w
    keep = torch.rand_like(h) > 0.5
    return (h.relu() * keep) @ v + (h.sin() * keep) @ v


def masks_of_other_shapes(x, w, v):
    h = (x @ w).relu()
    return (h * (torch.rand(32) > 0.5)) @ v


def masks_that_are_inputs(x, w, v):
    h = x @ w @ v @ v.t() @ w.t()
    return torch.where(x > 0, 0.0, (x > 0.1) * h)


@pytest.mark.parametrize("function", [relu_dropout, norm_relu_dropout], ids=lambda f: f.__name__)
def test_masks_that_only_act_together_become_one(function):
    split = against_reference(function, masks)
    assert len(saved(split, torch.bool)) == 1
    assert "aten.logical_and.default" in ops(split.forward)


@pytest.mark.parametrize(
    "function", [leaky_dropout, mask_used_twice, masks_of_other_shapes, masks_that_are_inputs], ids=lambda f: f.__name__
)
def test_other_masks_stay_apart(function):
    def transform(split):
        hoist_comparisons(split)
        before = len(saved(split, torch.bool))
        merge_masks(split)
        assert len(saved(split, torch.bool)) == before
        assert "aten.logical_and.default" not in ops(split.forward)

    against_reference(function, transform)


def test_a_mask_before_the_relu_gives_equal_gradients_too():
    against_reference(dropout_relu, masks)


@pytest.mark.parametrize("name", ["sage", "gin", "max_min", "edge_mlp"])
def test_masks_of_models_leave_gradients_equal(name):
    model, inputs = gnn(name), graph()
    reference = step(uncompressed(model), inputs, model.parameters())
    torch._dynamo.reset()
    assert_equal(step(uncompressed(model, masks), inputs, model.parameters()), reference)
