"""Dropout that is hashed: as frequent as torch's, repeatable, the same in backward, and saved only where that is free.

The z-tests have fixed seeds; on new ones each would raise a false alarm in one of a million runs (ALARM).
"""

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn import GATConv

import actcompile
from actcompile import compress, explain
from actcompile.passes.graph import _torch
from actcompile.passes.graph.split import is_tensor
from tests.helpers import EXACT, FAST, SAVED, assert_equal, count, gnn, graph, ops, quickly, step, uncompressed

ALARM = 1e-6
X = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(function, **options):
    return torch.compile(function, backend=actcompile.backend, options={**FAST, **options})


def splits(function, *inputs, transform=lambda split: None, **options):
    made = []

    def note(split):
        transform(split)
        made.append(split)

    uncompressed(function, note, **options)(*inputs)
    return made[0]


def frequent(mask, probability):
    z = (mask.double().mean() - probability) / (probability * (1 - probability) / mask.numel()) ** 0.5
    return abs(float(z)) < norm.isf(ALARM / 2)


def alpha(x):  # of 1: 1 * a + b where it is kept
    return F.alpha_dropout(x, 0.3, True)


KINDS = {
    "dropout": (lambda x: F.dropout(x, 0.3), 0.7),
    "bfloat16": (lambda x: F.dropout(x.bfloat16(), 0.3).float(), 0.7),
    "float64": (lambda x: F.dropout(x.double(), 0.3).float(), 0.7),
    "rand below": (lambda x: x * (torch.rand_like(x) < 0.2), 0.2),
    "rand above": (lambda x: torch.where(torch.rand(x.shape) >= 0.2, x, 0.0), 0.8),
    "bernoulli": (lambda x: x * torch.bernoulli(torch.full_like(x, 0.4)), 0.4),
    "bernoulli_": (lambda x: x * torch.empty_like(x).bernoulli_(0.4), 0.4),
    "bernoulli of x": (lambda x: x * torch.bernoulli(x.detach(), 0.4), 0.4),
    "feature": (lambda x: F.dropout1d(x[:, :, None].expand(-1, -1, 3), 0.3), 0.7),
}


@pytest.mark.parametrize(
    ("kind", "dynamic"), [*((k, None) for k in KINDS), *((k, True) for k in ("dropout", "bernoulli of x", "feature"))]
)
def test_every_kind_is_hashed_and_as_frequent_as_it_should_be(kind, dynamic):
    function, probability = KINDS[kind]
    x = torch.ones(256, 64, requires_grad=True)
    split = splits(function, x, dynamic=dynamic)
    assert count(split.forward, "random_mask") == 1 and not {"rand", "bernoulli"} & names(split.forward)
    torch._dynamo.reset()
    out = torch.compile(function, backend=actcompile.backend, options=FAST, dynamic=dynamic)(x)
    kept = out != 0
    assert frequent(kept[..., 0] if kept.dim() == 3 else kept, probability)
    assert out[kept].unique().numel() == 1
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, out if out.dim() == 2 else out.sum(-1))  # at 1, the output is the mask times the scale


def names(gm):
    return {op.split(".")[1] for op in ops(gm)}


def test_alpha_dropout():
    x = torch.ones(256, 64, requires_grad=True)
    out = compiled(alpha)(x)
    low, high = out.unique().tolist()
    kept = (out - high).abs() < 1e-3
    assert low != high and frequent(kept, 0.7)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.unique().tolist() == pytest.approx([0.0, 0.8609526])
    assert torch.equal(gradient != 0, kept)


