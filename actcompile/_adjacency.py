"""Sparse adjacencies that `torch.compile` can trace.

Dynamo leaves the graph at every torch.sparse tensor. So a compressed model is called with a stand-in: a tensor subclass
that looks like the adjacency to the model (its layout, its sizes, its indices and values, its products with dense
matrices) and to Dynamo like dense tensors, the arrays that the adjacency is made of. What the stand-in can't do runs on
the real adjacency, outside of the graph, and is said once.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from actcompile.kernels import rows_of, spmm, spmm_extremum, spmm_transposed
from actcompile.passes import _torch

Handler = Callable[..., Any]

HANDLED = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


class Adjacency(torch.Tensor):
    """A sparse matrix as dense tensors.

    The tensor itself is on the meta device, has the matrix's size and no data: what reads it by mistake fails.

    Attributes:
        _layout: torch.sparse_coo, torch.sparse_csr or torch.sparse_csc.
        _pointer: (rows + 1,), for CSC (columns + 1,); None for COO.
        _index: (2, entries) for COO, whose order is by rows, (entries,) for the others.
        _value: (entries, ...); with a gradient where the matrix has one.
        _others: for a square matrix, those entries that are no self-loops, (entries - self-loops,); or None where it
            has none, and where `_counted` is False.
        _counted: whether the self-loops were looked for.
    """

    _layout: torch.layout
    _pointer: Tensor | None
    _index: Tensor
    _value: Tensor
    _others: Tensor | None
    _counted: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_dynamo_compiling() and _torch.compiling():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is not None:
            with torch._C.DisableTorchFunctionSubclass():
                result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _outside(func, args, kwargs)

    @property
    def layout(self) -> torch.layout:  # type: ignore[override]
        if not torch.compiler.is_dynamo_compiling() and _torch.compiling():
            return torch.strided
        return self._layout

    @property
    def is_sparse(self) -> bool:  # type: ignore[override]
        return self.layout == torch.sparse_coo

    @property
    def is_sparse_csr(self) -> bool:  # type: ignore[override]
        return self.layout == torch.sparse_csr

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.size()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._value.device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self._value.is_cuda

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return self._value.is_meta

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._value.dtype

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return self._value.requires_grad

    def __deepcopy__(self, memo: dict[int, Any]) -> Adjacency:
        if id(self) not in memo:
            made = memo[id(self)] = _stand_in(torch.Tensor.size(self))
            for name, value in vars(self).items():
                setattr(made, name, copy.deepcopy(value, memo))
        return memo[id(self)]

    def __repr__(self) -> str:
        return f"traceable({to_sparse(self)!r})"


class Pointer(torch.Tensor):
    """The pointer of a CSR matrix, known as one: by it, PyTorch Geometric's functions are traced as sums over rows."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # the results of ops are plain tensors


def rows(adjacency: Adjacency) -> Tensor:
    """The row of each entry."""
    if adjacency._layout == torch.sparse_coo:
        return adjacency._index[0]
    if adjacency._layout == torch.sparse_csr:
        return rows_of(adjacency._pointer, adjacency._index.shape[0])
    return adjacency._index


def columns(adjacency: Adjacency) -> Tensor:
    """The column of each entry."""
    if adjacency._layout == torch.sparse_coo:
        return adjacency._index[1]
    if adjacency._layout == torch.sparse_csc:
        return rows_of(adjacency._pointer, adjacency._index.shape[0])
    return adjacency._index


def pointer_to(row: Tensor, number: int) -> Tensor:
    """The pointer of `number` rows to entries that are in the order of rows."""
    # torch._convert_indices_from_coo_to_csr would make the graph hold for this number only.
    edge = torch.arange(number + 1, dtype=row.dtype, device=row.device)
    return torch.searchsorted(row, edge, out_int32=row.dtype == torch.int32)


def like(adjacency: Adjacency, layout: torch.layout, pointer: Any, index: Tensor, value: Tensor) -> Adjacency:
    """Makes an adjacency of the same size inside a model."""
    size = (*torch.Tensor.size(adjacency)[:2], *value.shape[1:])
    made: Any = torch.empty_strided(size, (0,) * len(size), device="meta").as_subclass(Adjacency)
    made._layout, made._pointer, made._index, made._value = layout, pointer, index, value
    made._others, made._counted = None, False
    return made


def with_values(adjacency: Adjacency, value: Tensor) -> Adjacency:
    """The same entries with other values."""
    made = like(adjacency, adjacency._layout, adjacency._pointer, adjacency._index, value)
    made._others, made._counted = adjacency._others, adjacency._counted
    return made


