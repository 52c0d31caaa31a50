"""`arrange`: the other ends of edges that a graph groups itself are put into the order of the grouping once.

Every layer's message passing takes them in that order, forward and backward each in its own. For edges that are inputs
both are remembered; of edges that a graph makes, self-loops among them, each op would arrange them anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from actcompile.kernels.edges.ops import ARRANGED
from actcompile.kernels.edges.program import parse

from ..graph import _torch
from ..graph.split import call

aten, ops = torch.ops.aten, torch.ops.actcompile
Key = tuple[fx.Node, int, fx.Node, str]
"""An index, its row, the order, and the number of nodes that it may name."""


def arrange(graph: fx.Graph) -> None:
    """Has the calls of `edges` and `aggregate` that arrange the same index alike share what comes of it, in place."""
    found: dict[Key, list[tuple[fx.Node, int, fx.Node]]] = {}
    for node in graph.nodes:
        for slot, key, matrix in _arranged_by(node):
            found.setdefault(key, []).append((node, slot, matrix))
    for (index, row, order, _), users in found.items():
        if len(users) < 2:
            continue
        first, _, matrix = users[0]
        with graph.inserting_before(first):
            size = matrix.meta["val"].shape[0]
            nodes = size if isinstance(size, int) else call(graph, aten.sym_size.int, matrix, 0, like=matrix)
            shared = call(graph, ops.arrange_edges.default, index, row, nodes, order, like=first)
        for node, slot, _ in users:
            _take(node, slot, shared)


def _arranged_by(node: fx.Node) -> Iterator[tuple[int, Key, fx.Node]]:
    """The indices that a call arranges: the place of each, its key, and one of the tensors that are read by it."""
    args: Any = node.args
    if node.target is ops.aggregate.default:
        matrix, _, take, row, *_, grouped = args
        if grouped:
            yield 0, (take, row, grouped[1], str(matrix.meta["val"].shape[0])), matrix
    elif node.target is ops.edges.default:
        text, *_, indices, rows, operands, grouped = args
        if not grouped:
            return
        read: dict[int, list[fx.Node]] = {}
        for operand, tensor in zip(parse(text).operands, operands, strict=True):
            if operand.where == "take" and operand.index >= 0:
                read.setdefault(operand.index, []).append(tensor)
        for slot, (one, *others) in read.items():
            size = one.meta["val"].shape[0]
            if all(_torch.known_true(tensor.meta["val"].shape[0] == size) for tensor in others):
                yield slot, (indices[slot], rows[slot], grouped[1], str(size)), one


def _take(node: fx.Node, slot: int, shared: fx.Node) -> None:
    """Has a call read what was arranged already."""
    args: list[Any] = list(node.args)
    if node.target is ops.aggregate.default:
        args[2:4] = shared, ARRANGED
    else:
        for place, value in ((6, shared), (7, ARRANGED)):
            args[place] = [value if i == slot else old for i, old in enumerate(args[place])]
    node.args = tuple(args)
