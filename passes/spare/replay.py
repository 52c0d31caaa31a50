"""`replay`: what a model does first, backward does again instead of saving what it made.

A first layer's aggregate and the products that follow it are made of the model's inputs and parameters, which are alive
anyway. So backward can compute them again, exactly, at the cost of that layer's forward. Deeper layers would need the
layers before them again, too; those are rounded instead. What a dropout drops is hashed again, if it was hashed.

What may be done again is bounded three times: by one layer's depth (no product of a product, no aggregate of an
aggregate); by size, no tensor larger than the largest that the step makes elsewhere, so that messages of wide features
are not the peak of backward; and by a share of the forward's work. Within the share, what spares the most bytes for the
work goes first.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from ..graph import _torch
from ..graph.find import SavedActivation, numel_hint
from ..graph.split import Split, first_use, is_input, is_size, is_tensor, is_view, readers_of, writes
from ..plan.plan import is_constant
from .dropout import is_seed

aten = torch.ops.aten

PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
TAKES = (aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.embedding.default)
SUMS = {  # -> where what they sum is
    aten.scatter_add.default: 3,
    aten.index_put.default: 2,
    aten.index_add.default: 3,
    torch.ops.actcompile.spmm.default: 3,
    torch.ops.actcompile.spmm_transposed.default: 3,
}
AGGREGATE, DEGREE = torch.ops.actcompile.aggregate.default, torch.ops.actcompile.degree.default
MAKERS = (
    aten.full.default,
    aten.cat.default,
    aten.arange.start_step,
    torch.ops.prims.iota.default,
    aten.scalar_tensor.default,
    aten.searchsorted.Tensor,
    aten.scatter.src,
    torch.ops.actcompile.random_mask.default,
)
INTENSITY = 16  # floating-point operations that take as long as moving one byte


@dataclass(frozen=True)
class Replayed:
    """An activation that backward computes again from inputs.

    share: of the forward's work, what that takes beyond what is done again for others.
    """

    activation: SavedActivation
    share: float

    @property
    def reason(self) -> str:
        return f"backward computes it again from inputs: {self.share:.0%} of forward's work"


@dataclass(frozen=True)
class _Depth:
    """How many products, and how many sums of rows, follow each other on the way from the inputs to a node."""

    products: int = 0
    sums: int = 0

    def join(self, other: "_Depth") -> "_Depth":
        return _Depth(max(self.products, other.products), max(self.sums, other.sums))


def replay(split: Split, activations: Iterable[SavedActivation], share: float) -> list[Replayed]:
    """Computes saved floats again in backward, from what is alive anyway or saved without loss.

    Args:
        activations: those that may go, as `find` returned them. What does not may be rounded later, so nothing is
            computed from it.
        share: the largest part of the forward's work that backward may do again.

    Returns:
        those that went, in the order of their first use in backward.
    """
    activations = [a for a in activations if not is_constant(a.node)]  # those take no work: the plan makes them anew
    exact = {n for n, _ in split.pairs if is_tensor(n)} - {a.node for a in activations}
    depths = _depths(split, exact)
    candidates = _no_larger_than_the_rest([a for a in activations if a.node in depths], exact, split)
    shares = _chosen(candidates, exact, split, share)
    copies: dict[fx.Node, fx.Node] = {}
    for activation in (found := sorted(shares, key=lambda a: first_use(a.placeholder))):
        _copy(split, activation, _cone(activation.node, exact, copies), copies)
    return [Replayed(activation, shares[activation]) for activation in found]


def _no_larger_than_the_rest(
    candidates: list[SavedActivation], exact: Collection[fx.Node], split: Split
) -> list[SavedActivation]:
    """Those for which backward makes no tensor again that is larger than all that the step makes besides.

    While backward runs more is alive than when forward began: what was forward's peak would be a higher one. What would
    be decoded as a whole is as large itself.
    """
    cones = {a: _cone(a.node, exact, ()) for a in candidates}
    inside = {node for cone in cones.values() for node in cone}
    outside = [n for g in (split.forward.graph, split.backward.graph) for n in g.nodes if n not in inside]
    limit = max(map(_made, outside), default=0.0)
    limits = {a: max(limit, a.nbytes if _is_decoded_whole(a) else 0) for a in cones}
    return [a for a, cone in cones.items() if all(_made(node) <= limits[a] for node in cone)]


def _is_decoded_whole(activation: SavedActivation) -> bool:
    """Whether something in backward but products of matrices, which take rows tile by tile, reads it."""
    return any(user.target is not aten.mm.default for user in readers_of(activation.placeholder))


def _made(node: fx.Node) -> float:
    """The bytes of the tensor that a node makes; none for an input, a view and what is no tensor."""
    return _nbytes(node) if node.op == "call_function" and is_tensor(node) and not is_view(node) else 0.0


def _chosen(
    candidates: list[SavedActivation], exact: Collection[fx.Node], split: Split, share: float
) -> dict[SavedActivation, float]:
    """Those that fit the share together, with what each takes of it; the most bytes for the work first."""
    whole = max(sum(map(work, split.forward.graph.nodes)), 1.0)
    planned: set[fx.Node] = set()
    chosen: dict[SavedActivation, float] = {}
    while candidates:
        cones = {a: _cone(a.node, exact, planned) for a in candidates}
        costs = {a: _cost(a, cone) / whole for a, cone in cones.items()}
        candidates = [a for a in candidates if sum(chosen.values()) + costs[a] <= share]
        if candidates:
            best = max(candidates, key=lambda a: a.nbytes / max(costs[a], 1e-9))
            chosen[best] = costs[best]
            planned.update(cones[best])
            candidates.remove(best)
    return chosen


def _cost(activation: SavedActivation, cone: Iterable[fx.Node]) -> float:
    """The work that computing it again takes; none for rows of inputs, which are taken as fast as they are decoded."""
    again = {node: work(node) for node in cone}
    is_taken = all(node.target in TAKES for node, bytes_moved in again.items() if bytes_moved)
    return 0.0 if is_taken and sum(again.values()) <= activation.nbytes else sum(again.values())


def work(node: fx.Node) -> float:
    """The bytes that a product or a map of rows moves, or could have moved in its time; of all other nodes none.

    Those are fused into their neighbours, or have narrow operands.
    """
    if node.target in PRODUCTS:
        left = node.args[-2] if node.target in (aten.mm.default, aten.bmm.default) else node.args[1]
        depth = _torch.size_hint(left.meta["val"].shape[-1])  # type: ignore[union-attr]
        return 2 * numel_hint(node.meta["val"]) * depth / INTENSITY
    if node.target in TAKES:
        return _nbytes(node)
    if node.target is AGGREGATE:
        edges = _torch.size_hint(node.args[4].meta["val"].shape[-1])  # type: ignore[union-attr]
        value = node.meta["val"]
        return float(edges * math.prod(map(_torch.size_hint, value.shape[1:])) * value.dtype.itemsize)
    if node.target in SUMS:
        return _nbytes(cast(fx.Node, node.args[SUMS[node.target]]))
    return 0.0


def _nbytes(node: fx.Node) -> float:
    return float(numel_hint(node.meta["val"]) * node.meta["val"].dtype.itemsize)


def _depths(split: Split, exact: Collection[fx.Node]) -> dict[fx.Node, _Depth]:
    """The forward nodes that backward can compute again by one layer's work."""
    found: dict[fx.Node, _Depth] = {}
    for node in split.forward.graph.nodes:
        if node in exact or (is_input(node) and not any(map(writes, node.users))) or is_seed(node):
            found[node] = _Depth()
            continue
        if not _is_repeatable(node) or not all(split.knows(size) for v in _values(node) for size in v.shape):
            continue
        depth = _Depth()
        for operand in node.all_input_nodes:
            if is_size(operand) and split.knows(operand.meta["val"]):
                continue
            if operand not in found:
                break
            depth = depth.join(found[operand])
        else:
            sums = node.target in (AGGREGATE, *SUMS) and not _is_column(node)
            depth = _Depth(depth.products + (node.target in PRODUCTS), depth.sums + sums)
            if depth.products <= 1 and depth.sums <= 1:
                found[node] = depth
    return found


