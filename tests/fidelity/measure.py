"""Gradients of a model as it is, compressed, and in float64; and a test of their mean over many roundings."""

import copy

import torch
from scipy.stats import t as student
from torch import Tensor, nn

import actcompile
from actcompile.backend import compile_plain
from actcompile.tracing.capture import whole_graphs

ALARM = 1e-6  # with new seeds in every run, an example of a test would fail wrongly with at most this probability
Gradients = dict[str, Tensor]


@whole_graphs
def plain(gm, inputs):
    """The inner compiler "aot_eager" without us, on the same graphs, but for dropout: it drops the same."""
    return compile_plain(gm, inputs, actcompile.Config(inner="aot_eager"))


def uncompressed(model: nn.Module) -> nn.Module:
    """A copy, compiled without us."""
    other = copy.deepcopy(model)
    other.compile(backend=plain)
    return other


def compressed(model: nn.Module, **options) -> nn.Module:
    """A copy, compressed, small tensors too; no float is rounded unless `options` say so."""
    chosen = {"inner": "aot_eager", "min_bytes": 0, "bits": None, "nonlinear_bits": None} | options
    return actcompile.compress(copy.deepcopy(model), **chosen)


def gradients(model: nn.Module, x: Tensor, edges: Tensor | None, gradient: Tensor) -> Gradients:
    """The gradients of all parameters and of the input `x`, for one forward and one backward call."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = model(x) if edges is None else model(x, edges)
    out.backward(gradient)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.detach().clone() for name, g in found.items()} | {"input": x.grad.clone()}


def truth(model: nn.Module, x: Tensor, edges: Tensor | None, gradient: Tensor) -> Gradients:
    """The same in eager float64."""
    exact = copy.deepcopy(model).double()
    for conv in getattr(exact, "convs", ()):
        if getattr(conv, "_cached_edge_index", None) is not None:
            index, weight = conv._cached_edge_index
            conv._cached_edge_index = index, weight.double()
    return gradients(exact, x.double(), edges, gradient.double())


def flat(found: Gradients) -> Tensor:
    """All gradients as one float64 vector."""
    return torch.cat([g.double().reshape(-1) for g in found.values()])


def directions(exact: Gradients, count: int = 3) -> Tensor:
    """Unit vectors [directions, elements] to look at gradients along: for each tensor, its own direction (along which
    a shrunken gradient shows) and `count` random ones, then random ones across all tensors."""
    made = []
    for name in exact:
        only = flat({n: torch.full_like(g, float(n == name)) for n, g in exact.items()})
        made += [only * flat(exact)] + [only * torch.randn_like(only) for _ in range(count)]
    made += [torch.randn_like(made[0]) for _ in range(4 * count)]
    stacked = torch.stack(made)
    norms = stacked.norm(dim=1, keepdim=True)
    return (stacked / norms)[norms.squeeze(1) > 0]


def sample(model: nn.Module, arguments: tuple, along: Tensor, seeds: int) -> Tensor:
    """The gradient along each direction, for each of many seeds: float64 [seeds, directions]."""
    drawn = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        drawn.append(along @ flat(gradients(model, *arguments)))
    return torch.stack(drawn)


def t_scores(drawn: Tensor, expected: Tensor, resolution: float) -> tuple[Tensor, float]:
    """How many standard errors lie between the mean of samples [seeds, directions] and what is expected, and the limit.

    Samples are sums over hundreds of independently rounded elements, so nearly normal, and their standard error is
    their own; the limit is Student's, divided among the directions (Bonferroni), and is passed by chance with a
    probability of at most `ALARM`. `resolution` is how exactly the arithmetic itself gives a gradient, in its units.
    """
    seeds, count = drawn.shape
    off = ((drawn.mean(0) - expected).abs() - resolution).clamp_min(0)
    return off / (drawn.std(0) / seeds**0.5 + 1e-300), float(student.isf(ALARM / 2 / count, seeds - 1))


def rounded(model: nn.Module) -> list[actcompile.report.Row]:
    """The activations that a compressed model that has run keeps rounded."""
    rows = [row for g in actcompile.explain(model).graphs for row in g.rows]
    return [row for row in rows if row.codec.startswith("quantize")]
