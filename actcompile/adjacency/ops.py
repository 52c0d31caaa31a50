"""What the stand-in of a sparse adjacency does itself, in the model's graph and outside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actcompile.kernels import pointer_to, spmm, spmm_extremum, spmm_transposed
from actcompile.passes.graph import _torch

from .stand_in import HANDLED, HANDLERS, Adjacency, Pointer, columns, like, rows, with_values

Handler = Callable[..., Any]


def _size(adjacency: Adjacency, dim: int | None = None) -> Any:
    return torch.Tensor.size(adjacency) if dim is None else torch.Tensor.size(adjacency, dim)


def _only(*layouts: torch.layout) -> Callable[[Handler], Handler]:
    """For a method that matrices of other layouts don't have: they raise what torch raises."""

    def decorate(handler: Handler) -> Handler:
        def checked(adjacency: Adjacency, *args: Any) -> Any:
            return handler(adjacency, *args) if adjacency._layout in layouts else NotImplemented

        return checked

    return decorate


def _to_csr(adjacency: Adjacency) -> Any:
    if adjacency._layout == torch.sparse_csr:
        return adjacency
    if adjacency._layout == torch.sparse_csc:
        return NotImplemented
    return like(adjacency, torch.sparse_csr, _by_row(adjacency), columns(adjacency), adjacency._value)


def _by_row(adjacency: Adjacency) -> Tensor:
    """The pointer of a matrix whose entries are in the order of rows."""
    if adjacency._pointer is not None:
        return adjacency._pointer
    return pointer_to(rows(adjacency), torch.Tensor.size(adjacency, 0))


def _product(adjacency: Any, matrix: Any, reduce: str = "sum") -> Any:
    if not isinstance(adjacency, Adjacency) or isinstance(matrix, Adjacency) or not isinstance(matrix, Tensor):
        return NotImplemented
    value = adjacency._value
    if value.dim() != 1 or matrix.dim() != 2 or matrix.dtype != value.dtype:
        return NotImplemented
    number, width = torch.Tensor.size(adjacency)
    if not value.is_floating_point() or matrix.shape[0] != width:
        return NotImplemented
    if adjacency._layout == torch.sparse_csc:
        if reduce not in ("sum", "mean"):
            return NotImplemented
        product = spmm_transposed(adjacency._pointer, adjacency._index, value, matrix, number)
        ones = torch.ones_like(value)
        degree = torch.zeros(number, dtype=value.dtype, device=value.device).index_add(0, adjacency._index, ones)
        return product if reduce == "sum" else product / degree.clamp(min=1)[:, None]
    pointer, index = _by_row(adjacency), columns(adjacency)
    if reduce == "sum":
        return spmm(pointer, index, value, matrix)
    if reduce == "mean":
        return spmm(pointer, index, value, matrix) / pointer.diff().clamp(min=1).to(value.dtype)[:, None]
    if reduce in ("max", "amax", "min", "amin"):
        return spmm_extremum(pointer, index, value, matrix, reduce in ("max", "amax"))[0]
    return NotImplemented


def _matmul(adjacency: Any, matrix: Any) -> Any:
    if isinstance(matrix, Tensor) and not isinstance(matrix, Adjacency) and matrix.dim() == 1:
        product = _product(adjacency, matrix[:, None])
        return product if product is NotImplemented else product[:, 0]
    return _product(adjacency, matrix)


def _sum_of(matrix: Any, adjacency: Any, other: Any, beta: Any = 1.0, alpha: Any = 1.0) -> Any:
    product = _product(adjacency, other) if beta == 1 and alpha == 1 else NotImplemented
    return product if product is NotImplemented else matrix + product


_COO = _only(torch.sparse_coo)
_CSR = _only(torch.sparse_csr)
_CSC = _only(torch.sparse_csc)
_ANY = _only(*HANDLED)

HANDLERS |= {
    torch.Tensor.size: _size,
    torch.Tensor.dim: lambda a: torch.Tensor.dim(a),
    torch.Tensor._nnz: lambda a: a._value.shape[0],
    torch.Tensor.is_floating_point: lambda a: a._value.is_floating_point(),
    torch.Tensor.crow_indices: _CSR(lambda a: a._pointer.as_subclass(Pointer)),
    torch.Tensor.col_indices: _CSR(lambda a: a._index),
    torch.Tensor.ccol_indices: _CSC(lambda a: a._pointer),
    torch.Tensor.row_indices: _CSC(lambda a: a._index),
    torch.Tensor.indices: _COO(lambda a: a._index),
    torch.Tensor._indices: _COO(lambda a: a._index),
    torch.Tensor.values: _ANY(lambda a: a._value),
    torch.Tensor._values: _COO(lambda a: a._value.detach()),
    torch.Tensor.coalesce: _COO(lambda a: a),
    torch.Tensor.is_coalesced: _COO(lambda a: True),
    torch.Tensor._coalesced_: _COO(lambda a, value: a if value else NotImplemented),
    torch.Tensor.to_sparse_csr: _ANY(_to_csr),
    torch.Tensor.clone: _ANY(lambda a: with_values(a, a._value.clone())),
    torch.Tensor.detach: _ANY(lambda a: with_values(a, a._value.detach())),
    torch.sparse.mm: _product,
    torch.spmm: _product,
    torch.sparse.addmm: _sum_of,
    torch.addmm: _sum_of,
    torch.mm: _product,
    torch.Tensor.mm: _product,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.mv: _matmul,
    torch.Tensor.mv: _matmul,
}
_torch.dispatch_in_traces(
    torch.sparse.mm,
    torch.sparse.addmm,
    torch.sparse.sampled_addmm,
    torch.sparse.softmax,
    torch.sparse.log_softmax,
)
