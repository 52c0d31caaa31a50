"""`rebuild`: a saved activation that backward can compute from what else is saved is not saved at all.

Around a BatchNorm, ReLU and dropout both the norm's input `h` and the result `x` are saved: `h` for the norm's
gradient, `x` for that of the next layer's weights. But `x` is `h` scaled, shifted and masked by values that are saved
too, or alive anyway. So backward computes it from the decoded `h`, in one pointwise loop, and its bytes are gone.

What is rebuilt from rounded values keeps every gradient's mean: it is affine in each of them (ReLU's decision is taken
from its exact mask, never from a rounded value), and no gradient that it reaches depends on them in another way.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from ..graph.bias import Dependence
from ..graph.find import SavedActivation, numel_hint
from ..graph.origin import module_path
from ..graph.split import Split, call, is_input, is_tensor, is_view, root, writes

aten = torch.ops.aten
prims = torch.ops.prims

LONGEST = 16  # nodes that backward may compute anew for one activation
SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)
CASTS = (prims.convert_element_type.default, aten.clone.default)

Mask = tuple[str, fx.Node]
"""A condition on elements, from nodes of forward: ("positive", x) where x > 0, ("true", m) where the bool m holds."""


@dataclass(frozen=True)
class Rebuilt:
    """An activation that is computed anew, and the saved ones that it is computed from."""

    activation: SavedActivation
    bases: tuple[str, ...]  # the large ones, as module and node

    @property
    def reason(self) -> str:
        return f"backward computes it from {', '.join(self.bases) or 'inputs and masks'}, kept anyway"


@dataclass
class _Expression:
    """How a forward node is computed: from `leaves` by `nodes` in order, and zero where not all of `masks` hold.

    `stands`: from a node of forward to the one that has its value where the masks hold.
    """

    leaves: set[fx.Node] = field(default_factory=set)
    nodes: dict[fx.Node, None] = field(default_factory=dict)
    masks: frozenset[Mask] = frozenset()
    stands: dict[fx.Node, fx.Node] = field(default_factory=dict)


class _NotFound(Exception):
    """The node can't be computed from what is saved."""


def rebuild(
    split: Split,
    activations: Iterable[SavedActivation],
    dependences: Mapping[fx.Node, Dependence],
    kind: Callable[[fx.Node], object],
) -> list[Rebuilt]:
    """Replaces saved floats by what backward computes from other saved values; returns what was replaced.

    Args:
        activations: those that may be replaced, as `find` returned them.
        dependences: what `bias` returned, by backward placeholder; only what is used linearly is computed from what may
            be rounded.
        kind: what is computed from what must be of one kind: a rule for one module holds for what it is computed from.
    """
    reached = _Reach(split)
    made = []
    for activation in activations:
        saved = {n: p for n, p in split.pairs if n is not activation.node and is_tensor(n)}
        base, views = activation.node, []
        while is_view(base) and base.all_input_nodes == [base.args[0]]:
            views.append(base)
            base = base.args[0]  # type: ignore[assignment]
        try:
            expression = _express(base, saved)
        except _NotFound:
            continue
        dependence = dependences.get(activation.placeholder)
        bases = [n for n in expression.leaves if n in saved and not is_input(n) and _is_float(n)]
        masks = _saved_masks(expression.masks, saved)
        outputs = reached.from_(activation.placeholder)
        if any(kind(base) != kind(activation.node) for base in bases):
            continue
        if (
            not expression.leaves
            or masks is None
            or len(expression.nodes) > LONGEST
            or (bases and (dependence is None or dependence.biased))
        ):
            continue
        if any(outputs & reached.from_(saved[base]) for base in bases):
            continue
        _replace(split, activation, base, expression, masks, views[::-1])
        for base in bases:
            reached.add(saved[base], outputs)
        large = [n for n in bases if numel_hint(n.meta["val"]) >= activation.numel]
        made.append(Rebuilt(activation, tuple(sorted(f"{module_path(n)}/{n.name}" for n in large))))
    return made


