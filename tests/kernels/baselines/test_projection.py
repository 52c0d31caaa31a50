"""`rademacher`: signs of the bits that the layout names, balanced, and `E[P @ P.T] = I`.

The statistical tests run on fixed seeds; with new seeds in every run, each would raise a false alarm with a
probability below ALARM, by the normal approximation to sums of at least 10,000 signs.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from actcompile.kernels import projection_nbytes, rademacher, rademacher_aten
from actcompile.kernels.blocks.random_bits import random_words
from tests.strategies import ACTIVATIONS, FLOATS, assert_same_bits, seed_tensor, seeds

ALARM = 1e-6
SEED = seed_tensor(1)
salts = st.integers(0, ACTIVATIONS - 1)
dtypes = st.sampled_from(FLOATS)


@given(st.integers(0, 40), st.integers(1, 40), salts, seeds, dtypes)
def test_signs_are_the_bits_in_row_major_order(rows, columns, salt, seed, dtype):
    found = rademacher(seed_tensor(seed), salt, rows, columns, dtype)
    index = torch.arange((rows * columns + 31) // 32, dtype=torch.int32)
    words = next(random_words(index, seed_tensor(seed), salt, 1)).tolist()
    bits = torch.tensor([words[i // 32] >> i % 32 & 1 for i in range(rows * columns)], dtype=torch.float64)
    expected = (1 - 2 * bits) * columns**-0.5
    assert_same_bits(found, expected.to(dtype).view(rows, columns))


@given(st.integers(0, 40), st.integers(0, 40), salts, seeds, dtypes)
def test_the_op_the_aten_form_and_the_fake_agree(rows, columns, salt, seed, dtype):
    arguments = salt, rows, columns, dtype
    real = rademacher(seed_tensor(seed), *arguments)
    assert_same_bits(rademacher_aten(seed_tensor(seed), *arguments), real)
    assert_same_bits(rademacher(seed_tensor(seed), *arguments), real)
    with FakeTensorMode() as mode:
        fake = rademacher(mode.from_tensor(seed_tensor(seed)), *arguments)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_the_aten_form_is_traced_as_plain_aten():
    graph = make_fx(lambda seed: rademacher_aten(seed, 1, 47, 6, torch.float32), tracing_mode="symbolic")(SEED)
    targets = {str(n.target) for n in graph.graph.nodes if n.op == "call_function"}
    assert targets and all(t.startswith("aten.") for t in targets)
    for seed in (SEED, seed_tensor(2)):
        assert_same_bits(graph(seed), rademacher(seed, 1, 47, 6, torch.float32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(16, 4), (47, 5), (0, 3), (1, 1)], ids=str)
def test_opcheck(shape, dtype):
    torch.library.opcheck(rademacher.overload, (SEED, 2, *shape, dtype))


def signs(seed, salt, rows, columns):
    return rademacher(seed, salt, rows, columns, torch.float32).sign().double()


def test_signs_are_balanced():
    """In every column and every row."""
    p = signs(SEED, 0, 20000, 10)
    assert (p.sum(0) / 20000**0.5).abs().max() < norm.isf(ALARM / 2 / 10)
    q = signs(SEED, 1, 10, 20000)
    assert (q.sum(1) / 20000**0.5).abs().max() < norm.isf(ALARM / 2 / 10)


def test_other_salts_and_seeds_give_independent_signs():
    n = 40000
    others = [signs(SEED, salt, n, 1) for salt in range(ACTIVATIONS)] + [signs(seed_tensor(2), 0, n, 1)]
    pairs = list(itertools.combinations(others, 2))
    z = [abs(float((a * b).sum())) / n**0.5 for a, b in pairs]
    assert max(z) < norm.isf(ALARM / 2 / len(pairs))


@pytest.mark.parametrize("columns", [4, 6, 16])
def test_p_times_its_transpose_is_the_identity_in_the_mean(columns):
    """Its diagonal always; an element off it has the variance `1 / columns` and is tested over 4,000 seeds."""
    rows, calls = 32, 4000
    seed = torch.randint(-(2**31), 2**31, (calls, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    p = torch.stack([rademacher(seed, call, rows, columns, torch.float32).double() for call in range(calls)])
    products = p @ p.transpose(1, 2)
    assert torch.allclose(products.diagonal(dim1=1, dim2=2), torch.ones((), dtype=torch.float64), atol=1e-6)
    off = products.mean(0)[~torch.eye(rows, dtype=torch.bool)]
    assert off.abs().max() * (columns * calls) ** 0.5 < norm.isf(ALARM / 2 / off.numel())


def test_a_projection_is_restored_without_bias():
    """The variance of an element of `x @ P @ P.T` is `(|x|^2 - x_j^2) / columns`, its row's other elements alone."""
    columns, calls = 8, 4000
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    seed = torch.randint(-(2**31), 2**31, (calls, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(5))
    p = torch.stack([rademacher(seed, call, 64, columns, torch.float32).double() for call in range(calls)])
    restored = x @ p @ p.transpose(1, 2)
    variance = (x.square().sum(1, keepdim=True) - x.square()) / columns
    z = (restored.mean(0) - x) / (variance / calls).sqrt()
    assert z.abs().max() < norm.isf(ALARM / 2 / x.numel())
    assert torch.allclose(restored.var(0), variance, rtol=0.2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bytes_are_those_of_the_projected_tensor(dtype):
    x = torch.randn(30, 16).to(dtype) @ rademacher(SEED, 0, 16, 2, dtype)
    assert x.numel() * x.itemsize == projection_nbytes(30, 2, dtype)
