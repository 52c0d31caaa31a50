"""Projected quantisation, `dequantize(quantize(x @ P)) @ P.T`: its mean and its total variance are those of theory.

A row `x` of `D` elements is projected to `R` columns. The projection alone has `E |x P P.T - x|**2`, which is
`(D - 1) / R |x|**2` (EXACT, ICLR 2022, appendix), and rounding `y = x P` adds `var(y_k) |P_k|**2 = var(y_k) D / R` for
each of its elements, since roundings are independent of each other and of `P`.

z-tests over `CALLS` seeds; the false alarm rate of each example is below `ALARM`, by the normal approximation.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from actcompile.kernels import BlockFormat, dequantize, quantize, rademacher
from actcompile.kernels.blocks.format import LEVELS
from tests.fidelity.measure import ALARM
from tests.fidelity.stacks import examples, seeds
from tests.fidelity.theory import moments

CALLS = 400


@examples(8)
@given(
    rows=st.integers(4, 40),
    width=st.integers(16, 80),
    ratio=st.sampled_from((2, 4, 8)),
    bits=st.sampled_from((1, 2, 4, 8)),
    per_block=st.sampled_from((1, 2, 16)),
    levels=st.sampled_from(LEVELS),
    metadata=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=seeds(),
)
def test_mean_and_variance(rows, width, ratio, bits, per_block, levels, metadata, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * torch.rand(width, generator=generator)
    columns = width // ratio
    fmt = BlockFormat(bits, per_block * columns, levels, metadata)
    fields = fmt.bits, fmt.block, fmt.levels, fmt.metadata, fmt.words
    truth = x.double()
    restored, rounding = [], []
    for _ in range(CALLS):
        drawn = torch.randint(-(2**31), 2**31, (2, 2), dtype=torch.int32, generator=generator)
        p = rademacher(drawn, 0, width, columns, torch.float32)
        y = x @ p
        encoded = quantize(y, drawn, 1, *fields)
        back = dequantize(*encoded, y.shape, torch.float32, *fields[:3])
        restored.append(back.double() @ p.double().T)
        rounding.append(float(moments(y, fmt)[0].sum()) * width / columns)
    samples = torch.stack(restored)

    squares = (samples - truth).square().sum((1, 2))
    projection = (width - 1) / columns * float(truth.square().sum())
    excess = squares - projection - torch.tensor(rounding, dtype=torch.float64)
    assert abs(excess.mean() / (excess.std() / CALLS**0.5)) < norm.isf(ALARM / 4)

    along = torch.randn(8, rows, width, generator=generator, dtype=torch.float64)
    errors = torch.einsum("crw,drw->cd", samples - truth, along)
    z = errors.mean(0) / (errors.std(0) / CALLS**0.5)
    assert z.abs().max() < norm.isf(ALARM / 4 / len(z))
