"""`own`: what a graph returns as two tensors are two.

Layers that do the same make the same, and torch has what is made twice made once. It sees to it that results which a
graph returns stay apart, but not where one op makes several, as regions of message passing do. Then one tensor would
be the gradient of two parameters, and a second step would add to it twice; or a user who writes to one output would
change another.
"""

import operator

import torch
from torch import fx

from ..graph import _torch
from ..graph.split import call, is_tensor, root


def own(graph: fx.Graph, count: int) -> None:
    """Copies those of the first `count` results that share memory with an earlier one, and did not as traced."""
    output = graph.output_node()
    returned = output.args[0]
    if not isinstance(returned, (list, tuple)):
        return
    first: dict[object, fx.Node] = {}  # by memory
    results = list(returned)
    for i, node in enumerate(results[:count]):
        if isinstance(node, fx.Node) and is_tensor(node):
            earlier = first.setdefault(_memory(node), node)
            if earlier is not node and _storage(earlier) != _storage(node):
                with graph.inserting_before(output):
                    results[i] = call(graph, torch.ops.aten.clone.default, node, like=node)
    output.args = (type(returned)(results),)


def _storage(node: fx.Node) -> _torch.StorageWeakRef:
    """The memory of a node as it was traced."""
    return _torch.StorageWeakRef(node.meta["val"].untyped_storage())


def _memory(node: fx.Node) -> object:
    """What names the memory of a node: the node that makes it, or an op and which of its results it is."""
    maker = root(node)
    return maker.args if maker.target is operator.getitem else maker
