"""What `bias` claims of each saved activation, against the mean gradient when that one alone is rounded.

Models are random: products, gates, quotients, norms, residual sums, attention and message passing, in any order. The
backward graph runs in float64; each element of the source moves by its own standard deviation, up or down alike. Every
draw is taken with both signs, so that what is linear in the noise cancels and the bias stands out.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from actcompile.passes.graph.bias import bias
from tests.passes.graph.test_bias import backward_of_module, floats, placeholders

ROWS, EDGES, WIDTH, PAIRS = 300, 900, 6, 30

JOIN = {
    "sum": lambda s, a, b: a + b,
    "product": lambda s, a, b: a * b,
    "gate": lambda s, a, b: a * b.sigmoid(),
    "quotient": lambda s, a, b: a / (F.softplus(b) + 0.5),
    "attention": lambda s, a, b: torch.softmax((a * b).sum(-1, keepdim=True) * 0.3 + a, -1) * b,
}
STEP = {
    "linear": lambda s, i, a, e: s.linear[i](a),
    "batch": lambda s, i, a, e: s.batch[i](a),
    "layer": lambda s, i, a, e: s.layer[i](a),
    "standardise": lambda s, i, a, e: (a - a.mean(0)) / (a.var(0) + 0.1).sqrt(),
    "silu": lambda s, i, a, e: F.silu(a),
    "relu": lambda s, i, a, e: a.relu(),
    "neighbours": lambda s, i, a, e: torch.zeros_like(a).index_add(0, e[1], a[e[0]]) / 3,
}


class Tangle(nn.Module):
    """Every step takes the latest value; every join takes the latest and an earlier one."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.first = nn.Linear(WIDTH, WIDTH)
        self.linear, self.batch, self.layer = (
            nn.ModuleList(make(*size) for _ in steps)
            for make, size in ((nn.Linear, (WIDTH, WIDTH)), (nn.BatchNorm1d, (WIDTH,)), (nn.LayerNorm, (WIDTH,)))
        )

    def forward(self, x, edges):
        values = [x, self.first(x)]
        for i, (kind, back) in enumerate(self.steps):
            latest = values[-1]
            if kind in JOIN:
                values.append(JOIN[kind](self, latest, values[max(0, len(values) - 1 - back)]))
            else:
                values.append(STEP[kind](self, i, latest, edges))
        return self.linear[0](values[-1])


@functools.lru_cache(maxsize=32)
def backward_of(steps, seed=0):
    torch.manual_seed(seed)
    model = Tangle(steps).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.5, std=0.5)
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    return backward_of_module(model, x, torch.randint(ROWS, (2, EDGES)))


def off(module, arguments, source, seed):
    """How far the mean gradients are off, relative to each or to 5 % of all, whichever is more; and the noise in it."""
    place = placeholders(module).index(source)
    generator = torch.Generator().manual_seed(seed)
    value = arguments[place]
    scale = value.std() if value.numel() > 1 else value.abs()
    exact = [out for out in module(*arguments) if out is not None]
    norms = [out.norm() for out in exact]
    least = 0.05 * torch.stack(norms).norm()
    moved = []
    for _ in range(PAIRS):
        step = scale * (2 * torch.randint(0, 2, value.shape, generator=generator).double() - 1)
        ends = [
            [out for out in module(*arguments[:place], value + sign * step, *arguments[place + 1 :]) if out is not None]
            for sign in (-1, 1)
        ]
        moved.append([(low + high) / 2 - out for low, high, out in zip(*ends, exact, strict=True)])
    worst = noise = 0.0
    for bends, norm in zip(zip(*moved, strict=True), norms, strict=True):
        stacked = torch.stack(bends)
        size = torch.maximum(norm, least)
        variance = stacked.var(0).sum() / PAIRS
        bent = ((stacked.mean(0).square().sum() - variance).clamp_min(0).sqrt() / size).item()
        worst, noise = max(worst, bent), max(noise, (variance.sqrt() / size).item())
    return worst, noise


steps = st.lists(st.tuples(st.sampled_from([*JOIN, *STEP]), st.integers(1, 3)), min_size=2, max_size=6).map(tuple)


@settings(max_examples=8, deadline=None)
@given(steps=steps, seed=st.integers(0, 2**31))
def test_a_bias_is_no_larger_than_claimed(steps, seed):
    """With noise as large as the values, a bias "over n" is a few n-ths of the gradient, and "none" is none."""
    module, arguments = backward_of(steps, seed)
    rows = [n for n in floats(module) if n.meta["val"].shape == (ROWS, WIDTH) and not n.name.startswith("tangents")]
    for source, found in bias(module.graph, rows).items():
        if found.averaged_over == 1:
            continue  # anything may be
        bent, noise = off(module, arguments, source, seed)
        limit = 10 / found.averaged_over if found.biased else 1e-10
        assert bent < limit + 4 * noise * found.biased, (steps, source, found.op, found.averaged_over, bent, noise)


@pytest.mark.parametrize(
    ("steps", "elementwise"),
    [
        ((("linear", 1), ("product", 1), ("batch", 1)), True),
        ((("linear", 1), ("gate", 1), ("batch", 1)), True),
        ((("linear", 1), ("quotient", 1), ("batch", 1)), True),
        ((("linear", 1), ("batch", 1), ("sum", 2), ("batch", 1)), True),
        ((("linear", 1), ("batch", 1)), False),
        ((("linear", 1), ("standardise", 1)), False),
    ],
)
def test_where_an_element_meets_itself_the_claim_says_so_and_is_right(steps, elementwise):
    """The smallest claim is 1 exactly where rounding that activation moves the gradient far."""
    module, arguments = backward_of(steps)
    rows = [n for n in floats(module) if n.meta["val"].shape == (ROWS, WIDTH) and not n.name.startswith("tangents")]
    claims = {s: f.averaged_over for s, f in bias(module.graph, rows).items() if f.biased}
    assert (min(claims.values(), default=ROWS) == 1) == elementwise
    if elementwise:
        worst = max(off(module, arguments, s, 0)[0] for s, over in claims.items() if over == 1)
        assert worst > 0.05
    else:
        assert set(claims.values()) <= {ROWS}
