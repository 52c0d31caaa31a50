"""`rewrite`: encodes in forward what the plan compresses, and decodes it in backward just before its first use."""

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from . import _torch
from .codecs import Keep, Narrow, PackBits, Quantize, Recompute
from .find import SavedActivation, dense_order
from .plan import Plan
from .split import Split, call, is_view

ops = torch.ops.actcompile
aten = torch.ops.aten


def rewrite(split: Split, plan: Plan) -> Split:
    """Changes both graphs in place as `plan` says; `split.finish` is left to the caller."""
    seeds: dict[torch.device, fx.Node] = {}
    rows: Counter[torch.device] = Counter()
    for choice in plan.choices:
        activation = choice.activation
        match choice.codec:
            case Keep():
                continue
            case Recompute():
                _recompute(split, activation)
            case Quantize(fmt):
                x, restore = _in_memory_order(split, activation)
                seed = _seed(split, activation.value.device, seeds)
                salt = rows[activation.value.device]
                rows[activation.value.device] += 1
                with split.forward.graph.inserting_after(max(x, seed)):
                    fields = (fmt.bits, fmt.block, fmt.levels)
                    encoded = call(
                        split.forward.graph,
                        ops.quantize.default,
                        x,
                        seed,
                        salt,
                        *fields,
                        fmt.metadata,
                        fmt.words,
                        like=x,
                    )
                tail = (x.meta["val"].dtype, *fields)
                _transfer(split, activation, _parts(split, encoded), ops.dequantize.default, True, tail, restore)
            case PackBits(words):
                x, restore = _in_memory_order(split, activation)
                with _after(split, x):
                    packed = call(split.forward.graph, ops.pack_bits.default, x, words, like=x)
                _transfer(split, activation, [packed], ops.unpack_bits.default, True, (), restore)
            case Narrow(dtype):
                with _after(split, activation.node):
                    small = call(split.forward.graph, ops.narrow.default, activation.node, dtype, like=activation.node)
                if not isinstance(activation.bound, int):
                    _assert_fits(split, activation, dtype)
                _transfer(split, activation, [small], ops.widen.default, False, (activation.value.dtype,), None)
    for device, seed in seeds.items():
        seed.update_arg(0, rows[device])
        seed.meta["val"] = seed.meta["val"].new_empty(rows[device], 2)
    return split


def _after(split: Split, node: fx.Node) -> Any:
    """Insertion point behind `node`, and behind all inputs of the graph."""
    last = max(split.forward.graph.find_nodes(op="placeholder"), default=node)
    return split.forward.graph.inserting_after(max(node, last))


def _seed(split: Split, device: torch.device, seeds: dict[torch.device, fx.Node]) -> fx.Node:
    """The seeds of this forward call on a device, drawn at the top of the graph, once; `rewrite` sets their number."""
    if device not in seeds:
        graph = split.forward.graph
        last = max(graph.find_nodes(op="placeholder"))
        with graph.inserting_after(last):
            seeds[device] = call(graph, ops.draw_seed.default, 1, device)
    return seeds[device]


def _in_memory_order(split: Split, activation: SavedActivation) -> tuple[fx.Node, list[int] | None]:
    """The activation as a contiguous tensor, and the permutation that gives its own strides back, if one is needed."""
    value = activation.value
    order = dense_order(value)
    assert order is not None  # find refuses others
    if order == list(range(value.dim())):
        return activation.node, None
    with _after(split, activation.node):
        x = call(split.forward.graph, aten.permute.default, activation.node, order, like=activation.node)
    return x, [order.index(d) for d in range(value.dim())]


def _parts(split: Split, encoded: fx.Node) -> list[fx.Node]:
    graph, parts, at = split.forward.graph, [], encoded
    for i, value in enumerate(encoded.meta["val"]):
        with graph.inserting_after(at):
            at = graph.call_function(operator.getitem, (encoded, i))
        at.meta["val"] = value
        parts.append(at)
    return parts


def _transfer(
    split: Split,
    activation: SavedActivation,
    encoded: Sequence[fx.Node],
    decode: Any,
    sized: bool,
    tail: tuple[Any, ...],
    restore: list[int] | None,
) -> None:
    """Saves `encoded` in the activation's place and decodes it before the activation's first use in backward."""
    graph, old = split.backward.graph, activation.placeholder
    labels = ("words", "low", "high") if len(encoded) == 3 else ("words",)
    inputs = [
        split.save(e, f"{activation.node.name}_{label}", like=activation.node)
        for e, label in zip(encoded, labels, strict=True)
    ]
    with graph.inserting_before(_first_use(old)):
        value = activation.value
        shape = list(value.shape) if restore is None else [value.shape[restore.index(d)] for d in range(value.dim())]
        sizes = ([size_in_backward(split, s) for s in shape],) if sized else ()
        decoded = call(graph, decode, *inputs, *sizes, *tail, like=old)
        if restore is not None:
            decoded = call(graph, aten.permute.default, decoded, restore, like=old)
    decoded.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(decoded)
    split.drop(old)


def _first_use(placeholder: fx.Node) -> fx.Node:
    """Moves views of a saved value down to the first op that reads it, and returns the first of these nodes."""
    views: list[fx.Node] = []
    todo, reads = [placeholder], []
    while todo:
        for user in todo.pop().users:
            if is_view(user) and user.args[0] in (placeholder, *views):
                views.append(user)
                todo.append(user)
            else:
                reads.append(user)
    first = min(reads) if reads else max(views)
    moved = sorted({v for v in views if v < first})
    for view in moved:
        first.prepend(view)
    return moved[0] if moved else first


def _recompute(split: Split, activation: SavedActivation) -> None:
    """Copies a constant's maker into backward."""
    graph, node, old = split.backward.graph, activation.node, activation.placeholder
    with graph.inserting_before(_first_use(old)):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: size_in_backward(split, n.meta["val"]))
        made = graph.create_node(node.op, node.target, args, kwargs)
    made.meta.update({k: v for k, v in node.meta.items() if k != "desc"})
    old.replace_all_uses_with(made)
    split.drop(old)


def size_in_backward(split: Split, size: Any) -> Any:
    """An int, or a node of the backward graph that has this symbolic size."""
    if isinstance(size, int):
        return size
    symbols = {}
    for node in split.backward.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            symbols[_torch.expression(value)] = node
    expression = _torch.expression(size)
    if expression not in symbols:
        for symbol in sorted(expression.free_symbols - symbols.keys(), key=str):
            symbols[symbol] = split.save_symbol(symbol)
    return _torch.size_node(expression, symbols)


def _assert_fits(split: Split, activation: SavedActivation, dtype: torch.dtype) -> None:
    """Adds the run-time assertion that an index's symbolic bound fits `dtype`."""
    largest = torch.iinfo(dtype).max
    placeholder = activation.placeholder
    with split.backward.graph.inserting_before(_first_use(placeholder)):
        size = size_in_backward(split, activation.bound)
        graph = split.backward.graph
        fits = graph.call_function(operator.le, (size, largest))
        fits.meta["val"] = activation.bound <= largest  # type: ignore[operator]
        graph.call_function(
            aten._assert_scalar.default, (fits, f"actcompile: an index of {activation.op} does not fit {dtype}")
        )
