"""`dropout`: on the CPU, what a dropout drops is hashed from a seed, not drawn; `redraw`: and it need not be saved.

Inductor's CPU code draws a float for each element, which takes ten times as long as all else that dropout does. So
before the cut every comparison of such floats with a constant, which is how dropout decides, becomes a `random_mask`: a
hash of the element's position and of a seed, compared with a threshold. The seeds are drawn once per forward call from
torch's default generator, a row for each dropout.

A mask is then a pure function of its seed. Where `masks` has not merged it with a ReLU's, backward makes it anew.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from actcompile.kernels.bits.random_mask import threshold_of

from ..graph import _torch
from ..graph.find import SavedActivation
from ..graph.split import Split, ancestors, call, is_size, is_tensor, is_view

aten = torch.ops.aten
prims = torch.ops.prims
ops = torch.ops.actcompile

BELOW = (aten.lt.Scalar, aten.le.Scalar, aten.lt.Tensor, aten.le.Tensor)
ABOVE = (aten.gt.Scalar, aten.ge.Scalar, aten.gt.Tensor, aten.ge.Tensor)
CHECKPOINTED = ("recompute", "ac_graph_id", "has_backward_hook")  # torch's marks on nodes of a checkpointed region


@dataclass(frozen=True)
class Redrawn:
    """A dropout's mask that backward makes anew."""

    activation: SavedActivation

    @property
    def reason(self) -> str:
        return "what dropout dropped: backward hashes it again from the seed"


@dataclass(frozen=True)
class _Decision:
    """A node that is true, or one, where random numbers in [0, 1) are below a constant, or else where they are not."""

    node: fx.Node
    constant: float
    below: bool


def dropout(graph_module: fx.GraphModule, outputs: int) -> None:
    """Replaces random numbers on the CPU that are only compared with constants; changes the graph in place.

    What only backward asks for stays, since a second backward draws other numbers; and everything does where torch's
    settings ask Inductor for the numbers that eager mode draws.

    Args:
        graph_module: a joint graph, before it is cut.
        outputs: how many of its outputs are those of forward.
    """
    if _torch.wants_eager_randomness():
        return
    joint = graph_module.graph
    returned = list(joint.output_node().args[0])[:outputs]  # type: ignore[arg-type]
    forward = ancestors(n for n in returned if isinstance(n, fx.Node))
    found = [(node, made) for node in joint.nodes if node in forward and (made := _decisions(node))]
    if not found:
        return
    with joint.inserting_after(max(joint.find_nodes(op="placeholder"))):
        seeds = call(joint, ops.draw_seed.default, len(found), torch.device("cpu"), False)
    for salt, (node, decisions) in enumerate(found):
        sizes = _sizes(node)
        for decision in decisions:
            _replace(joint, decision, seeds, salt, sizes)
        _erase(joint, [decision.node for decision in decisions])


def redraw(split: Split, activations: Iterable[SavedActivation]) -> list[Redrawn]:
    """Saves a seed instead of masks that were made of it; backward makes them anew for each use. Returns what went.

    Args:
        activations: those that may go, as `find` returned them.
    """
    made = []
    for activation in activations:
        steps = [activation.node]
        while is_view(steps[-1]):
            steps.append(cast(fx.Node, steps[-1].args[0]))
        if steps[-1].target is not ops.random_mask.default or not all(map(split.knows, steps[-1].meta["val"].shape)):
            continue
        _make_in_backward(split, activation, steps[::-1])
        made.append(Redrawn(activation))
    return made


def is_seed(node: fx.Node) -> bool:
    """Whether a node draws the seeds of dropout: a few bytes, of which masks can be made again."""
    return node.target is ops.draw_seed.default and len(node.args) > 2 and node.args[2] is False


def is_of_dropout(node: fx.Node) -> bool:
    """Whether a node makes a dropout's mask, or its seed."""
    return node.target is ops.random_mask.default or is_seed(node)


