"""`late`: backward makes what it can make at any time just before it is used, so that less is alive at once.

Decoded activations, what is rebuilt of them and what a first layer makes again depend on no gradient. torch's cut
leaves them where forward had them, at the top of backward. Moved down, each lives as long as its use.
"""

from torch import fx

from ..graph.split import Split, is_size, writes


def late(split: Split) -> None:
    """Moves every node of backward that depends on no gradient down to the first node that uses it."""
    graph = split.backward.graph
    gradients: set[fx.Node] = set(split.runtime_inputs)
    fixed = False
    for node in graph.nodes:
        fixed |= writes(node)
        if any(n in gradients for n in node.all_input_nodes):
            gradients.add(node)
    if fixed:  # what is written to has to be read in time
        return
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.users and node not in gradients and not is_size(node):
            first = min(node.users)
            if first.op != "output":
                first.prepend(node)
