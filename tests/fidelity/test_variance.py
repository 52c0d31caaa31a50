"""The variance that rounding gives a gradient is the one that theory gives, for both kinds of levels.

Chi-square tests (see `theory.Moments.off`): one false alarm in `1 / ALARM` examples at most.
"""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from actcompile.config import Config
from actcompile.kernels.blocks.format import LEVELS
from actcompile.passes.codecs.codecs import Quantize
from actcompile.passes.plan.formats import block_format
from tests.fidelity.measure import compressed, directions, gradients, rounded, sample
from tests.fidelity.stacks import build, examples, seeds, specs
from tests.fidelity.theory import Captured, Moments, moments

SEEDS = 200
metadata = st.sampled_from(("float32", "bfloat16"))


class Two(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, out)

    def forward(self, x):
        return self.second(self.first(x))


@examples(6)
@given(
    rows=st.integers(8, 40),
    width=st.integers(4, 40),
    out=st.integers(1, 6),
    bits=st.sampled_from((1, 2, 4, 8)),
    block=st.sampled_from((8, 16, 32, 64, 256)),
    levels=st.sampled_from(LEVELS),
    metadata=metadata,
    seed=seeds(),
)
def test_a_weight_gradient_varies_by_the_sum_over_rows(rows, width, out, bits, block, levels, metadata, seed):
    """`grad[k, j]` of `x.T @ g` has the variance `sum_i var(x[i, j]) g[i, k]**2`, and its elements are correlated only
    where they share roundings: a sum of `c[k, j] grad[k, j]` has `sum_ij var(x[i, j]) (g @ c)[i, j]**2`."""
    torch.compiler.reset()
    torch.manual_seed(seed)
    model = Two(width, out)
    x, g = torch.randn(rows, 4), torch.randn(rows, out)
    hidden = model.first(x).detach()
    fmt = block_format(width, bits, block, levels, getattr(torch, metadata))
    ours = compressed(model, bits=bits, block=block, levels=levels, metadata=metadata)
    exact = gradients(ours, x, None, g)
    assume(rounded(ours))  # else it would have taken more bytes than it saves
    assert [row.codec for row in rounded(ours)] == [str(Quantize(fmt))]

    alike = torch.randn(8, out, 1, dtype=torch.float64).expand(-1, -1, width)  # neighbours that round alike show here
    among = torch.cat([alike, torch.randn(8, out, width, dtype=torch.float64)])
    single = torch.eye(out * width, dtype=torch.float64).view(-1, out, width)
    variance, cumulant = moments(hidden, fmt)
    slopes = g.double() @ torch.cat([among, single])
    theory = Moments((slopes**2 * variance).sum((1, 2)), (slopes**4 * cumulant).sum((1, 2)))

    weights = {name: torch.zeros_like(value) for name, value in exact.items()}
    where = torch.cat([(torch.ones_like(w) * (n == "second.weight")).reshape(-1) for n, w in weights.items()]).bool()
    along = torch.zeros(len(slopes), len(where), dtype=torch.float64)
    along[:, where] = torch.cat([among, single]).reshape(len(slopes), -1)
    drawn = sample(ours, (x, None, g), along, SEEDS)
    mean = along[:, where] @ (g.double().T @ hidden.double()).reshape(-1)
    assert not theory.off(drawn, mean)


ADDITIVE = ("sage", "gcn plain", "gin", "max min", "edge mlp")  # no gradient multiplies two rounded activations


@examples(3)
@given(
    spec=specs(ADDITIVE, ADDITIVE, dropouts=("none", "fixed")),
    bits=st.sampled_from((2, 4)),
    block=st.sampled_from((16, 64, 256)),
    levels=st.sampled_from(LEVELS),
    metadata=metadata,
)
def test_gradients_of_a_stack_vary_as_theory_says(spec, bits, block, levels, metadata):
    """All rounded activations of the stack together, each with its own random bits."""
    torch.compiler.reset()
    model, *arguments = build(spec)
    options = {"bits": bits, "block": block, "levels": levels, "metadata": metadata}
    captured = Captured(model, Config(nonlinear_bits=None, min_bytes=0, inner="aot_eager", **options))
    gradients(model, *arguments)
    along = directions({str(i): out for i, out in enumerate(captured.outputs)})
    theory, mean, count = captured.theory(along)
    assert count > 0
    drawn = []
    for seed in range(120):
        torch.manual_seed(seed)
        gradients(model, *arguments)
        drawn.append(along @ torch.cat([out.double().reshape(-1) for out in captured.outputs]))
    assert not theory.off(torch.stack(drawn), mean)
