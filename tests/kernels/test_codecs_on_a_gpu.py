"""The ops in plain torch on a GPU against the same on a CPU: to the bit where no sum is involved."""

import pytest
import torch

from actcompile.kernels import (
    cast_fp8,
    low_rank,
    prune,
    rademacher,
    restore_fp8,
    restore_low_rank,
    restore_pruned,
    restore_rows,
    sample_rows,
)
from actcompile.kernels.baselines.fp8 import FORMATS
from tests.strategies import FLOATS, assert_same_bits, seed_tensor, values

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SEED = seed_tensor(1)
SIZES = [(0, 5), (1, 1), (1000, 47), (3, 500, 300)]


def activation(size, dtype):
    return values("normal", torch.Size(size).numel(), 1).view(size).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_prune(size, dtype):
    x = activation(size, dtype)
    x = (8 * x).round()  # ties
    kept = min(7, size[-1])
    ours, expected = prune(x.cuda(), kept), prune(x, kept)
    for a, b in zip(ours, expected, strict=True):
        assert_same_bits(a.cpu(), b)
    assert_same_bits(restore_pruned(*ours, size).cpu(), restore_pruned(*expected, size))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_low_rank(size, dtype):
    x = activation(size, dtype)
    rank = (size[-1] + 1) // 2
    errors = []
    for place in (x.cuda(), x):
        restored = restore_low_rank(*low_rank(place, rank), size)
        errors.append((restored.cpu().double() - x.double()).norm())
    assert torch.allclose(errors[0], errors[1], rtol=0.02, atol=8 * torch.finfo(dtype).eps * float(x.double().norm()))
    if x.numel():
        x.view(-1)[0] = float("nan")
        assert not restore_low_rank(*low_rank(x.cuda(), rank), size).isfinite().any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sample_rows(size, dtype):
    x = activation(size, dtype)
    ours, expected = sample_rows(x.cuda(), SEED.cuda(), 1, 4), sample_rows(x, SEED, 1, 4)
    assert torch.equal(ours[1].cpu(), expected[1])
    assert torch.allclose(ours[0].cpu().double(), expected[0].double(), rtol=torch.finfo(dtype).eps)
    restored = restore_rows(*ours, size).cpu().double(), restore_rows(*expected, size).double()
    assert torch.allclose(*restored, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fp8(size, source, dtype):
    x = activation(size, source)
    if x.numel() > 9:
        x.view(-1)[3:6] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    ours, expected = cast_fp8(x.cuda(), dtype), cast_fp8(x, dtype)
    assert torch.equal(ours[1].cpu(), expected[1])
    assert_same_bits(restore_fp8(*ours, source).cpu(), restore_fp8(*expected, source))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rademacher(dtype):
    assert_same_bits(rademacher(SEED.cuda(), 1, 128, 11, dtype).cpu(), rademacher(SEED, 1, 128, 11, dtype))