# ---- what the stand-in answers, in the model's graph and outside of it


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
    if not value.is_floating_point():
        return NotImplemented
    if adjacency._layout == torch.sparse_csc:
        if reduce != "sum":
            return NotImplemented
        return spmm_transposed(adjacency._pointer, adjacency._index, value, matrix, torch.Tensor.size(adjacency, 0))
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


_COO = _only(torch.sparse_coo)
_CSR = _only(torch.sparse_csr)
_CSC = _only(torch.sparse_csc)
_ANY = _only(*HANDLED)

HANDLERS: dict[Any, Handler] = {
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
    torch.mm: _product,
    torch.Tensor.mm: _product,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.mv: _matmul,
    torch.Tensor.mv: _matmul,
}
_torch.dispatch_in_traces(torch.sparse.mm)


# ---- to and from torch.sparse


def is_sparse(value: Any) -> bool:
    """Whether a value is a torch.sparse tensor."""
    return isinstance(value, Tensor) and not isinstance(value, Adjacency) and value.layout is not torch.strided


def refusal(matrix: Tensor) -> str | None:
    """Why a torch.sparse tensor has no stand-in, or None where it has."""
    if matrix.layout not in HANDLED:
        return f"its layout is {matrix.layout}; give it one of COO, CSR and CSC"
    if matrix.sparse_dim() != 2 or (matrix.layout != torch.sparse_coo and matrix.values().dim() != 1 + matrix.dense_dim()):
        return f"it has the shape {tuple(matrix.shape)} and is no sparse matrix"
    if matrix.layout == torch.sparse_coo and not matrix.is_coalesced():
        return "it is not coalesced; pass adjacency.coalesce()"
    return None


def from_sparse(matrix: Tensor, others: Tensor | None = None, counted: bool = False) -> Adjacency:
    """The stand-in of a torch.sparse matrix; shares its memory, and hands gradients on to it."""
    # Not as views: Dynamo would trace their base, too, which is the matrix itself.
    value = matrix.values().clone() if matrix.requires_grad and torch.is_grad_enabled() else matrix.values().detach()
    made: Any = _stand_in(matrix.shape)
    made._layout, made._value, made._others, made._counted = matrix.layout, value, others, counted
    if matrix.layout == torch.sparse_coo:
        made._pointer, made._index = None, matrix.indices().detach()
    elif matrix.layout == torch.sparse_csr:
        made._pointer, made._index = matrix.crow_indices().detach(), matrix.col_indices().detach()
    else:
        made._pointer, made._index = matrix.ccol_indices().detach(), matrix.row_indices().detach()
    return made


def _stand_in(size: torch.Size) -> Any:
    return torch.Tensor._make_subclass(Adjacency, torch.empty_strided(size, (0,) * len(size), device="meta"))


def to_sparse(adjacency: Adjacency) -> Tensor:
    """The torch.sparse matrix that an adjacency stands for."""
    with torch._C.DisableTorchFunctionSubclass():
        size, index, value = torch.Tensor.size(adjacency), adjacency._index, adjacency._value
        if adjacency._layout == torch.sparse_coo:
            return torch.sparse_coo_tensor(index, value, size, is_coalesced=True, check_invariants=False)
        return torch.sparse_compressed_tensor(
            adjacency._pointer, index, value, size, layout=adjacency._layout, check_invariants=False
        )


@torch._dynamo.disable
def _outside(func: Any, args: Any, kwargs: Any) -> Any:
    """Calls a function with the real matrices; what it makes of them is handed on as stand-ins."""
    _say_once(func)
    args, kwargs = _torch.pytree.tree_map_only(Adjacency, to_sparse, (args, kwargs))
    result = func(*args, **kwargs)
    return _torch.pytree.tree_map(lambda v: from_sparse(v) if is_sparse(v) and not refusal(v) else v, result)


def _say_once(func: Any) -> None:
    warn_once(
        f"{_layer()}{_name(func)} of a sparse adjacency is not traced: it runs outside of the "
        f"compiled graph, and what it saves for backward is not compressed. {INSTEAD}"
    )


INSTEAD = (
    "Pass edge_index, edge_weight = actcompile.edges_of(adjacency) to the layer instead, if it treats both alike"
)
_said: set[str] = set()


def warn_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=4)


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name  # an attribute's getter


def _layer() -> str:
    """The module whose code runs, for a message."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), nn.Module):
            return f"{type(frame.f_locals['self']).__name__}: "
        frame = frame.f_back
    return ""
