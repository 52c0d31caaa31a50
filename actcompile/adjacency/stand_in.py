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

from actcompile.kernels import rows_of
from actcompile.passes.graph import _torch

HANDLERS: dict[Any, Callable[..., Any]] = {}
"""What the stand-in does in the graph: `ops` has it. `NotImplemented` leaves a call to the real matrix."""

HANDLED = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


def _answer(name: str, answer: Callable[[Any], Any]) -> Any:
    """An attribute as models see it. To torch.compile itself, outside of what it traces, the stand-in is as it is."""
    own = getattr(torch.Tensor, name).__get__

    def get(self: Adjacency) -> Any:
        if not torch.compiler.is_dynamo_compiling() and _torch.compiling():
            with _torch.DisableTorchFunctionSubclass():
                return own(self)
        return answer(self)

    return property(get)


class Adjacency(torch.Tensor):
    """A sparse matrix as dense tensors.

    The tensor itself has the matrix's size and dtype, is on the meta device and has no data: what reads it by mistake
    fails.

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
    _pointer: Any
    _index: Tensor
    _value: Tensor
    _others: Tensor | None
    _counted: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_dynamo_compiling() and _torch.compiling():
            with _torch.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is not None:
            with _torch.DisableTorchFunctionSubclass():
                result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _outside(func, args, kwargs)

    layout = _answer("layout", lambda a: a._layout)
    device = _answer("device", lambda a: a._value.device)
    shape = _answer("shape", lambda a: a.size())
    requires_grad = _answer("requires_grad", lambda a: a._value.requires_grad)
    is_sparse = _answer("is_sparse", lambda a: a._layout == torch.sparse_coo)
    is_sparse_csr = _answer("is_sparse_csr", lambda a: a._layout == torch.sparse_csr)
    is_cuda = _answer("is_cuda", lambda a: a._value.is_cuda)
    is_cpu = _answer("is_cpu", lambda a: a._value.is_cpu)
    is_meta = _answer("is_meta", lambda a: a._value.is_meta)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adjacency:
        if id(self) not in memo:
            made = memo[id(self)] = _stand_in(torch.Tensor.size(self), self.dtype)
            for name, value in vars(self).items():
                setattr(made, name, copy.deepcopy(value, memo))
        return memo[id(self)]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"traceable({to_sparse(self)!r})"


class Pointer(torch.Tensor):
    """The pointer of a CSR matrix, known as one: by it, PyTorch Geometric's functions are traced as sums over rows."""

    __torch_function__ = _torch.disabled_torch_function  # type: ignore[assignment]  # ops give plain tensors


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


def like(adjacency: Adjacency, layout: torch.layout, pointer: Any, index: Tensor, value: Tensor) -> Adjacency:
    """Makes an adjacency of the same size inside a model."""
    size = (*torch.Tensor.size(adjacency)[:2], *value.shape[1:])
    empty = torch.empty_strided(size, (0,) * len(size), dtype=value.dtype, device="meta")
    made: Any = empty.as_subclass(Adjacency)
    made._layout, made._pointer, made._index, made._value = layout, pointer, index, value
    made._others, made._counted = None, False
    return made


def with_values(adjacency: Adjacency, value: Tensor) -> Adjacency:
    """The same entries with other values."""
    made = like(adjacency, adjacency._layout, adjacency._pointer, adjacency._index, value)
    made._others, made._counted = adjacency._others, adjacency._counted
    return made


# ---- to and from torch.sparse


def is_sparse(value: Any) -> bool:
    """Whether a value is a torch.sparse tensor."""
    return isinstance(value, Tensor) and not isinstance(value, Adjacency) and value.layout is not torch.strided


def refusal(matrix: Tensor) -> str | None:
    """Why a torch.sparse tensor has no stand-in, or None where it has."""
    if matrix.layout not in HANDLED:
        return f"its layout is {matrix.layout}; give it one of COO, CSR and CSC"
    if matrix.sparse_dim() != 2 or (
        matrix.layout != torch.sparse_coo and matrix.values().dim() != 1 + matrix.dense_dim()
    ):
        return f"it has the shape {tuple(matrix.shape)} and is no sparse matrix"
    if matrix.layout == torch.sparse_coo and not matrix.is_coalesced():
        return "it is not coalesced; pass adjacency.coalesce()"
    return None


def from_sparse(matrix: Tensor, others: Tensor | None = None, counted: bool = False) -> Adjacency:
    """The stand-in of a torch.sparse matrix; shares its memory, and hands gradients on to it."""
    # Not as views: Dynamo would trace their base, too, which is the matrix itself.
    value = matrix.values().clone() if matrix.requires_grad and torch.is_grad_enabled() else matrix.values().detach()
    made: Any = _stand_in(matrix.shape, matrix.dtype)
    made._layout, made._value, made._others, made._counted = matrix.layout, value, others, counted
    if matrix.layout == torch.sparse_coo:
        made._pointer, made._index = None, matrix.indices().detach()
    elif matrix.layout == torch.sparse_csr:
        made._pointer, made._index = matrix.crow_indices().detach(), matrix.col_indices().detach()
    else:
        made._pointer, made._index = matrix.ccol_indices().detach(), matrix.row_indices().detach()
    return made


def _stand_in(size: torch.Size, dtype: torch.dtype) -> Any:
    empty = torch.empty_strided(size, (0,) * len(size), dtype=dtype, device="meta")
    return _torch.make_subclass(Adjacency, empty)


def to_sparse(adjacency: Adjacency) -> Tensor:
    """The torch.sparse matrix that an adjacency stands for."""
    with _torch.DisableTorchFunctionSubclass():
        size, index, value = torch.Tensor.size(adjacency), adjacency._index, adjacency._value
        if adjacency._layout == torch.sparse_coo:
            return torch.sparse_coo_tensor(index, value, size, is_coalesced=True, check_invariants=False)
        return torch.sparse_compressed_tensor(
            adjacency._pointer, index, value, size, layout=adjacency._layout, check_invariants=False
        )


@torch.compiler.disable
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


INSTEAD = "Pass edge_index, edge_weight = actcompile.edges_of(adjacency) to the layer instead, if it treats both alike"
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
