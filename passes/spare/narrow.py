"""`narrow`: in forward, a layer aggregates what its weights made of the nodes, where that is narrower.

`(A x) W = A (x W)`. A last layer of 256 features and 40 classes then aggregates 40 columns for each neighbour, not 256.
It holds where nothing else needs `A x`: backward does not once `commute` has moved its aggregation behind the product.
"""

import torch
from torch import fx

from ..graph import _torch
from ..graph.rows import Names, row_op, terms
from ..graph.split import Split, ancestors, call
from .commute import copy_row_op

aten = torch.ops.aten
MAPS = ("mul", "div", "aggregate", "spmm", "spmm_transposed")  # what can be made again at another width


def narrow(split: Split) -> list[fx.Node]:
    """Moves products before maps of rows in forward; returns those that went."""
    graph, names = split.forward.graph, Names(split)
    kept = {node for node, _ in split.pairs}
    live = _live(split, kept)
    moved = []
    for product in [n for n in graph.nodes if n.target in (aten.mm.default, aten.addmm.default) and not n.kwargs]:
        *bias, rows, weights = product.args
        chain = _chain(rows, kept, live, names)
        if not chain:
            continue
        source = terms(chain[-1], names)[0][0]
        values = [n.meta["val"] for n in (source, product, rows)]
        if not _torch.known_true(values[1].shape[1] < values[0].shape[1]) or len({v.dtype for v in values}) > 1:
            continue
        with graph.inserting_before(product):
            made = {source: call(graph, aten.mm.default, source, weights, like=product)}
            for node in reversed(chain):
                made[node] = copy_row_op(graph, node, made, names)
            result = made[chain[0]]
            if bias:
                result = call(graph, aten.add.Tensor, result, bias[0], like=product)
        product.replace_all_uses_with(result)
        moved.append(result)
    return moved


def _live(split: Split, kept: set[fx.Node]) -> set[fx.Node]:
    """The nodes of forward that the user or backward still needs."""
    wanted = [*kept, *(n for n in split.user_outputs if isinstance(n, fx.Node))]
    return ancestors(wanted + [n for n in split.forward.graph.nodes if n.op == "call_function" and n.is_impure()])


def _chain(node: object, kept: set[fx.Node], live: set[fx.Node], names: Names) -> list[fx.Node]:
    """The maps of rows that made a matrix, last first, each for this alone; none without a sum of rows."""
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and len(live & node.users.keys()) == 1 and node not in kept:
        op = row_op(node, names)
        if op is None or op.kind not in MAPS:
            break
        chain.append(node)
        node = op.matrix
    while chain and row_op(chain[-1], names).kind in ("mul", "div"):  # type: ignore[union-attr]
        chain.pop()
    return chain
