"""Products of a sparse matrix with a dense one, against torch.sparse and dense matrices in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from actcompile.kernels import pointer_to, rows_of, spmm, spmm_extremum, spmm_transposed

pytestmark = pytest.mark.filterwarnings("ignore:.*(beta state|invariant).*")


def matrix(rows, columns, filled, dtype=torch.float64, index=torch.int64):
    """A random CSR's arrays, and the same as a dense matrix."""
    dense = torch.rand(rows, columns, dtype=dtype) + 0.1
    dense[torch.rand(rows, columns) >= filled] = 0
    row, column = dense.nonzero().t()
    return pointer_to(row.to(index), rows), column.to(index), dense[row, column], dense


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([torch.int64, torch.int32]),
)
def test_products_and_gradients(rows, columns, width, filled, index):
    pointer, column, value, dense = matrix(rows, columns, filled, index=index)
    x, g = (torch.randn(n, width, dtype=torch.float64, requires_grad=True) for n in (columns, rows))
    value.requires_grad_()
    weights = torch.zeros_like(dense).index_put((dense.nonzero(as_tuple=True)), value)

    out = spmm(pointer, column, value, x)
    torch.testing.assert_close(out, weights @ x)
    for ours, expected in zip(
        torch.autograd.grad((out * g.detach()).sum(), [value, x]),
        torch.autograd.grad(((weights @ x) * g.detach()).sum(), [value, x], retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)

    out = spmm_transposed(pointer, column, value, g, columns)
    torch.testing.assert_close(out, weights.t() @ g)
    for ours, expected in zip(
        torch.autograd.grad((out * x.detach()).sum(), [value, g]),
        torch.autograd.grad(((weights.t() @ g) * x.detach()).sum(), [value, g]),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("filled", [0.0, 0.3])
@pytest.mark.parametrize("largest", [True, False])
def test_extrema_and_gradients(largest, filled):
    torch.manual_seed(0)
    pointer, column, value, _ = matrix(20, 12, filled)
    x = torch.randn(12, 5, dtype=torch.float64).round()  # with ties: torch takes one of them, and so do we
    runs = []
    for ours in (True, False):
        v, h = value.clone().requires_grad_(), x.clone().requires_grad_()
        if ours:
            out = spmm_extremum(pointer, column, v, h, largest)[0]
        elif not filled:
            out = 0 * h.sum() * v.sum() + torch.zeros(20, 5, dtype=torch.float64)
        else:
            sparse = torch.sparse_csr_tensor(pointer, column, v, (20, 12))
            out = torch.sparse.mm(sparse, h, "amax" if largest else "amin")
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        runs.append([out, *torch.autograd.grad((out * weights).sum(), [v, h])])
    for ours, expected in zip(*runs, strict=True):
        torch.testing.assert_close(ours, expected)


def test_schemas_and_fakes():
    pointer, column, value, _ = matrix(20, 12, 0.3)
    value.requires_grad_()
    x, g = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (12, 20))
    opcheck(spmm, (pointer, column, value, x))
    opcheck(spmm_transposed, (pointer, column, value, g, 12))
    opcheck(spmm_extremum, (pointer, column, value, x, True))


def test_pointers_and_rows_are_inverse():
    row = torch.tensor([0, 0, 2, 5, 5, 5])
    pointer = pointer_to(row, 7)
    assert pointer.tolist() == [0, 2, 2, 3, 3, 3, 6, 6]
    assert torch.equal(rows_of(pointer, 6), row)
