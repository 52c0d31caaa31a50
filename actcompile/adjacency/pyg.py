"""What PyTorch Geometric's functions do with a sparse adjacency, for its stand-in.

Those that make sparse tensors, or whose sizes depend on data, can't be traced as they are written. Each has a
replacement here, which Dynamo takes for an `Adjacency` only; all else goes through the original.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actcompile.kernels import pointer_to, rows_of

from .stand_in import Adjacency, Pointer, columns, like, rows, with_values

_taught: list[Any] = []


def teach_dynamo() -> None:
    """Registers the replacements, if PyTorch Geometric is imported, and once."""
    if _taught or "torch_geometric" not in sys.modules:
        return
    from torch_geometric import utils

    for original, replacement in (
        (utils.spmm, _spmm),
        (utils.to_edge_index, _to_edge_index),
        (sys.modules["torch_geometric.utils.sparse"].set_sparse_value, _set_sparse_value),
        (utils.remove_self_loops, _remove_self_loops),
        (utils.add_self_loops, _add_self_loops),
        (utils.segment, _segment),
        (utils.softmax, _softmax),
        (sys.modules["torch_geometric.index"].ptr2index, _ptr2index),
    ):
        _replace(original, replacement)
        _taught.append(original)


def _replace(original: Any, replacement: Callable[..., Any]) -> None:
    """Has Dynamo trace `replacement` where the first argument of a function is an `Adjacency`."""
    # A copy: the original would be replaced in its own replacement.
    copy = types.FunctionType(
        original.__code__, original.__globals__, original.__name__, original.__defaults__, original.__closure__
    )

    def traced(*args: Any, **kwargs: Any) -> Any:
        if isinstance(args[0] if args else None, Adjacency) or any(isinstance(a, Pointer) for a in args):
            result = replacement(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return copy(*args, **kwargs)

    torch.compiler.substitute_in_graph(original, skip_signature_check=True)(traced)


def _spmm(src: Adjacency, other: Tensor, reduce: str = "sum") -> Tensor:
    return torch.sparse.mm(src, other, "sum" if reduce == "add" else reduce)


def _to_edge_index(adj: Adjacency) -> tuple[Tensor, Tensor]:
    return torch.stack([rows(adj), columns(adj)]).long(), adj._value


def _set_sparse_value(adj: Adjacency, value: Tensor) -> Adjacency:
    return with_values(adj, value)


def _remove_self_loops(edge_index: Adjacency, edge_attr: None = None) -> Any:
    adj = edge_index
    if not adj._counted or adj._layout == torch.sparse_csc:
        return NotImplemented
    return (adj if adj._others is None else _select(adj, adj._others)), None


def _select(adj: Adjacency, entries: Tensor) -> Adjacency:
    """Some of the entries, in the same order."""
    if adj._layout == torch.sparse_coo:
        made = like(adj, adj._layout, None, adj._index[:, entries], adj._value[entries])
    else:
        pointer = pointer_to(rows(adj)[entries], torch.Tensor.size(adj, 0))
        made = like(adj, adj._layout, pointer, adj._index[entries], adj._value[entries])
    made._counted = True
    return made


def _add_self_loops(
    edge_index: Adjacency, edge_attr: None = None, fill_value: Any = None, num_nodes: Any = None
) -> Any:
    """Adds 1, or `fill_value`, to the diagonal. Entries stay in the order of rows; a row's self-loop is its last."""
    adj = edge_index
    if not adj._counted or adj._layout == torch.sparse_csc:
        return NotImplemented
    size = torch.Tensor.size(adj)
    number = min(size[0], size[1])
    loops = _loop_values(adj, number, fill_value)
    if adj._others is not None:
        row, value = rows(adj), adj._value
        mask = (row == columns(adj)).view(-1, *[1] * (value.dim() - 1))
        diagonal = value.new_zeros(size[0], *value.shape[1:]).index_add(0, row, torch.where(mask, value, 0.0))
        loops = loops + diagonal[:number]
        adj = _select(adj, adj._others)
    row, column, node = rows(adj), columns(adj), torch.arange(number, device=adj._value.device)
    pointer = pointer_to(row, size[0])
    place = torch.arange(row.shape[0], device=row.device) + row.clamp(max=number)
    place = torch.cat([place, pointer[1 : number + 1] + node])
    order = torch.zeros_like(place).scatter(0, place, torch.arange(place.shape[0], device=row.device))
    row, column = torch.cat([row, node])[order], torch.cat([column, node])[order]
    value = torch.cat([adj._value, loops])[order]
    if adj._layout == torch.sparse_coo:
        return like(adj, adj._layout, None, torch.stack([row, column]), value), None
    more = torch.arange(size[0] + 1, device=row.device).clamp(max=number)
    return like(adj, adj._layout, pointer + more, column, value), None


def _loop_values(adj: Adjacency, number: int, fill_value: Any) -> Tensor:
    from torch_geometric.utils.loop import compute_loop_attr

    return compute_loop_attr(torch.stack([rows(adj), columns(adj)]), adj._value, number, True, fill_value)


def _ptr2index(ptr: Pointer, output_size: int | None = None) -> Any:
    return NotImplemented if output_size is None else rows_of(ptr, output_size)


def _segment(src: Tensor, ptr: Pointer, reduce: str = "sum") -> Tensor:
    from torch_geometric.utils import scatter

    row = rows_of(ptr, src.shape[0])
    return scatter(src, row, dim=0, dim_size=ptr.numel() - 1, reduce=reduce)


def _softmax(src: Tensor, index: Tensor, ptr: Pointer, num_nodes: Any = None, dim: int = 0) -> Tensor:
    from torch_geometric.utils import softmax

    return softmax(src, index, None, num_nodes, dim)
