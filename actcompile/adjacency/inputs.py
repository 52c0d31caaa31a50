"""Sparse adjacencies among the inputs of a model: found, and replaced by what `torch.compile` can trace."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from actcompile.passes.graph import _torch

from . import ops  # noqa: F401  registers what stand-ins do
from .pyg import teach_dynamo
from .stand_in import INSTEAD, Adjacency, columns, from_sparse, is_sparse, refusal, rows, to_sparse, warn_once

_counted = WeakTensorKeyDictionary()  # adjacency -> its version when counted, and its entries that are no self-loops


def edges_of(adjacency: Any) -> tuple[Tensor, Tensor | None]:
    """A sparse adjacency as what PyTorch Geometric's layers take instead of it.

    The adjacency is transposed, as PyTorch Geometric wants it (`adj_t`): row i holds the edges that end at node i.

    Args:
        adjacency: a torch.sparse matrix (COO, CSR or CSC), (targets, sources); or a `torch_sparse.SparseTensor`.

    Returns:
        edge_index: int64 (2, edges); the first row holds the sources, the second the targets.
        edge_weight: (edges, ...), the adjacency's values, through which gradients reach it; None where a
            `SparseTensor` has none.

    Raises:
        TypeError: it is neither.
        ValueError: it is no matrix, or of another layout.
    """
    if _is_sparse_tensor(adjacency):
        row, column, value = adjacency.coo()
        return torch.stack([column, row]), value
    if not isinstance(adjacency, Adjacency):
        if isinstance(adjacency, Tensor) and adjacency.layout == torch.sparse_coo and not adjacency.is_coalesced():
            adjacency = adjacency.coalesce()
        adjacency = traceable(adjacency)
    return torch.stack([columns(adjacency), rows(adjacency)]).long(), adjacency._value


def traceable(adjacency: Tensor) -> Tensor:
    """A sparse adjacency as a tensor that `torch.compile` can trace, with any backend.

    A model that `compress` returned makes it by itself. For `torch.compile(model, backend="actcompile")` make it
    before the call, anew wherever the adjacency has changed. It shares the adjacency's memory, looks to the model like
    the adjacency, and hands gradients on to its values.

    Args:
        adjacency: a coalesced torch.sparse matrix: COO, CSR or CSC.

    Raises:
        TypeError: it is no torch.sparse tensor.
        ValueError: it is no matrix, of another layout, or not coalesced; the message says what to do.
    """
    if not isinstance(adjacency, Tensor) or not is_sparse(adjacency):
        kind = type(adjacency).__name__
        raise TypeError(f"adjacency must be a torch.sparse tensor (COO, CSR or CSC), got a {kind} that is not sparse")
    if reason := refusal(adjacency):
        raise ValueError(f"adjacency can't be traced: {reason}")
    return _made(adjacency, self_loops=True)


def accept_sparse(model: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `compiled` with stand-ins in the place of sparse adjacencies; those that it returns become sparse again."""

    def call(*args: Any, **kwargs: Any) -> Any:
        made, changed = with_stand_ins(model, (args, kwargs))
        if not changed:
            return compiled(*args, **kwargs)
        result = compiled(*made[0], **made[1])
        return _torch.pytree.tree_map_only(Adjacency, to_sparse, result)

    return call


def with_stand_ins(model: Any, inputs: Any) -> tuple[Any, bool]:
    """Inputs with stand-ins in the place of sparse adjacencies, in any nesting, and whether there were any."""
    leaves, spec = _torch.pytree.tree_flatten(inputs)
    made = [_replaced(model, leaf) for leaf in leaves]
    if all(new is old for new, old in zip(made, leaves, strict=True)):
        return inputs, False
    return _torch.pytree.tree_unflatten(made, spec), True


def _replaced(model: Any, leaf: Any) -> Any:
    if is_sparse(leaf):
        if reason := refusal(leaf):
            warn_once(f"a sparse tensor among the model's inputs is not traced: {reason}. {INSTEAD}")
            return leaf
        return _made(leaf, self_loops=_adds_self_loops(model))
    if _is_sparse_tensor(leaf):
        warn_once(
            "torch_sparse.SparseTensor can't be traced: what layers save for backward is not compressed. Pass "
            f"adjacency.to_torch_sparse_csr_tensor(), whose values layers may treat otherwise. {INSTEAD}"
        )
    elif _is_data(leaf) and any(is_sparse(value) for store in leaf.stores for value in store.values()):
        return copy.copy(leaf).apply(lambda value: _replaced(model, value))
    return leaf


def _made(adjacency: Tensor, self_loops: bool) -> Adjacency:
    teach_dynamo()
    if not self_loops or adjacency.layout == torch.sparse_csc:
        return from_sparse(adjacency)
    return from_sparse(adjacency, _others(adjacency), counted=True)


def _others(adjacency: Tensor) -> Tensor | None:
    """The entries that are no self-loops, or None if all are none; looked for anew only where something was written."""
    version = None if adjacency.is_inference() else adjacency._version
    known = _counted.get(adjacency)
    if known is None or version is None or known[0] != version:
        with torch.no_grad():
            stand_in = from_sparse(adjacency)
            different = rows(stand_in) != columns(stand_in)
            known = version, None if bool(different.all()) else different.nonzero()[:, 0]
        _counted[adjacency] = known
    return known[1]


def _adds_self_loops(model: Any) -> bool:
    """Whether layers may add self-loops, which asks for those that are there; by PyTorch Geometric's own attribute."""
    return isinstance(model, nn.Module) and any(getattr(m, "add_self_loops", False) for m in model.modules())


def _is_sparse_tensor(value: Any) -> bool:
    package = sys.modules.get("torch_sparse")
    return package is not None and isinstance(value, package.SparseTensor)


def _is_data(value: Any) -> bool:
    package = sys.modules.get("torch_geometric.data.data")
    return package is not None and isinstance(value, package.BaseData)
