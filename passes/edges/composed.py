"""`composed`: a product of what another product makes of edge features is one product of both matrices.

Edge features are few, and often widened once for all layers, each of which multiplies them again: `(x W + b) V`, with
a wide product for every edge, layer, direction and time that backward computes it again. But that is `x (W V) + b V`,
as narrow as the features are; and the gradient by `V`, `(x W + b)^T g`, is `W^T (x^T g) + b (sum g)^T`, of which the
gradient by `W` reads the same `x^T g`. Each is another order of the same sums. It is done of rows of edges that are
half as wide as what is made of them, or less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph import _torch
from ..graph.split import call, is_tensor
from .rows import Rows
from .takes import PRODUCTS, is_transposed, original

aten = torch.ops.aten


@dataclass(frozen=True)
class Widened:
    """Rows of edges times a matrix, and a bias; None where there is none."""

    rows: fx.Node
    weights: fx.Node
    bias: fx.Node | None


def composed(joint: fx.Graph) -> None:
    """Composes products of edge features of a joint graph, in place."""
    rows = Rows(joint)
    for node in list(joint.nodes):
        if node.target in PRODUCTS and is_tensor(node) and not node.kwargs:
            with joint.inserting_before(node):
                new = _rewritten(joint, node, rows)
            if new is not None:
                node.replace_all_uses_with(new)
    joint.eliminate_dead_code()


def _rewritten(graph: fx.Graph, node: fx.Node, rows: Rows) -> fx.Node | None:
    def made(target: Any, *args: Any) -> fx.Node:
        return call(graph, target, *args, like=node)

    def transposed(matrix: fx.Node) -> fx.Node:
        return made(aten.permute.default, matrix, [1, 0])

    *bias, one, other = node.args
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return None
    if not is_transposed(one):
        wide = _widened(one, rows)
        if wide is None:
            return None
        weights = made(aten.mm.default, wide.weights, other)
        if wide.bias is not None:
            row = made(aten.squeeze.dim, made(aten.mm.default, made(aten.unsqueeze.default, wide.bias, 0), other), 0)
            bias = [made(aten.add.Tensor, row, *bias) if bias else row]
        return made(aten.addmm.default if bias else aten.mm.default, *bias, wide.rows, weights)
    if bias:
        return None
    left: fx.Node = one.args[0]  # type: ignore[assignment]
    if (wide := _widened(left, rows)) is not None:
        result = made(aten.mm.default, transposed(wide.weights), made(aten.mm.default, transposed(wide.rows), other))
        if wide.bias is not None:
            sums = made(aten.sum.dim_IntList, other, [0], True)
            result = made(
                aten.add.Tensor, result, made(aten.mul.Tensor, made(aten.unsqueeze.default, wide.bias, 1), sums)
            )
        return result
    if (wide := _widened(other, rows)) is not None:
        result = made(aten.mm.default, made(aten.mm.default, transposed(left), wide.rows), wide.weights)
        if wide.bias is not None:
            sums = transposed(made(aten.sum.dim_IntList, left, [0], True))
            result = made(
                aten.add.Tensor, result, made(aten.mul.Tensor, sums, made(aten.unsqueeze.default, wide.bias, 0))
            )
        return result
    return None


def _widened(value: fx.Node, rows: Rows) -> Widened | None:
    """How rows of edges were widened; None where they are no such rows."""
    value = original(value)
    if value.target not in PRODUCTS or value.kwargs or rows.has_nodes(value):
        return None
    *bias, features, weights = value.args
    if not all(isinstance(n, fx.Node) for n in value.args) or is_transposed(features):
        return None
    if value.meta["val"].dtype not in (torch.float32, torch.float64) or (bias and bias[0].meta["val"].dim() != 1):  # type: ignore[union-attr]
        return None
    narrow, wide = (_torch.size_hint(size) for size in weights.meta["val"].shape)  # type: ignore[union-attr]
    if 2 * narrow > wide or rows.taken(features) or rows.take_beside(value) is None:  # type: ignore[arg-type]
        return None
    return Widened(features, weights, bias[0] if bias else None)  # type: ignore[arg-type]
