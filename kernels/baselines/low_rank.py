"""Low-rank approximation: `actcompile::low_rank` and `actcompile::restore_low_rank`.

The best approximation of rank `r` of a matrix, in the Frobenius norm, is its projection onto its first `r` right
singular vectors (Eckart and Young, 1936): the eigenvectors of the largest eigenvalues of its Gram matrix. A saved
activation has many rows and few columns, so the Gram matrix is small and one product with the activation makes it.
Biased: what lies outside of the subspace is lost.

Bytes: `rows * rank` coefficients and `columns * rank` of the basis.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..op import op
from .matrix import as_matrix, check_at_most_columns, check_float, largest_finite, matrix_size, power_of_two, row_chunks


def low_rank_nbytes(rows, columns: int, rank: int, dtype: torch.dtype):
    """Bytes of a (rows, columns) matrix of `dtype` after `low_rank`; `rows` may be a SymInt."""
    return (rows + columns) * rank * dtype.itemsize


def gram(matrix: Tensor) -> Tensor:
    """`matrix.T @ matrix` (columns, columns) in float32, up to a power of two that keeps it in range."""
    scale = power_of_two(-torch.frexp(largest_finite(matrix)).exponent)
    total = matrix.new_zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float32)
    for (part,) in row_chunks(matrix):
        scaled = part.float() * scale
        total.addmm_(scaled.t(), scaled)
    return total


def _sizes(x: Tensor, rank: int):
    check_float(x)
    rows, columns = matrix_size(x.shape)
    check_at_most_columns("rank", rank, columns)
    return rows, columns


@op("low_rank", (torch.Tag.cudagraph_unsafe,))
def low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Projects the rows of `x` onto its first `rank` right singular vectors. Biased.

    On CUDA the eigenvalue solver of torch waits for the device.

    Args:
        x: (..., columns), any strides, float32, bfloat16 or float16. If any element is not finite, nothing that comes
            back is.
        rank: from 1 to `columns`.

    Returns:
        coefficients: (rows, rank) in the dtype of `x`. They are up to `sqrt(columns)` times larger than the elements,
            which float16 may not hold.
        basis: (columns, rank) in the dtype of `x`, orthonormal up to its rounding.

    Raises:
        ValueError: `x` has another dtype or fewer than two dimensions, or `rank` is out of range.
    """
    _, columns = _sizes(x, rank)
    matrix = as_matrix(x)
    products = gram(matrix)
    finite = products.isfinite().all()
    vectors = torch.linalg.eigh(torch.where(finite, products, 0.0).double()).eigenvectors[:, columns - rank :]
    basis = x.new_empty(columns, rank).copy_(torch.where(finite, vectors, float("nan")))
    return matrix @ basis, basis


@low_rank.register_fake
def _(x, rank):
    rows, columns = _sizes(x, rank)
    return x.new_empty(rows, rank), x.new_empty(columns, rank)


@op("restore_low_rank")
def restore_low_rank(coefficients: Tensor, basis: Tensor, size: Sequence[int]) -> Tensor:
    """Multiplies what `low_rank` returned into a contiguous tensor of shape `size`."""
    return (coefficients @ basis.t()).reshape(list(size))


@restore_low_rank.register_fake
def _(coefficients, basis, size):
    return coefficients.new_empty(size)
