"""Infinities that a model makes on purpose leave gradients finite; NaN and overflow reach whoever looks for them."""

import copy

import pytest
import torch
from torch import nn

import actcompile
from tests.helpers import SAVED

N = 500


class Made(nn.Module):
    """A linear layer or attention, and a function of it and the inputs."""

    def __init__(self, part, function):
        super().__init__()
        torch.manual_seed(0)
        self.part, self.function = part(), function

    def forward(self, *inputs):
        return self.function(self.part, *inputs)


def linear():
    return nn.Linear(32, 32)


def empty_maximum(part, x, e):
    h = part(x)
    m = h.new_full(h.shape, -float("inf")).scatter_reduce(0, e[1][:, None].expand(-1, 32), h[e[0]], "amax")
    return torch.where(m.isinf(), 0.0, m).sin()


def masked_logsumexp(part, x, mask):
    return part(x).masked_fill(mask, -float("inf")).logsumexp(-1)


def quotient_behind_where(part, x, mask):
    h = part(x)
    inverse = 1 / h.masked_fill(mask, 0.0)
    return torch.where(mask, h, inverse.clamp(-5, 5).tanh())


def masked_attention(part, h, pad):
    return part(h, h, h, key_padding_mask=pad, need_weights=False)[0]


def cases():
    g = torch.Generator().manual_seed(1)
    x, e = torch.randn(N, 32, generator=g), torch.randint(0, N, (2, 3 * N // 2), generator=g)
    mask = torch.rand(N, 32, generator=g) < 0.3
    mask[:, 0] = False
    pad = torch.arange(34)[None, :] >= torch.randint(5, 35, (16, 1), generator=g)
    attention = lambda: nn.MultiheadAttention(64, 4, batch_first=True)  # noqa: E731
    return {
        "a maximum over no edges": (Made(linear, empty_maximum), x, e),
        "masked logsumexp": (Made(linear, masked_logsumexp), x, mask),
        "a quotient behind where": (Made(linear, quotient_behind_where), x, mask),
        "masked attention": (Made(attention, masked_attention), torch.randn(16, 34, 64, generator=g), pad),
    }


def gradients(function, model, inputs):
    model.zero_grad()
    function(*inputs).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"nonlinear_bits": 8}, {"nonlinear_bits": 2}], ids=str)
@pytest.mark.parametrize("name", cases())
def test_gradients_are_finite_where_those_of_eager_are(name, options):
    model, *inputs = cases()[name]
    exact = gradients(model, model, inputs)
    assert all(g.isfinite().all() for g in exact.values()) or name == "a quotient behind where"
    torch._dynamo.reset()
    ours = copy.deepcopy(model)
    found = gradients(actcompile.compress(ours, **{**SAVED, **options}), ours, inputs)
    for key, gradient in exact.items():
        assert torch.equal(found[key].isfinite(), gradient.isfinite()), key


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_by_mistake_still_shows(value):
    """A gradient scaler skips the step, as it does without compression."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    step = actcompile.compress(model, **SAVED)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    x = torch.randn(64, 16)
    x[3, 2] = value
    before = [p.clone() for p in model.parameters()]
    scaler.scale(step(x).square().mean()).backward()
    scaler.step(optimiser)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 8.0
