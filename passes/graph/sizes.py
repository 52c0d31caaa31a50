"""`sizes`: what is known of sizes that depend on data: which of them are equal, and how large they can be.

Every layer that adds self-loops masks the same edges in the same way. torch merges such layers' common work into one
(CSE), but each of the sizes keeps a symbol of its own, `u0`, `u1`, `u2`, in the shapes of what comes later, and nothing
says that they are the same, nor who has the merged ones. So before the cut, equal sizes get one symbol.

What a mask or a `unique` selects is no more than what it selects from. Where bytes decide, that many are counted.
A number that Python takes from a tensor has no bound. Mostly it is the largest index of a list, as of graphs in a
batch, so that as many are counted as the list is long, and the report calls it a guess.
"""

import math
from typing import Any

import torch
from torch import fx

from . import _torch
from .split import is_size, is_tensor, writes

aten = torch.ops.aten

SELECTING = (  # ops that select elements of their first argument
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
)


def sizes(joint: fx.Graph) -> None:
    """Unifies the symbols of equal sizes, and takes down bounds for `_torch.size_hint`; leaves the graph as it is."""
    first: dict[fx.Node, fx.Node] = {}  # of nodes that have the same value
    made: dict[str, fx.Node] = {}
    for node in joint.nodes:
        same = first[node] = made.setdefault(_recipe(node, first), node)
        if same is not node:
            for known, size in zip(_sizes(same), _sizes(node), strict=True):
                _torch.unify(known, size)
        elif (candidates := _selected_from(node)) is not None:
            for size in _sizes(node):
                _torch.bound(size, _torch.size_hint(math.prod(candidates.shape)))
        elif node.target is aten._local_scalar_dense.default and (counted := _counted(node)) is not None:
            _torch.guess(node.meta["val"], _torch.size_hint(math.prod(counted.shape)))


def _recipe(node: fx.Node, first: dict[fx.Node, fx.Node]) -> str:
    """How a node's value is made; nodes made alike have the same value."""
    target = node.target
    if is_size(node) and target is not aten._local_scalar_dense.default:
        return f"size {_torch.expression(node.meta['val'])}"
    if not isinstance(target, torch._ops.OpOverload) or writes(node):
        return node.name
    if torch.Tag.nondeterministic_seeded in target.tags:
        return node.name
    return f"{target} {fx.map_arg((node.args, node.kwargs), lambda n: first[n])}"


def _sizes(node: fx.Node) -> list[Any]:
    """The sizes that a node's value has, or is."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return [size for v in values for size in (v.shape if isinstance(v, torch.Tensor) else [v])]


def _counted(node: fx.Node) -> torch.Tensor | None:
    """The list of integers whose largest, or other summary, a node takes as a number."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim():
            break
        node = node.args[0]  # type: ignore[assignment]
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    return found if isinstance(found, torch.Tensor) and not found.is_floating_point() else None


def _selected_from(node: fx.Node) -> torch.Tensor | None:
    """The tensor that has an element, or a row, for each of those that a node may select; None for other nodes."""
    chosen: list[object] = []
    if node.target in SELECTING:
        chosen = [node.args[0]]
    if node.target is aten.index.Tensor:
        chosen = [i for i in node.args[1] if isinstance(i, fx.Node) and i.meta["val"].dtype is torch.bool]  # type: ignore[union-attr]
    if node.target is aten.masked_select.default:
        chosen = list(node.args)
    tensors = [c.meta["val"] for c in chosen if isinstance(c, fx.Node) and is_tensor(c)]
    return max(tensors, key=lambda t: _torch.size_hint(math.prod(t.shape)), default=None)
