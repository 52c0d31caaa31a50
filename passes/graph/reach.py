"""`reach`: which gradients are computed from which saved activation."""

from torch import fx

from . import _torch
from .split import Split


def reach(split: Split) -> dict[fx.Node, tuple[int, ...]]:
    """For every input of the backward graph, the positions of the graph's inputs whose gradients depend on it.

    Positions count the inputs of the graph that Dynamo made, parameters among them. A gradient that torch does not
    describe so (that of a tensor subclass's part) counts as one of position -1.
    """
    output = split.backward.graph.output_node()
    returned = output.args[0]
    descriptors = output.meta.get("desc") or [None] * len(returned)  # type: ignore[arg-type]
    reached: dict[fx.Node, set[int]] = {}
    for gradient, descriptor in zip(returned, descriptors, strict=True):  # type: ignore[arg-type]
        if isinstance(gradient, fx.Node):
            position = _torch.gradient_of(descriptor)
            reached.setdefault(gradient, set()).add(-1 if position is None else position)
    for node in reversed(split.backward.graph.nodes):
        for argument in node.all_input_nodes if node is not output else ():
            reached.setdefault(argument, set()).update(reached.get(node, ()))
    inputs = split.backward.graph.find_nodes(op="placeholder")
    return {node: tuple(sorted(reached.get(node, ()))) for node in inputs}