def computable(split: Split, node: fx.Node) -> bool:
    """Whether backward could compute a node of forward from what is saved."""
    saved = {n: p for n, p in split.pairs if is_tensor(n)}
    try:
        expression = _express(node, saved)
    except _NotFound:
        return False
    return len(expression.nodes) <= LONGEST and _saved_masks(expression.masks, saved) is not None


class _Reach:
    """Which outputs of backward depend on a placeholder."""

    def __init__(self, split: Split) -> None:
        graph = split.backward.graph
        returned = graph.output_node().args[0]
        values = returned if isinstance(returned, (list, tuple)) else [returned]
        self.outputs: dict[fx.Node, set[int]] = {}
        for position, value in enumerate(values):
            if isinstance(value, fx.Node):
                self.outputs.setdefault(value, set()).add(position)
        for node in reversed(graph.nodes):
            for user in node.users:
                if user.op != "output":
                    self.outputs.setdefault(node, set()).update(self.outputs.get(user, ()))

    def from_(self, placeholder: fx.Node) -> set[int]:
        return self.outputs.get(placeholder, set())

    def add(self, placeholder: fx.Node, outputs: Collection[int]) -> None:
        self.outputs.setdefault(placeholder, set()).update(outputs)


def _express(node: fx.Node, saved: Mapping[fx.Node, fx.Node]) -> _Expression:
    """The expression of a forward node in terms of saved nodes and of inputs, affine in every one of them.

    Raises:
        _NotFound: there is none.
    """
    if node.op == "placeholder" and any(writes(user) for user in node.users):
        raise _NotFound(node)  # backward would read what forward left in it
    if node in saved or is_input(node):
        return _Expression({node})
    if not is_tensor(node):
        raise _NotFound(node)
    for user in node.users:
        if user in saved and user.target is aten.permute.default:  # saved the other way round, for a matrix product
            order = cast(list[int], user.args[1])
            with node.graph.inserting_after(user):
                back = call(node.graph, aten.permute.default, user, [order.index(d) for d in range(len(order))])
            return _Expression({user}, {back: None}, stands={node: back})
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    if node.target is aten.scatter_add.default and (_is_whole(node) or all(_is_whole(root(n)) for n in tensors[::2])):
        return _join(node, [_express(a, saved) for a in tensors])  # a degree: whole numbers add up in any order
    if node.target is aten.full.default and not node.all_input_nodes and _is_whole(node):
        return _Expression(nodes={node: None})
    if is_view(node) and not node.meta["val"].is_floating_point() and node.all_input_nodes == tensors[:1]:
        return _join(node, [_express(tensors[0], saved)])
    if node.target is aten.relu.default:
        inner = _express(tensors[0], saved)
        inner.masks |= {("positive", node)}
        inner.stands[node] = tensors[0]
        return inner
    if node.target in PRODUCTS:
        masks = [a for a in tensors if _is_bool(a)]
        parts = [_express(a, saved) for a in tensors if a not in masks]
        if masks and len(parts) == 1:
            parts[0].masks |= {("true", mask) for mask in masks}
            parts[0].stands[node] = next(a for a in tensors if a not in masks)
            return parts[0]
        if len(parts) == 2 and _floats(parts[0]) & _floats(parts[1]):
            raise _NotFound(node)
        return _join(node, parts)
    if node.target in SUMS:
        parts = [_express(a, saved) for a in tensors]
        if any(part.masks for part in parts):
            raise _NotFound(node)
        return _join(node, parts)
    if node.target in QUOTIENTS:
        parts = [_express(a, saved) for a in tensors]
        if len(parts) == 2 and _floats(parts[1]):
            raise _NotFound(node)
        return _join(node, parts)
    if (node.target in CASTS or is_view(node)) and len(tensors) == 1 and node.meta["val"].is_floating_point():
        part = _express(tensors[0], saved)
        if node.all_input_nodes != tensors or (part.masks and is_view(node)):  # sizes that are nodes; masks reshaped
            raise _NotFound(node)
        return _join(node, [part])
    raise _NotFound(node)


def _join(node: fx.Node, parts: list[_Expression]) -> _Expression:
    joined = _Expression()
    for part in parts:
        joined.nodes |= part.nodes
        joined.leaves |= part.leaves
        joined.masks |= part.masks
        joined.stands |= part.stands
    joined.nodes[node] = None
    return joined


