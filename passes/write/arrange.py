"""`arrange`: edges that a graph makes are grouped once for each direction, and so are their other ends arranged.

Every layer's message passing takes these in the order of the grouping, forward and backward each in its own. For edges
that are inputs both are remembered; of edges that a graph makes, self-loops among them, each op would do it anew.
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
    """Has the calls of `edges` and `aggregate` that group and arrange the same indices alike share it, in place."""
    _group_once(graph)
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


def _group_once(graph: fx.Graph) -> None:
    """Leaves the first grouping of those that are alike."""
    known: dict[object, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=ops.group_edges.default):
        by, row, nodes = node.args
        size = nodes.meta["val"] if isinstance(nodes, fx.Node) else nodes
        first = known.setdefault((by, row, str(size)), node)
        if first is node or any(user.op == "output" for part in node.users for user in part.users):
            continue
        parts = {part.args[1]: part for part in first.users}
        for part in list(node.users):
            part.replace_all_uses_with(parts[part.args[1]])
            graph.erase_node(part)
        graph.erase_node(node)


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
