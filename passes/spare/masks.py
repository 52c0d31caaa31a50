"""Exact masks: comparisons move from backward to forward, and masks that only ever act together become one.

ReLU's backward asks for the sign of its input. Min-cut saves what is upstream (a BatchNorm's input) and recomputes the
comparison in backward; were that tensor rounded, the sign would be wrong. So every comparison in backward that depends
on saved floats is taken in forward, exactly, and saved as a bool tensor of its own, which `pack_bits` makes one bit.
The same holds for integers made of floats (an index from a rounded float could even be out of range), and for signs,
which are two comparisons.
"""

from collections.abc import Collection, Iterator

import torch
from torch import fx

from ..graph.split import Split, call, is_size, is_tensor

aten = torch.ops.aten


def masks(split: Split, kept: Collection[fx.Node] = ()) -> Split:
    """Hoists comparisons and merges masks; changes both graphs in place.

    Args:
        kept: backward placeholders of floats that will not be rounded; comparisons of these may stay where they are.
    """
    hoist_comparisons(split, kept)
    merge_masks(split)
    return split


def hoist_comparisons(split: Split, kept: Collection[fx.Node] = ()) -> None:
    """Saves exact bool and integer tensors instead of recomputing them in backward from floats that may be rounded."""
    origin = split.origin()
    hoistable: set[fx.Node] = set(origin)
    rounded: set[fx.Node] = {p for n, p in split.pairs if _is_float(n) and p not in kept and not split.is_free(n)}
    for node in list(split.backward.graph.nodes):
        if node.op == "get_attr":
            setattr(split.forward, node.target, getattr(split.backward, node.target))  # both come of one joint graph
            hoistable.add(node)
        if node.op != "call_function" or not is_pure(node) or not all(n in hoistable for n in node.all_input_nodes):
            continue
        hoistable.add(node)
        if any(n in rounded for n in node.all_input_nodes) and not is_size(node):  # a tensor's size is not rounded
            rounded.add(node)
            if node.target is aten.sign.default:
                comparisons = _spell_sign(split.backward.graph, node)
                hoistable.update(comparisons)
                rounded.update(comparisons)
    to_hoist = [
        n
        for n in split.backward.graph.nodes
        if n in rounded
        and n.op == "call_function"
        and _is_discrete(n)
        and any(u not in hoistable or not _is_discrete(u) for u in n.users)
    ]
    for node in to_hoist:
        before = {n for n, p in split.pairs}
        exact = split.copy_to_forward(node, origin)
        if exact in before:
            placeholder = next(p for n, p in split.pairs if n is exact)
        else:
            placeholder = split.save(exact, f"{node.name}_mask")
        node.replace_all_uses_with(placeholder)
        origin[placeholder] = exact
        hoistable.add(placeholder)
    split.drop_unused()


def _spell_sign(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """Replaces a sign by the difference of two comparisons; returns these. A NaN's sign becomes zero."""
    x, dtype = node.args[0], node.meta["val"].dtype
    with graph.inserting_before(node):
        comparisons = [call(graph, op, x, 0, like=node) for op in (aten.gt.Scalar, aten.lt.Scalar)]
        above, below = (
            call(graph, torch.ops.prims.convert_element_type.default, mask, dtype, like=node) for mask in comparisons
        )
        node.replace_all_uses_with(call(graph, aten.sub.Tensor, above, below, like=node))
    graph.erase_node(node)
    return comparisons


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    return max(graph.find_nodes(op="placeholder"))


def merge_masks(split: Split) -> None:
    """`where(a, 0, v * b)` and `where(a, v * b, 0)`, masks used for nothing else: one mask, `b and not a` or `b and a`.

    Where the merged mask is false the result is zero for every finite `v`, as before.
    """
    origin = split.origin()
    for node in split.backward.graph.find_nodes(op="call_function", target=aten.where.self):
        condition, if_true, if_false = node.args
        if not (condition in origin and _is_bool(condition) and list(condition.users) == [node]):
            continue
        drops = _is_zero(if_true)  # true means: no gradient
        if drops == _is_zero(if_false):
            continue
        factor = next(_bool_factors(if_false if drops else if_true, node, origin), None)
        if factor is None or factor.meta["val"].shape != condition.meta["val"].shape:
            continue
        forward, backward = split.forward.graph, split.backward.graph
        a, b = origin[condition], origin[factor]
        if split.is_free(a) and split.is_free(b):
            continue
        last = _last_placeholder(forward)
        with forward.inserting_after(max(a, b, last)):
            if drops:
                a = call(forward, aten.logical_not.default, a, like=a)
        with forward.inserting_after(max(a, b, last)):
            both = call(forward, aten.logical_and.default, a, b, like=origin[condition])
        merged = split.save(both, f"{node.name}_mask", like=origin[condition])
        factor.replace_all_uses_with(merged)
        if drops:
            with backward.inserting_before(node):
                node.update_arg(0, call(backward, aten.logical_not.default, merged, like=node))
        else:
            node.update_arg(0, merged)
        origin[merged] = both
    split.drop_unused()


def _bool_factors(value: object, user: fx.Node, origin: dict[fx.Node, fx.Node]) -> Iterator[fx.Node]:
    """Saved bool tensors that multiply `value`, whose product is used by `user` alone."""
    if not isinstance(value, fx.Node) or list(value.users) != [user]:
        return
    if value in origin:
        if _is_bool(value):
            yield value
    elif value.target in (aten.mul.Tensor, aten.mul.Scalar):
        for argument in value.all_input_nodes:
            yield from _bool_factors(argument, value, origin)
    elif value.target in (torch.ops.prims.convert_element_type.default, aten._to_copy.default, aten.clone.default):
        yield from _bool_factors(value.args[0], value, origin)


def _is_zero(value: object) -> bool:
    if isinstance(value, fx.Node) and value.target in (aten.full.default, aten.scalar_tensor.default):
        value = value.args[1] if value.target is aten.full.default else value.args[0]
    return isinstance(value, (int, float)) and value == 0


def _is_discrete(node: fx.Node) -> bool:
    return is_tensor(node) and not node.meta["val"].is_floating_point() and not node.meta["val"].is_complex()


def _is_bool(node: fx.Node) -> bool:
    return is_tensor(node) and node.meta["val"].dtype is torch.bool


def _is_float(node: fx.Node) -> bool:
    return is_tensor(node) and node.meta["val"].is_floating_point()


def is_pure(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        random = torch.Tag.nondeterministic_seeded in node.target.tags or "inductor" in node.target.name()
        return not node.target._schema.is_mutable and not random
    return not isinstance(node.target, torch._ops.HigherOrderOperator)
