"""What an opaque op of ours computes, as a graph, for passes that go by single ops."""

from torch import fx

BODY = "actcompile_body"
"""In a node's meta: a graph whose first inputs are the node's operands, in order, and whose output is its result."""


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The operands of a call of `actcompile.edges`."""
    return list(node.args[8])  # type: ignore[arg-type]