def _is_repeatable(node: fx.Node) -> bool:
    """Whether a node makes a tensor, or views, and the same each time."""
    target = node.target
    if is_view(node):
        return True
    if not isinstance(target, torch._ops.OpOverload) or not is_tensor(node) or writes(node):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags or _torch.makes_sizes(node):
        return False
    return torch.Tag.pointwise in target.tags or target in (AGGREGATE, DEGREE, *PRODUCTS, *TAKES, *SUMS, *MAKERS)


def _is_source(node: fx.Node) -> bool:
    """Whether nothing has to be computed for a node: an input, or dropout's seeds, which are as good as one."""
    return node.op == "placeholder" or is_seed(node)


def _values(node: fx.Node) -> list[torch.Tensor]:
    """What a node makes: a tensor, or the views of `split` or `unbind`."""
    value = node.meta["val"]
    return [value] if isinstance(value, torch.Tensor) else list(value)


def _is_column(node: fx.Node) -> bool:
    """Whether a tensor has one number to a row, such as a degree."""
    shape = node.meta["val"].shape
    return len(shape) < 2 or _torch.known_true(shape[-1] == 1)


def _cone(node: fx.Node, exact: Collection[fx.Node], copies: Collection[fx.Node]) -> list[fx.Node]:
    """What has to be computed for a node, in order; not what is exact in backward, or was copied there."""
    nodes, todo = set(), {node}
    while todo:
        latest = todo.pop()
        if not _is_source(latest) and latest not in exact and latest not in copies and latest not in nodes:
            nodes.add(latest)
            todo.update(n for n in latest.all_input_nodes if not is_size(n))
    return sorted(nodes)


def _copy(split: Split, activation: SavedActivation, nodes: Iterable[fx.Node], copies: dict[fx.Node, fx.Node]) -> None:
    """Copies nodes into backward, before the activation's first use, and saves the activation no longer."""
    graph, old = split.backward.graph, activation.placeholder
    here = dict(split.pairs)

    def copied(node: fx.Node) -> fx.Node:
        if is_size(node):
            return split.size_in_backward(node.meta["val"])
        if node not in copies and node not in here:  # an input, alive anyway; or dropout's seeds, a few bytes
            here[node] = split.save(node, f"{node.name}_alive")
        return copies.get(node) or here[node]

    with graph.inserting_before(first_use(old)):
        for node in nodes:
            copies[node] = graph.node_copy(node, copied)
    result = copies[activation.node]
    old.replace_all_uses_with(result)
    split.drop(old)