def _make_in_backward(split: Split, activation: SavedActivation, steps: list[fx.Node]) -> None:
    """Copies a mask, and the views taken of it, into backward, before each of its uses: it need not stay alive."""
    graph, old = split.backward.graph, activation.placeholder
    seeds = cast(fx.Node, steps[0].args[0])
    here = {seeds: dict(split.pairs).get(seeds) or split.save(seeds, "dropout_seeds")}

    def copied(node: fx.Node) -> fx.Node:
        return split.size_in_backward(node.meta["val"]) if is_size(node) else here[node]

    for user in list(old.users):
        with graph.inserting_before(user):
            for step in steps:
                here[step] = graph.node_copy(step, copied)
        user.replace_input_with(old, here[activation.node])
    split.drop(old)


def _decisions(node: fx.Node) -> list[_Decision]:
    """What a node's random numbers decide, if they serve for nothing else and no decision is certain."""
    if not is_tensor(node) or node.meta["val"].device.type != "cpu":
        return []
    found: list[_Decision | None] = []
    if node.target is aten.bernoulli.p and not node.kwargs:
        found = [_decision(node, node.args[1] if len(node.args) > 1 else 0.5, below=True)]
    elif node.target is aten.rand.default or (node.target is prims.inductor_random.default and node.args[2] == "rand"):
        found = [_comparison(user, node.meta["val"]) for user in _uses(node)]
    return [] if None in found else cast(list[_Decision], found)


def _uses(node: fx.Node) -> Iterator[fx.Node]:
    """Users of a float, and of what it is in another dtype."""
    for user in node.users:
        if user.target is prims.convert_element_type.default and user.meta["val"].is_floating_point():
            yield from _uses(user)
        else:
            yield user


def _comparison(node: fx.Node, numbers: torch.Tensor) -> _Decision | None:
    if node.target not in (*BELOW, *ABOVE) or not _torch.same_sizes(node.meta["val"].shape, numbers.shape):
        return None
    constant = node.args[1]
    if isinstance(constant, fx.Node) and constant.target is aten.full.default:
        constant = constant.args[1]
    return _decision(node, constant, node.target in BELOW)


def _decision(node: fx.Node, constant: Any, below: bool) -> _Decision | None:
    return _Decision(node, constant, below) if isinstance(constant, float) and 0 < constant < 1 else None


def _sizes(node: fx.Node) -> Any:
    """The sizes of a tensor of random numbers, as ints and nodes."""
    if node.target is not aten.bernoulli.p:
        return node.args[0]
    like = cast(fx.Node, node.args[0])
    if like.target is aten.empty.memory_format:
        return like.args[0]
    with node.graph.inserting_before(node):
        return [
            size if isinstance(size, int) else call(node.graph, aten.sym_size.int, like, dim)
            for dim, size in enumerate(like.meta["val"].shape)
        ]


def _replace(graph: fx.Graph, decision: _Decision, seeds: fx.Node, salt: int, sizes: Any) -> None:
    old, threshold = decision.node, threshold_of(decision.constant)
    with graph.inserting_before(old):
        made = [call(graph, ops.random_mask.default, seeds, salt, sizes, threshold, decision.below, like=old)]
        if old.meta["val"].dtype is not torch.bool:
            made.append(call(graph, prims.convert_element_type.default, made[0], old.meta["val"].dtype, like=old))
    for node in made:
        node.meta.update({key: old.meta[key] for key in CHECKPOINTED if key in old.meta})
    old.replace_all_uses_with(made[-1])


def _erase(graph: fx.Graph, unused: list[fx.Node]) -> None:
    """Erases nodes, and what they alone used; torch's elimination of dead code spares what draws random numbers."""
    todo, erased = list(unused), set()
    while todo:
        node = todo.pop()
        if node.op == "call_function" and not node.users and node not in erased:
            todo += node.all_input_nodes
            graph.erase_node(node)
            erased.add(node)
