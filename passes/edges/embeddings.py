"""`embeddings`: rows of a table of parameters, taken for every edge, are rows taken by an index like any other.

Edges often have types, such as a molecule's bonds, and a layer looks up a row for each. torch has an op of its own for
that, and another for its gradient, which adds the rows of edges up by type. Written as an `index` and an `index_put`,
both belong to the region of message passing that reads or makes the rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ..graph import _torch
from ..graph.split import call, is_tensor
from .rows import rows_of_nodes
from .takes import index_of, reduction_of, take_of

aten = torch.ops.aten


def embeddings(joint: fx.Graph) -> None:
    """Writes embeddings and their gradients as takes and sums, in place, where other rows are taken or added up for as
    many edges, and these are no nodes of others."""
    nodes = rows_of_nodes(joint)
    lengths = [n for n in _lengths(joint) if not any(_torch.known_true(n == size) for size in nodes)]
    for node in list(joint.nodes):
        indices = _looked_up(node)
        index = index_of(indices)
        if indices is None or index is None or not any(_torch.known_true(index.edges == n) for n in lengths):
            continue
        with joint.inserting_before(node):
            if node.target is aten.embedding.default:
                new = call(joint, aten.index.Tensor, node.args[0], [indices], like=node)
            else:
                zeros, mask, _, rows = node.args
                if not _is_in_range(mask, indices):
                    rows = call(joint, aten.where.self, mask, rows, _zero(joint, rows), like=node)
                new = call(joint, aten.index_put.default, zeros, [indices], rows, True, like=node)
        node.replace_all_uses_with(new)
    joint.eliminate_dead_code()


def _lengths(joint: fx.Graph) -> Iterator[object]:
    """How many rows are taken at once, or added up."""
    for node in joint.nodes:
        if is_tensor(node) and (found := take_of(node) or reduction_of(node)) is not None:
            yield found.index.edges


def _looked_up(node: fx.Node) -> fx.Node | None:
    """By which rows a node takes embeddings, or adds up their gradients."""
    match node:
        case fx.Node(target=aten.embedding.default, args=(_, fx.Node() as indices, *_)):
            return indices
        case fx.Node(
            target=aten._unsafe_masked_index_put_accumulate.default,
            args=(fx.Node() as zeros, fx.Node() as mask, [fx.Node() as indices], _),
        ) if zeros.meta["val"].is_floating_point() and mask.meta["val"].dim() == 2:
            return indices
    return None


def _is_in_range(mask: object, indices: fx.Node) -> bool:
    """Whether a mask is true wherever indices are rows of their table, which the lookup itself demands."""
    match mask:
        case fx.Node(target=aten.unsqueeze.default, args=(inner, *_)):
            return _is_in_range(inner, indices)
        case fx.Node(target=aten.bitwise_and.Tensor | aten.logical_and.default, args=(one, other)):
            return _is_in_range(one, indices) and _is_in_range(other, indices)
        case (
            fx.Node(target=aten.ge.Scalar, args=(compared, 0)) | fx.Node(target=aten.lt.Scalar, args=(compared, int()))
        ):
            return compared is indices
        case fx.Node(target=aten.ne.Scalar, args=(compared, int() as padding)):
            return compared is indices and padding < 0
    return False


def _zero(joint: fx.Graph, rows: fx.Node) -> fx.Node:
    value = rows.meta["val"]
    return call(joint, aten.full.default, [], 0.0, dtype=value.dtype, device=value.device)
