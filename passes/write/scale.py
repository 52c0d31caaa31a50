"""`scale`: rows that are scaled only to be summed up over edges are scaled as they are read.

The gradient of a mean over neighbours is divided by their number, then handed on along the edges. The gradient itself
is needed behind that, for a layer's root weights, so that three tensors of all nodes' features would be alive at once:
the gradient, the scaled one, and their sums.
"""

import operator

import torch
from torch import fx

from actcompile.kernels.edges.ops import aggregation

from ..graph import _torch
from ..graph.split import call, inherit_origin, is_tensor, readers_of, root

aten, ops = torch.ops.aten, torch.ops.actcompile


def scale(graph: fx.Graph) -> None:
    """Gives sums of rows the factors of the rows, where the rows are alive behind the sum anyway."""
    for node in graph.find_nodes(op="call_function", target=ops.aggregate.default):
        matrix, weight, take, take_row, by, by_row, nodes, grouped = node.args
        found = _scaled(matrix) if weight is None and len(matrix.users) == 1 else None
        if found is None:
            continue
        rows, factor, divides = found
        if all(reader < node for reader in readers_of(root(rows))):  # then nothing else takes memory there
            continue
        value = matrix.meta["val"]
        program = aggregation(str(value.dtype).removeprefix("torch."), scale=True)
        with graph.inserting_before(node):
            if divides:
                factor = call(graph, aten.reciprocal.default, factor, like=factor)
            sums = call(
                graph, ops.edges.default, program, by, by_row, nodes, 1, value.shape[1], [take],
                [take_row], [rows, factor], grouped, like=node,
            )  # fmt: skip
            result = call(graph, operator.getitem, sums, 0, like=node)
        inherit_origin(result, node)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        graph.erase_node(matrix)


def _scaled(node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """Rows, and one number for each of them, which a node multiplies them with or divides them by."""
    match node:
        case fx.Node(target=aten.div.Tensor, args=(fx.Node() as rows, fx.Node() as factor)):
            pairs = [(rows, _column(factor), True)]
        case fx.Node(target=aten.mul.Tensor, args=(fx.Node() as one, fx.Node() as other)):
            pairs = [(one, _column(other), False), (other, _column(one), False)]
        case _:
            return None
    return next((p for p in pairs if _fits(node, *p[:2])), None)


def _column(node: fx.Node) -> fx.Node:
    """The column that a node repeats, or the node itself."""
    match node:
        case fx.Node(target=aten.expand.default, args=(fx.Node() as column, _)):
            return column
    return node


def _fits(node: fx.Node, rows: fx.Node, factor: fx.Node) -> bool:
    if not is_tensor(rows) or not is_tensor(factor):
        return False
    value, other, made = rows.meta["val"], factor.meta["val"], node.meta["val"]
    if value.dim() != 2 or other.dim() != 2 or {value.dtype, other.dtype} != {made.dtype}:
        return False
    same = zip((*value.shape, *other.shape), (*made.shape, made.shape[0], 1), strict=True)
    return isinstance(made.shape[1], int) and all(_torch.known_true(a == b) for a, b in same)
