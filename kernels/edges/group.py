"""The grouping of a graph's edges by a node: made once, shared by all layers and both directions, and remembered.

On the CPU a counting sort in C++, elsewhere, or where there is no compiler, a stable sort by torch.

It is remembered for the tensor of the edges, by identity and version, and dies with it. Never by address: the allocator
gives the next mini-batch the same one.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._cpp import I32, I64, P, library
from .._torch import assert_on_device

FUNCTIONS = {"group": ((P, I32, I64, I64, P, P), I64), "arrange": ((P, I32, P, I64, I64, P), I64)}
MOST = 2**31 - 1  # edges and nodes that an int32 counts


@dataclass
class Grouping:
    """Edges by node.

    pointer: int32, (nodes + 1,): the edges of node `i` are the places `pointer[i]` to `pointer[i + 1]`.
    order: int32, (edges,): the edge at each place; None where the edges are in order as they are.
    longest: the number of edges of the node that has most; None where it is not known.
    """

    pointer: Tensor
    order: Tensor | None
    longest: int | None = None
    arranged: dict[tuple[int, int, int], tuple[weakref.ref[Tensor], int, Tensor]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        tensors = [self.pointer, self.order, *(tensor for _, _, tensor in list(self.arranged.values()))]
        return sum(t.nbytes for t in tensors if t is not None)

    def arrange(self, edges: Tensor, row: int, nodes: int, remember: bool) -> Tensor:
        """Which node each edge has at its other end, by place: int32, (edges,)."""
        key = id(edges), row, nodes
        found = self.arranged.get(key)
        if found is not None and found[0]() is edges and found[1] == _version(edges):
            return found[2]
        index = row_of(edges, row)
        if _is_counted(index):
            out = torch.empty(index.shape[0], dtype=torch.int32)
            wide = index.dtype == torch.int64
            code = _cpp().arrange(index.data_ptr(), wide, _address(self.order), index.shape[0], nodes, out.data_ptr())
            _check(code >= 0, nodes)
        else:
            index = _from_start(index, nodes)
            out = (index if self.order is None else index.index_select(0, self.order)).int()
            _check_all((index >= 0) & (index < nodes), nodes)
        if remember and not edges.is_inference():  # it has no version that tells of changes
            for other in [k for k, (ref, _, _) in list(self.arranged.items()) if ref() is None]:
                self.arranged.pop(other, None)
            self.arranged[key] = weakref.ref(edges), edges._version, out
        return out


_remembered: dict[int, tuple[weakref.ref[Tensor], int, dict[tuple[int, int], Grouping]]] = {}
_lock = threading.Lock()


def group(edges: Tensor, row: int, nodes: int, wait: bool = True) -> Grouping:
    """Groups edges by the node that row `row` of `edges` names: all of it, with -1. Nothing is remembered.

    Args:
        wait: on CUDA, whether to wait for the device, and learn whether the edges are in order and how many a node has.

    Raises:
        IndexError: a node is out of range. On CUDA without `wait` the device finds that, as in torch's own indexing.
    """
    index = row_of(edges, row)
    if not _is_counted(index):
        return _group_by_sorting(_from_start(index, nodes), nodes, wait)
    count = index.shape[0]
    pointer, order = torch.empty(nodes + 1, dtype=torch.int32), torch.empty(count, dtype=torch.int32)
    wide = index.dtype == torch.int64
    code = _cpp().group(index.data_ptr(), wide, count, nodes, pointer.data_ptr(), order.data_ptr())
    _check(code >= 0, nodes)
    return Grouping(pointer, None if code == 1 else order)


def _group_by_sorting(index: Tensor, nodes: int, wait: bool) -> Grouping:
    """`group` in torch ops."""
    inside = (index >= 0) & (index < nodes)
    key, order = torch.sort(index.int(), stable=True)
    pointer = torch.searchsorted(key, torch.arange(nodes + 1, dtype=torch.int32, device=key.device), out_int32=True)
    order = order.int()
    if not wait:
        _check_all(inside, nodes)
        return Grouping(pointer, order)
    sorted_, longest = (index[1:] >= index[:-1]).all(), pointer.diff(prepend=pointer[:1]).max()
    # Once, and last: other streams may read what is remembered.
    fine, in_order, most = torch.stack([inside.all().int(), sorted_.int(), longest]).tolist()
    _check(fine, nodes)
    return Grouping(pointer, None if in_order else order, most)


def grouping(edges: Tensor, row: int, nodes: int) -> Grouping:
    """As `group`, remembered as long as the tensor lives and is not changed."""
    version = _version(edges)
    with _lock:
        found = _remembered.get(id(edges))
        if found is None or found[0]() is not edges or found[1] != version:
            dies = weakref.ref(edges, partial(_forget, id(edges)))
            found = _remembered[id(edges)] = dies, version, {}
        known = found[2]
        if (row, nodes) not in known:
            known[row, nodes] = group(edges, row, nodes)
        return known[row, nodes]


def remembered_nbytes(edges: Tensor | None = None) -> int:
    """The bytes of the groupings that are remembered now: of a tensor of edges, or all."""
    with _lock:
        found = [known for ref, _, known in list(_remembered.values()) if edges is None or ref() is edges]
        return sum(g.nbytes for known in found for g in known.values())


def _forget(key: int, ref: weakref.ref[Tensor]) -> None:
    found = _remembered.get(key)
    if found is not None and found[0] is ref:
        del _remembered[key]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def row_of(edges: Tensor, row: int) -> Tensor:
    """The index that row `row` of a tensor of edges is, all of it with -1."""
    return (edges if row < 0 else edges[row]).contiguous()


def _from_start(index: Tensor, nodes: int) -> Tensor:
    """An index whose negative elements count from the end, in the form that has none."""
    return torch.where(index < 0, index + nodes, index)


def _check(fine: bool, nodes: int) -> None:
    if not fine:
        raise IndexError(f"an index of edges is out of range: it must be smaller than {nodes}, the number of nodes")


def _check_all(inside: Tensor, nodes: int) -> None:
    """On CUDA the device finds what is wrong, as in torch's own indexing: nothing waits for it."""
    if inside.is_cuda:
        assert_on_device(inside.all(), "an index of edges is out of range")
    else:
        _check(bool(inside.all()), nodes)


def _is_counted(index: Tensor) -> bool:
    """Whether an index is grouped by a counting sort in C++, not by torch ops."""
    return index.device.type == "cpu" and has_compiler()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def has_compiler() -> bool:
    """Whether the functions of this file can be used."""
    return _cpp() is not None


def _cpp() -> Any:
    return library("edges/group.cpp", FUNCTIONS)
