"""`low_rank` and `restore_low_rank`: as close to the matrix as any of its rank, by the SVD in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actcompile.kernels import low_rank, low_rank_nbytes, restore_low_rank
from actcompile.kernels.baselines import matrix
from tests.kernels.matrices import ODD, as_rows, check_fakes, check_symbolic_rows, matrices, nbytes
from tests.strategies import FLOATS, assert_same_bits, seeds, values

KINDS = st.sampled_from(("normal", "half zero", "constant", "integers", "large offset"))


@st.composite
def cases(draw, kind=KINDS):
    x = draw(matrices(kind))
    columns = x.shape[-1]
    return x, draw(st.integers(min(1, columns), columns))


def through(x, rank):
    parts = low_rank(x, rank)
    return *parts, restore_low_rank(*parts, x.shape)


def accuracy(x):
    """Of the Frobenius norm, what rounding may take: coefficients, basis and result are of the dtype of `x`."""
    return 8 * max(torch.finfo(x.dtype).eps, 1e-6)


@given(cases())
def test_as_close_as_the_singular_value_decomposition(case):
    x, rank = case
    coefficients, basis, restored = through(x, rank)
    truth = as_rows(x).double()
    lost = torch.linalg.svdvals(truth)[rank:].norm() if x.numel() else torch.zeros(())
    error = (as_rows(restored).double() - truth).norm()
    assert error <= lost + accuracy(x) * truth.norm()
    assert restored.is_contiguous()
    assert nbytes((coefficients, basis)) == low_rank_nbytes(len(truth), x.shape[-1], rank, x.dtype)


@given(cases())
def test_the_basis_is_orthonormal(case):
    x, rank = case
    basis = low_rank(x, rank)[1].double()
    assert torch.allclose(basis.t() @ basis, torch.eye(rank, dtype=torch.float64), atol=accuracy(x))


@given(st.integers(1, 40), st.integers(1, 12), st.data(), seeds)
def test_a_matrix_of_low_rank_comes_back(rows, columns, data, seed):
    rank = data.draw(st.integers(1, columns))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    assert (through(x, rank)[-1] - x).norm() <= accuracy(x) * x.norm()


@given(st.integers(1, 30), st.integers(1, 9), st.integers(-95, 110), seeds)
def test_magnitudes_whose_squares_float32_cannot_hold(rows, columns, exponent, seed):
    x = values("normal", rows * columns, seed).view(rows, columns)
    scaled = x * 2.0**exponent
    rank = (columns + 1) // 2
    coefficients, basis, _ = through(x, rank)
    assert_same_bits(low_rank(scaled, rank)[1], basis)
    assert_same_bits(low_rank(scaled, rank)[0], coefficients * 2.0**exponent)


def test_the_smallest_denormals_come_back():
    x = torch.tensor([[2.0**-149, 0], [0, 0], [2.0**-149, 0]])
    assert_same_bits(through(x, 1)[-1], x)


@given(cases(), st.data())
def test_what_is_not_finite_does_not_come_back_finite(case, data):
    x, rank = case
    if x.numel():
        x = x.clone(memory_format=torch.contiguous_format)
        x.view(-1)[data.draw(st.integers(0, x.numel() - 1))] = data.draw(st.sampled_from(ODD))
        assert not through(x, rank)[-1].isfinite().any()


@given(cases())
def test_in_runs_of_few_rows_as_at_once(case):
    x, rank = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "CHUNK", 7)
        restored = through(x, rank)[-1]
    truth = as_rows(x).double()
    lost = torch.linalg.svdvals(truth)[rank:].norm() if x.numel() else torch.zeros(())
    assert (as_rows(restored).double() - truth).norm() <= lost + accuracy(x) * truth.norm()


@given(cases())
def test_fakes_agree_with_the_ops(case):
    x, rank = case
    check_fakes(lambda x: through(x, rank), x)


def test_fakes_do_not_guard_on_the_number_of_rows():
    coefficients, basis, _ = check_symbolic_rows(lambda x: through(x, 4), 16)
    assert coefficients.shape[1] == 4 and basis.shape == (16, 4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [(9, 7), (2, 3, 5), (0, 5)], ids=str)
def test_opcheck(size, dtype):
    x = values("normal", int(np.prod(size)), 0).to(dtype).view(size).transpose(0, -2)
    torch.library.opcheck(low_rank.overload, (x, 2))
    torch.library.opcheck(restore_low_rank.overload, (*low_rank(x, 2), list(x.shape)))


@pytest.mark.parametrize("rank", [0, 8, -1])
def test_the_rank_is_checked(rank):
    with pytest.raises(ValueError, match="rank must be from 1 to 7"):
        low_rank(torch.randn(3, 7), rank)


def test_tensors_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="x must have at least 2 dimensions"):
        low_rank(torch.randn(7), 2)
    with pytest.raises(ValueError, match="x must be float32"):
        low_rank(torch.ones(3, 7, dtype=torch.float64), 2)
