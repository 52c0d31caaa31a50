"""`along`: what is summed up over all edges is multiplied with weights after that.

The gradient of a layer on edge features is a product along the edges, `x^T g`, and a sum over them for its bias.
Where several layers read what it made, `g = g_1 W_1 + g_2 W_2 + ...`, with a product for every edge and layer, whose
results wait for each other in rows of edges. But `x^T (g_1 W_1) = (x^T g_1) W_1`: each layer's part is a region of
its own that holds nothing of [edges, features], and one product of small matrices. It is done where that is less
work, and where nothing else reads `g`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph import _torch
from ..graph.split import call, is_tensor
from .rows import Rows
from .takes import is_transposed, original

aten = torch.ops.aten
Summand = tuple[int, fx.Node, fx.Node | None]  # a sign, rows of edges, and what they are multiplied with


def along(joint: fx.Graph) -> None:
    """Moves products of a joint graph behind sums over all edges, in place."""
    rows = Rows(joint)
    for node in list(joint.nodes):
        new = _moved(joint, node, rows)
        if new is not None:
            node.replace_all_uses_with(new)
    joint.eliminate_dead_code()


def _moved(graph: fx.Graph, node: fx.Node, rows: Rows) -> fx.Node | None:
    match node:
        case fx.Node(target=aten.mm.default, args=(fx.Node(args=(fx.Node() as one, _)) as first, fx.Node() as other)):
            if is_transposed(first):
                return _Sum(graph, node, other, one, rows).write() or _Sum(graph, node, one, other, rows).write(True)
        case fx.Node(target=aten.sum.dim_IntList, args=(fx.Node() as value, [0], *_)) if not node.kwargs:
            result = _Sum(graph, node, value, None, rows).write()
            if result is not None and node.meta["val"].dim() == 1:
                with graph.inserting_before(node):
                    return call(graph, aten.squeeze.dim, result, 0, like=node)
            return result
    return None


class _Sum:
    """What is summed up over all edges: `other^T value`, or, where there is no other, the rows of `value`.

    Args:
        node: what is it so far.
    """

    def __init__(self, graph: fx.Graph, node: fx.Node, value: fx.Node, other: fx.Node | None, rows: Rows) -> None:
        self.graph, self.node, self.value, self.other, self.rows = graph, node, original(value), other, rows

    def write(self, swapped: bool = False) -> fx.Node | None:
        """The sum, or its transpose, with products behind it; None where nothing is to move.

        Each summand is made as soon as what it is made of is there, so that this waits for nothing.
        """
        summands = self._summands()
        if not any(weights is not None for _, _, weights in summands):
            return None
        result: fx.Node | None = None
        for sign, rows, weights in sorted(summands, key=lambda s: s[1]):
            latest = max(n for n in (rows, weights, self.other, result) if n is not None)
            with self.graph.inserting_before(self.node if latest.op == "placeholder" else latest.next):
                term = self._over_edges(rows)
                if weights is not None:
                    term = self._call(aten.mm.default, term, weights)
                if result is None:
                    result = term if sign > 0 else self._call(aten.neg.default, term)
                else:
                    result = self._call(aten.add.Tensor if sign > 0 else aten.sub.Tensor, result, term)
        if not swapped:
            return result
        with self.graph.inserting_before(self.node):
            return self._call(aten.permute.default, result, [1, 0])

    def _summands(self) -> list[Summand]:
        """The rows that the value is the sum of, and what they are multiplied with, where that can wait."""
        if not self.rows.taken(self.value) or not all(map(_sums_up, self.value.users)):
            return []
        todo, found = [(1, self.value)], list[Summand]()
        while todo:
            sign, node = todo.pop()
            only = node is self.value or len(node.users) == 1
            match node:
                case fx.Node(target=aten.add.Tensor | aten.sub.Tensor, args=(fx.Node() as a, fx.Node() as b)) if (
                    only and not node.kwargs and _are_like(node, a, b)
                ):
                    todo += ((sign, a), (sign if node.target is aten.add.Tensor else -sign, b))
                case fx.Node(target=aten.neg.default, args=(fx.Node() as a,)) if only:
                    todo.append((-sign, a))
                case fx.Node(target=aten.mm.default, args=(fx.Node() as g, fx.Node() as weights)) if (
                    only and self.rows.taken(g) and self._is_less_work(weights)
                ):
                    found.append((sign, g, weights))
                case _:
                    found.append((sign, node, None))
        return found

    def _is_less_work(self, weights: fx.Node) -> bool:
        """Whether to sum up first is less work for each edge than to multiply first."""
        size_in, size_out = map(_torch.size_hint, weights.meta["val"].shape)
        width = 1 if self.other is None else _torch.size_hint(self.other.meta["val"].shape[-1])
        return bool(width * size_in <= size_out * (size_in + width))

    def _over_edges(self, rows: fx.Node) -> fx.Node:
        if self.other is None:
            return self._call(aten.sum.dim_IntList, rows, [0], True)
        return self._call(aten.mm.default, self._call(aten.permute.default, self.other, [1, 0]), rows)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return call(self.graph, target, *args, like=self.node)


def _are_like(node: fx.Node, *others: fx.Node) -> bool:
    sizes = node.meta["val"].shape
    return all(is_tensor(other) and _torch.same_sizes(other.meta["val"].shape, sizes) for other in others)


def _sums_up(user: fx.Node) -> bool:
    """Whether a node sums rows up over all edges, or is a step towards that."""
    if user.target is aten.sum.dim_IntList:
        return user.args[1] == [0]
    return is_transposed(user) or (user.target is aten.mm.default and is_transposed(user.args[0]))