def _floats(expression: _Expression) -> set[fx.Node]:
    return {n for n in expression.leaves if not is_input(n) and _is_float(n)}


def _saved_masks(masks: frozenset[Mask], saved: Mapping[fx.Node, fx.Node]) -> list[tuple[fx.Node, bool]] | None:
    """Saved bool tensors that say together where all of `masks` hold, and whether each says the contrary."""
    candidates = [(node, negated) for node in saved if _is_bool(node) for negated in (False, True)]
    found, covered = [], frozenset[Mask]()
    for candidate in sorted(candidates, key=lambda c: -len(_conditions(*c) or ())):
        conditions = _conditions(*candidate)
        if conditions is not None and conditions <= masks and not conditions <= covered:
            found.append(candidate)
            covered |= conditions
    return found if covered == masks else None


def _conditions(node: fx.Node, negated: bool) -> frozenset[Mask] | None:
    """A bool node, or its negation, as a conjunction of masks."""
    if node.target is aten.logical_not.default:
        return _conditions(node.args[0], not negated)  # type: ignore[arg-type]
    if node.target is aten.logical_and.default and not negated:
        parts = [_conditions(a, False) for a in node.args]  # type: ignore[arg-type]
        return None if None in parts else parts[0] | parts[1]  # type: ignore[operator]
    compared = node.args[0] if node.args else None
    while isinstance(compared, fx.Node) and compared.target in (aten.alias.default, aten.detach.default):
        compared = compared.args[0]
    if isinstance(compared, fx.Node) and compared.target is aten.relu.default and node.args[1:] == (0,):
        # NaN passes relu, and is not at most zero
        positive: dict[Any, bool] = {aten.le.Scalar: negated, aten.gt.Scalar: not negated}
        return frozenset({("positive", compared)}) if positive.get(node.target) else None
    return None if negated else frozenset({("true", node)})


def _replace(
    split: Split,
    activation: SavedActivation,
    base: fx.Node,
    expression: _Expression,
    masks: Iterable[tuple[fx.Node, bool]],
    views: Iterable[fx.Node],
) -> None:
    """Copies the expression into backward, before the activation's first use, and drops the activation.

    The new nodes are marked: `rewrite` decodes for them apart, so that no decoded tensor stays alive from here to its
    other uses.
    """
    graph, old = split.backward.graph, activation.placeholder
    here = dict(split.pairs)
    for leaf in sorted(expression.leaves):
        if leaf not in here:  # an input, which forward does not change: alive anyway
            here[leaf] = split.save(leaf, f"{leaf.name}_alive")
    with graph.inserting_before(min(old.users)):
        made: dict[fx.Node, fx.Node] = {}
        copies: list[fx.Node] = []

        def copied(node: fx.Node) -> fx.Node:
            while node in expression.stands:
                node = expression.stands[node]
            return made.get(node) or here[node]

        for node in expression.nodes:
            made[node] = copy = graph.node_copy(node, copied)
            copies.append(copy)
        result = copied(base)
        for mask, negated in masks:
            zero = call(graph, aten.full.default, [], 0.0, like=old)
            zero.kwargs = {"dtype": activation.value.dtype, "device": activation.value.device}
            choices = (zero, result) if negated else (result, zero)
            result = call(graph, aten.where.self, here[mask], *choices, like=old)
            copies.append(result)
        for view in views:
            result = call(graph, view.target, result, *view.args[1:], like=old)
            copies.append(result)
    for copy in copies:
        copy.meta["rebuilds"] = activation.node.name
    result.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(result)
    split.drop(old)


def _is_whole(node: fx.Node) -> bool:
    """Whether a node makes a tensor of whole numbers: of integers, or filled with one."""
    if not is_tensor(node) or _is_float(node):
        return node.target is aten.full.default and float(cast(float, node.args[1])).is_integer()
    return not node.meta["val"].is_complex()


def _is_bool(node: object) -> bool:
    return isinstance(node, fx.Node) and is_tensor(node) and node.meta["val"].dtype is torch.bool


def _is_float(node: fx.Node) -> bool:
    return is_tensor(node) and node.meta["val"].is_floating_point()
