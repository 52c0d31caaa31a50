"""`summed`: maps of the same rows that are added are one: `x W + x V = x (W + V)`, and `a_i + b_i = (a + b)_i`.

A gate that both ends and the edge have a part in (GatedGCN) multiplies the edge's features for each of them, for every
edge, in forward and wherever backward computes it again; and gradients of several aggregates (PNA) are each read by
every edge. What is added up is a matrix, or a row of each node. It is another order of the same sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import fx

from ..graph import _torch
from ..graph.split import call, is_tensor
from .rows import Rows
from .takes import PRODUCTS, is_transposed, same_sizes, take_of

aten = torch.ops.aten
FLOATS = (torch.float32, torch.float64)


def summed(joint: fx.Graph) -> None:
    """Adds up, of a joint graph, what is made of the same rows for one sum of rows of edges, in place."""
    rows = Rows(joint)
    done: set[fx.Node] = set()
    for node in reversed(list(joint.nodes)):
        if node in done or not _is_sum(node) or rows.has_nodes(node):
            continue
        inner = list(_inside(node))
        done.update(inner)
        leaves = [a for n in inner for a in n.args if isinstance(a, fx.Node) and a not in inner]
        left = [new for group in _groups(leaves, rows) for new in _joined(joint, group, node)]
        if len(left) < len(leaves):
            with joint.inserting_before(node):
                node.replace_all_uses_with(reduce(lambda a, b: call(joint, aten.add.Tensor, a, b, like=node), left))
    joint.eliminate_dead_code()


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two tensors of its own shape."""
    if node.target is not aten.add.Tensor or node.kwargs or not is_tensor(node):
        return False
    value = node.meta["val"]
    if value.dtype not in FLOATS or value.dim() < 2:
        return False
    return all(
        isinstance(a, fx.Node) and is_tensor(a) and a.meta["val"].dtype == value.dtype and same_sizes(a, node, 0)
        for a in node.args
    )


def _inside(node: fx.Node) -> Iterator[fx.Node]:
    """A sum, and the sums that are made for it alone, in the order of what they add."""
    yield node
    for operand in node.args:
        if isinstance(operand, fx.Node) and _is_sum(operand) and len(operand.users) == 1:
            yield from _inside(operand)


def _groups(leaves: list[fx.Node], rows: Rows) -> list[list[fx.Node]]:
    """What is added, each with the others that are made of the same rows."""
    groups: dict[object, list[fx.Node]] = {}
    for leaf in leaves:
        groups.setdefault(_rows_of(leaf, rows) or (leaf, len(groups)), []).append(leaf)
    return list(groups.values())


def _rows_of(leaf: fx.Node, rows: Rows) -> object:
    """What names the rows that a product, or a take, for this sum alone is made of; None for all else."""
    if len(leaf.users) > 1 or leaf.kwargs:
        return None
    if (take := take_of(leaf)) is not None:
        nodes, edges = (_torch.size_hint(n.meta["val"].shape[0]) for n in (take.matrix, leaf))
        return (take.index, str(take.matrix.meta["val"].shape[0])) if nodes < edges else None
    if leaf.target in PRODUCTS and rows.take_beside(leaf) is not None:
        *bias, of, weights = leaf.args
        plain = not is_transposed(of) and not rows.taken(of)  # type: ignore[arg-type]
        if plain and all(b.meta["val"].dim() == 1 for b in bias):  # type: ignore[union-attr]
            return of, str(weights.meta["val"].shape)  # type: ignore[union-attr]
    return None


def _joined(graph: fx.Graph, group: list[fx.Node], end: fx.Node) -> list[fx.Node]:
    """What stands for a group, before the end of the sum: one node, of a group of several."""
    if len(group) == 1:
        return group

    def added(nodes: list[fx.Node]) -> fx.Node:
        return reduce(lambda a, b: call(graph, aten.add.Tensor, a, b, like=group[0]), nodes)

    first = group[0]
    with graph.inserting_before(end):
        if (take := take_of(first)) is not None:
            matrix = added([take_of(leaf).matrix for leaf in group])  # type: ignore[union-attr]
            arguments = [matrix if a is take.matrix else a for a in first.args]
            return [call(graph, first.target, *arguments, like=first)]
        weights = added([leaf.args[-1] for leaf in group])  # type: ignore[misc]
        bias = [leaf.args[0] for leaf in group if leaf.target is aten.addmm.default]
        if bias:
            return [call(graph, aten.addmm.default, added(bias), first.args[-2], weights, like=first)]  # type: ignore[arg-type]
        return [call(graph, aten.mm.default, first.args[-2], weights, like=first)]