KEPT = {
    "numbers that are used": lambda x: x * torch.rand_like(x),
    "numbers used and compared": lambda x: x * (u := torch.rand_like(x)) * (u > 0.5),
    "certain": lambda x: x * (torch.rand_like(x) < 1.0),
    "another distribution": lambda x: x * (torch.randn_like(x) > 0.5),
    "compared with a tensor": lambda x: x * (torch.rand_like(x) < x),
    "compared in more dimensions": lambda x: x * (torch.rand(64) < torch.full((256, 64), 0.5)),
    "probabilities": lambda x: x * torch.bernoulli(x.detach().sigmoid()),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_not_compared_with_a_number_alone_is_torch_s(kind):
    x = X.clone().requires_grad_()
    split = splits(KEPT[kind], x)
    assert "random_mask" not in names(split.forward) and "draw_seed" not in names(split.forward)
    reference = step(torch.compile(KEPT[kind], backend="aot_eager_decomp_partition"), [x], [x])
    torch._dynamo.reset()
    assert_equal(step(compiled(KEPT[kind], **EXACT), [x], [x]), reference)


def test_numbers_that_only_backward_draws_differ_in_a_second_backward():
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (torch.rand_like(gradient) < 0.5)

    x = X.clone().requires_grad_()
    out = compiled(lambda x: F.dropout(Noisy.apply(x), 0.01))(x).sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_two_comparisons_of_the_same_numbers_fit_together():
    def function(x):
        u = torch.rand_like(x)
        return torch.where(u < 0.3, x, 0.0) + torch.where(u > 0.7, 2 * x, 0.0) + torch.where(u < 0.5, 4 * x, 0.0)

    out = compiled(function)(torch.ones_like(X).requires_grad_())
    shares = {int(v): float((out == v).double().mean()) for v in out.unique()}
    assert sorted(shares) == [0, 2, 4, 5]
    assert all(frequent(out == v, p) for v, p in ((0, 0.2), (2, 0.3), (4, 0.2), (5, 0.3)))


def two(x):
    return F.dropout(x, 0.5) + 10 * F.dropout(x, 0.5)


def test_manual_seed_repeats_and_calls_and_dropouts_are_independent():
    x = torch.ones_like(X).requires_grad_()
    function = compiled(two)
    torch.manual_seed(3)
    first, second = function(x), function(x)
    torch.manual_seed(3)
    assert torch.equal(function(x), first) and torch.equal(function(x), second)
    masks = [m for out in (first, second) for m in ((out % 20) > 1, out > 15)]
    for i, a in enumerate(masks):
        assert frequent(a, 0.5) and all(frequent(a ^ b, 0.5) for b in masks[:i])


def test_bits_of_rounding_do_not_change_what_is_dropped():
    model, inputs = gnn(dropout=0.5, norm=False), graph()
    parameters = list(model.parameters())
    plain = {"fuse": False}  # fused, the last layer's sums depend on what is saved
    exact = step(torch.compile(model, backend=actcompile.backend, options=EXACT | plain), inputs, parameters)
    torch._dynamo.reset()
    rounded = step(torch.compile(model, backend=actcompile.backend, options=SAVED | plain), inputs, parameters)
    assert torch.equal(rounded[0], exact[0])


def test_off_it_is_torch_s_own():
    model, inputs = gnn("sage", dropout=0.5), graph()
    parameters = list(model.parameters())
    reference = step(torch.compile(model, backend="aot_eager_decomp_partition"), inputs, parameters)
    torch._dynamo.reset()
    ours = torch.compile(model, backend=actcompile.backend, options={**EXACT, "fast_dropout": False})
    assert_equal(step(ours, inputs, parameters), reference)


def test_inductor_set_to_eager_s_numbers_gets_them():
    x = X.clone().requires_grad_()
    with _torch.inductor_config.patch(fallback_random=True):
        assert_equal(step(compiled(two, **EXACT), [x], [x]), step(two, [x], [x]))


@pytest.mark.parametrize("options", [{"replay": 0}, {"replay": 1, "rebuild": False}])
@pytest.mark.parametrize("name", ["sage", "gat"])
def test_gradients_are_those_of_masks_that_are_kept(name, options):
    model, inputs = gnn(name, dropout=0.5, layers=3), graph()
    reference = step(uncompressed(model), inputs, model.parameters())
    torch._dynamo.reset()
    ours = compress(model, **EXACT, **options, fuse=False)  # fused sums add in another order
    assert_equal(step(ours, inputs, model.parameters()), reference)


class Attention(nn.Module):
    """Dropout of features, of attention, and behind an ELU: no mask of a ReLU's beside any of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (GATConv(32, w, heads=h, dropout=0.6, add_self_loops=False) for w, h in ((8, 4), (4, 1)))

    def forward(self, x, edges):
        x = F.elu(self.a(F.dropout(x, 0.5, self.training), edges))
        return self.b(F.dropout(x, 0.5, self.training), edges)


@pytest.mark.parametrize("dynamic", [None, True])
def test_masks_that_stand_alone_are_not_saved(dynamic):
    inputs = graph(nodes=256, edges=1024, features=32)
    torn, made = (
        explain(Attention(), *inputs, dynamic=dynamic, options={**FAST, "fast_dropout": f}) for f in (False, True)
    )
    rows = [r for g in made.graphs for r in g.rows if "random_mask" in r.op]
    assert len(rows) == 3 and {r.codec for r in rows} == {"recompute"} and not any(r.bytes_after for r in rows)
    (seeds,) = [r for g in made.graphs for r in g.rows if "draw_seed" in r.op]
    assert seeds.bytes_after == 4 * 8 and "seeds of dropout" in seeds.reason
    assert made.saved_bytes_before == torn.saved_bytes_before and made.saved_bytes_after < 0.9 * torn.saved_bytes_after
    model = Attention()
    reference = step(uncompressed(model, dynamic=dynamic), inputs, model.parameters())
    torch._dynamo.reset()
    ours = compress(model, dynamic=dynamic, **EXACT, fuse=False)
    assert_equal(step(ours, inputs, model.parameters()), reference)


def test_a_mask_that_is_merged_with_relu_s_is_saved_once_and_its_seed_is_not():
    inputs = graph(nodes=256, edges=1024)
    torn, made = (
        explain(gnn(layers=3, dropout=0.5), *inputs, options={**SAVED, "fast_dropout": f}) for f in (False, True)
    )
    assert made.saved_bytes_after == torn.saved_bytes_after
    assert not any("draw_seed" in r.op for g in made.graphs for r in g.rows)


def test_dropout_of_inputs_is_replayed_exactly():
    model, inputs = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 4)), (X,)
    report = explain(model, *inputs, options={**FAST, "replay": 1})
    assert [r.codec for g in report.graphs for r in g.rows if r.module == "0" and r.bytes_before] == ["recompute"]
    parameters = list(model.parameters())
    reference = step(uncompressed(model), inputs, parameters)
    torch._dynamo.reset()
    ours = step(compress(model, **FAST, replay=1), inputs, parameters)
    assert torch.equal(ours[1], reference[1])  # the first weight's gradient


@pytest.mark.parametrize("rule", [actcompile.keep(), actcompile.lossless()])
def test_a_rule_that_keeps_a_module_s_activations_keeps_its_mask(rule):
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Dropout(), nn.Linear(32, 4))
    report = explain(model, X, options={**FAST, "rules": {"2": rule}})
    (row,) = [r for g in report.graphs for r in g.rows if "random_mask" in r.op]
    assert row.codec == ("keep" if rule == actcompile.keep() else "recompute")


@pytest.mark.parametrize("inside", [True, False])
def test_checkpointed_regions_drop_the_same_when_they_are_computed_again(inside):
    first, last = nn.Linear(64, 64), nn.Linear(64, 64)

    def region(x):
        return F.dropout(first(x).tanh(), 0.5)

    def function(x):
        return last(checkpoint(region, x, use_reentrant=False)).sum(0) if inside else last(region(x)).sum(0)

    parameters = [*first.parameters(), *last.parameters()]
    plain = step(uncompressed(lambda x: last(region(x)).sum(0)), [X], parameters)
    torch._dynamo.reset()
    call = compiled(function, **EXACT)
    ours = step(call if inside else lambda x: checkpoint(call, x, use_reentrant=False), [X], parameters)
    assert_equal(ours, plain)


def test_masks_of_checkpointed_regions_are_not_saved():
    layer = nn.Linear(64, 64)

    def function(x):
        return checkpoint(lambda x: F.dropout(layer(x).tanh(), 0.5), x, use_reentrant=False).sin()

    split = splits(function, X)
    assert count(split.backward, "random_mask") == 1
    assert not any(n.meta["val"].dtype is torch.bool for n, _ in split.pairs if is_tensor(n))


def test_the_option_is_a_bool():
    with pytest.raises(TypeError, match="fast_dropout must be True or False, got 1"):
        actcompile.Config(fast_dropout=1)


@pytest.mark.parametrize("name", quickly(["sage", "gat"], ["gat"]))
def test_with_inductor(name):
    """It drops what the same graphs drop without it."""
    model, inputs = gnn(name, dropout=0.5, norm=False), graph()
    parameters = list(model.parameters())
    outputs = []
    for inner in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        outputs.append(step(compress(model, **{**EXACT, "inner": inner}), inputs, parameters))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
