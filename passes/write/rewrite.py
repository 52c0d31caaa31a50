"""`rewrite`: encodes in forward what the plan compresses, and decodes it in backward just before its first use."""

import functools
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ..codecs.codecs import Keep, Narrow, Quantize, Recompute
from ..codecs.encode import Seeds, encode, part_names
from ..codecs.standardise import Standard, standard
from ..graph.find import SavedActivation, dense_order, memory_order
from ..graph.split import Split, call, first_use, inherit_origin, renew_views
from ..plan.plan import Choice, Plan

aten = torch.ops.aten


def rewrite(split: Split, plan: Plan) -> Split:
    """Changes both graphs in place as `plan` says; `split.finish` is left to the caller."""
    seeds = Seeds(split)
    for choice in plan.choices:
        match choice.codec:
            case Keep():
                continue
            case Recompute():
                _recompute(split, choice.activation)
            case _:
                _encode(split, choice, seeds)
    seeds.finish()
    return split


def _encode(split: Split, choice: Choice, seeds: Seeds) -> None:
    """Saves the encoded parts in the activation's place, and decodes them before its first use in backward.

    Encoded is the activation in the order of its memory; its own strides come back by a permutation, without the gaps
    that a view of a larger tensor has.
    """
    activation, value = choice.activation, choice.activation.value
    order = memory_order(value)
    source, by = activation.node, None
    units: tuple[fx.Node, ...] = ()
    if isinstance(choice.codec, Quantize) and choice.codec.standardised:
        form = standard(activation.node)
        assert form is not None  # plan asked
        by, units = functools.partial(_columns, split, form), (form.scale, *form.plus, *form.minus)
        if form.uncentred is not None:
            source, mean = form.uncentred
            units += (mean,)
    with _after(split, (source, *units), seeds):
        x = source
        if order != list(range(value.dim())):
            x = call(split.forward.graph, aten.permute.default, x, order, like=x)
        encoded, decode = encode(split, choice.codec, x, seeds, by)
    if isinstance(choice.codec, Narrow) and not isinstance(activation.bound, int):
        _assert_fits(split, activation, choice.codec.dtype)
    old, labels = activation.placeholder, part_names(activation)[: len(encoded)]
    inputs = [split.save(e, label, like=activation.node) for e, label in zip(encoded, labels, strict=True)]
    for users in _uses_apart(old):
        with split.backward.graph.inserting_before(first_use(old, users)):
            decoded = decode(inputs, lambda: [split.size_in_backward(value.shape[d]) for d in order])
            if x is not source:
                back = [order.index(d) for d in range(value.dim())]
                decoded = call(split.backward.graph, aten.permute.default, decoded, back)
        for user in users:
            user.replace_input_with(old, decoded)
        if decoded not in inputs:
            inherit_origin(decoded, old)
        if dense_order(value) is None:
            renew_views(decoded)
        elif decoded not in inputs:
            decoded.meta["val"] = old.meta["val"]
    split.drop(old)


def _columns(split: Split, form: Standard, graph: fx.Graph) -> tuple[fx.Node | None, fx.Node]:
    """The shift, `sum(plus) - sum(minus)`, and the scale of a standardised form, in one of the graphs.

    In forward the mean is the shift of what is not centred yet; backward asks for what is.
    """
    here = dict(split.pairs)
    if form.uncentred is not None and graph is split.forward.graph:
        return form.uncentred[1], form.scale

    def column(node: fx.Node) -> fx.Node:
        if graph is split.forward.graph:
            return node
        return here.get(node) or split.save(node, f"{node.name}_by_column")

    shift = None
    for node in form.plus:
        shift = column(node) if shift is None else call(graph, aten.add.Tensor, shift, column(node))
    for node in form.minus:
        negative = call(graph, aten.neg.default, column(node)) if shift is None else None
        shift = negative or call(graph, aten.sub.Tensor, shift, column(node))
    return shift, column(form.scale)


def _uses_apart(placeholder: fx.Node) -> list[list[fx.Node]]:
    """The users of a saved value: those that `rebuild` made, by what they rebuild, and all others together."""
    groups: dict[str, list[fx.Node]] = {}
    for user in placeholder.users:
        groups.setdefault(user.meta.get("rebuilds", ""), []).append(user)
    return list(groups.values())


def _after(split: Split, nodes: Iterable[fx.Node], seeds: Seeds) -> Any:
    """Insertion point behind `nodes`, and behind all inputs of the graph and the seeds."""
    graph = split.forward.graph
    return graph.inserting_before(max(*nodes, seeds.top()).next)


def _recompute(split: Split, activation: SavedActivation) -> None:
    """Copies a constant's maker into backward."""
    graph, node, old = split.backward.graph, activation.node, activation.placeholder
    with graph.inserting_before(first_use(old)):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: split.size_in_backward(n.meta["val"]))
        made = graph.create_node(node.op, node.target, args, kwargs)
    made.meta.update({k: v for k, v in node.meta.items() if k != "desc"})
    old.replace_all_uses_with(made)
    split.drop(old)


def _assert_fits(split: Split, activation: SavedActivation, dtype: torch.dtype) -> None:
    """Adds the run-time assertion that an index's symbolic bound fits `dtype`."""
    largest = torch.iinfo(dtype).max
    placeholder = activation.placeholder
    with split.backward.graph.inserting_before(first_use(placeholder)):
        size = split.size_in_backward(activation.bound)
        graph = split.backward.graph
        fits = graph.call_function(operator.le, (size, largest))
        fits.meta["val"] = activation.bound <= largest  # type: ignore[operator]
        graph.call_function(
            aten._assert_scalar.default, (fits, f"actcompile: an index of {activation.op} does not fit {dtype}")
        )
