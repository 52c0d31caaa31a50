"""`cast_fp8` and `restore_fp8`: nearest values of the format, a scale that rounds nothing, nothing finite gets lost."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actcompile.kernels import cast_fp8, fp8_nbytes, restore_fp8
from actcompile.kernels.baselines import matrix
from actcompile.kernels.baselines.fp8 import FORMATS
from tests.kernels.matrices import check_fakes, check_symbolic_rows, matrices, nbytes
from tests.strategies import FLOATS, assert_same_bits, bits_of, values

formats = st.sampled_from(FORMATS)


def through(x, dtype, to=None):
    parts = cast_fp8(x, dtype)
    return *parts, restore_fp8(*parts, x.dtype if to is None else to)


def numbers(dtype):
    """All finite values of a format, float64, ascending."""
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).double()
    return every[every.isfinite()].unique()


@given(matrices(odd=True), formats)
def test_elements_become_the_nearest_numbers_of_the_format(x, dtype):
    found, scale, restored = through(x, dtype, torch.float32)
    assert found.dtype == dtype and found.shape == x.shape and found.is_contiguous()
    assert scale.shape == (1,) and scale.dtype == torch.float32
    assert nbytes((found, scale)) == fp8_nbytes(x.numel())
    finite = x.isfinite()
    scaled = (x.double() / scale.double())[finite]
    distance = (scaled[:, None] - numbers(dtype)).abs().amin(1)
    assert torch.equal((found.double()[finite] - scaled).abs(), distance)
    inside = restored.abs() < torch.finfo(torch.float32).max
    assert torch.equal(restored.double()[finite & inside], (found.double() * scale.double())[finite & inside])


@given(matrices(odd=True), formats)
def test_the_scale_is_the_largest_power_of_two_that_fits(x, dtype):
    scale = float(cast_fp8(x, dtype)[1])
    finite = x.isfinite()
    largest = float(torch.where(finite, x, 0).abs().max()) if x.numel() else 0.0
    assert math.frexp(scale)[0] == 0.5
    assert largest / scale <= torch.finfo(dtype).max
    assert largest == 0 or scale == 2.0**-126 or 2 * largest / scale > torch.finfo(dtype).max


@given(matrices(odd=True), formats, st.sampled_from(FLOATS))
def test_what_is_finite_stays_so_and_what_is_not_does_not_become_so(x, dtype, to):
    fits = to == x.dtype or to == torch.float32
    restored = through(x, dtype, to if fits else x.dtype)[-1]
    assert torch.equal(restored.isfinite(), x.isfinite())
    assert restored.isnan()[x.isnan()].all()
    if dtype == torch.float8_e5m2:
        assert torch.equal(restored[x.isinf()].float(), x[x.isinf()].float())


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_the_largest_numbers_stay_finite_and_near(source, dtype):
    most = torch.finfo(source).max
    x = torch.tensor([[most, -most, most / 3, 0]], dtype=source)
    restored = through(x, dtype)[-1]
    assert torch.allclose(restored.double(), x.double(), rtol=2.0**-3)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("exponent", [-100, -3, 0, 40, 100])
def test_every_number_of_the_format_comes_back(dtype, exponent):
    x = (numbers(dtype) * 2.0**exponent).float().view(1, -1)
    assert_same_bits(through(x, dtype)[-1], x)


@given(matrices(odd=True), formats)
def test_in_runs_of_few_elements_as_at_once(x, dtype):
    whole = through(x, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "CHUNK", 7)
        parts = through(x, dtype)
    assert torch.equal(parts[0].view(torch.uint8), whole[0].view(torch.uint8))
    assert torch.equal(parts[1], whole[1])
    assert torch.equal(bits_of(parts[2]), bits_of(whole[2])) or not x.numel()


@given(matrices(odd=True), formats, st.sampled_from(FLOATS))
def test_fakes_agree_with_the_ops(x, dtype, to):
    check_fakes(lambda x: through(x, dtype, to), x)


def test_fakes_do_not_guard_on_the_number_of_rows():
    _, scale, _ = check_symbolic_rows(lambda x: through(x, torch.float8_e5m2), 16)
    assert scale.shape == (1,)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("size", [(2, 3, 5), (0, 5), ()], ids=str)
def test_opcheck(size, source, dtype):
    """Of `restore_fp8` without the check that inputs are left alone, which compares them by arithmetic that 8-bit
    floats do not have: they are compared here."""
    x = values("normal", int(np.prod(size)), 0).to(source).view(size)
    x = x.transpose(0, -1) if x.dim() else x
    torch.library.opcheck(cast_fp8.overload, (x, dtype))
    parts = cast_fp8(x, dtype)
    before = [t.clone() for t in parts]
    tests = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck(restore_fp8.overload, (*parts, source), test_utils=tests)
    assert all(torch.equal(t.view(torch.uint8), b.view(torch.uint8)) for t, b in zip(parts, before, strict=True))


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="dtype must be torch.float8_e4m3fn or"):
        cast_fp8(torch.randn(3, 7), torch.float16)
    with pytest.raises(ValueError, match="x must be float32"):
        cast_fp8(torch.ones(3, 7, dtype=torch.int32), torch.float8_e5m2)
