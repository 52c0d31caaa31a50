"""`own`: every gradient that backward returns has memory of its own.

Layers that do the same have gradients that are the same, and torch makes what is made twice only once. Returned for two
parameters, one tensor would be the gradient of both, and a second step would add to it twice.
"""

import operator

import torch
from torch import fx

from ..graph.split import call, is_tensor, root


def own(backward: fx.Graph) -> None:
    """Copies what a backward graph returns a second time, in place."""
    output = backward.output_node()
    returned = output.args[0]
    if not isinstance(returned, (list, tuple)):
        return
    seen: set[object] = set()
    outputs = list(returned)
    for i, node in enumerate(outputs):
        if not isinstance(node, fx.Node) or not is_tensor(node):
            continue
        memory: object = root(node)
        if isinstance(memory, fx.Node) and memory.target is operator.getitem:
            memory = memory.args
        if memory in seen:
            with backward.inserting_before(output):
                outputs[i] = call(backward, torch.ops.aten.clone.default, node, like=node)
        seen.add(memory)
    output.args = (type(returned)(outputs),)
