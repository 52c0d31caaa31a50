"""`verify`: our own invariants after the rewrite. A broken one is an error at compile time, never a wrong gradient."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import fx

from ..codecs.codecs import Cast, Copy, Keep, LowRank, Narrow, PackBits, Prune, Quantize, SampleRows
from ..graph.split import Split, is_size, is_tensor
from ..plan.plan import Plan

ops = torch.ops.actcompile
PAIRS = {
    PackBits: (ops.pack_bits.default, ops.unpack_bits.default),
    Narrow: (ops.narrow.default, ops.widen.default),
    Prune: (ops.prune.default, ops.restore_pruned.default),
    LowRank: (ops.low_rank.default, ops.restore_low_rank.default),
    SampleRows: (ops.sample_rows.default, ops.restore_rows.default),
}
SEEDED: dict[object, Callable[[tuple[object, ...]], object]] = {  # ops that draw random bits -> their seed and row
    ops.quantize.default: lambda args: args[1:3],
    ops.sample_rows.default: lambda args: args[1:3],
    ops.rademacher.default: lambda args: args[0:2],
}
FORBIDDEN = ("tangents", "bwd_seed", "bwd_base_offset", "bwd_rng_state")  # torch reads a meaning into these names


class InvariantError(AssertionError):
    """A rewritten graph breaks an invariant: a defect of actcompile, please report it with the graphs."""


def verify(split: Split, plan: Plan, user_outputs: list[object], gradients: int) -> None:
    """Checks both graphs after `split.finish`.

    Args:
        user_outputs: the forward's first outputs before any pass ran.
        gradients: number of the backward's outputs before any pass ran.

    Raises:
        InvariantError: with the invariant and the node.
    """
    forward, backward = split.forward.graph, split.backward.graph
    forward.lint()
    backward.lint()
    returned = list(forward.output_node().args[0])  # type: ignore[arg-type]
    _require(returned[: len(user_outputs)] == user_outputs, "the user's outputs changed", returned)
    saved = returned[len(user_outputs) :]
    _require(len(_returned(backward)) == gradients, "the number of gradients changed", _returned(backward))

    inputs = [n for n in backward.find_nodes(op="placeholder") if n not in split.runtime_inputs]
    sizes = [n for n in saved if is_size(n)]
    others = [n for n in saved if n not in sizes]
    _require(saved == others + sizes, "sizes are not the last of what is saved", saved)
    _require(len(inputs) == len(saved), "forward saves another number of values than backward takes", inputs)
    pairs = dict(split.pairs)
    tensors = [n for n in others if is_tensor(n)]
    _require([pairs[n] for n in sizes] == inputs[: len(sizes)], "sizes come in another order", inputs)
    _require(
        [pairs[n] for n in tensors] == [p for p in inputs if is_tensor(p)], "tensors come in another order", inputs
    )
    for node, placeholder in split.pairs:
        if not is_tensor(node):
            continue
        a, b = node.meta["val"], placeholder.meta["val"]
        _require(
            (a.dtype, a.device) == (b.dtype, b.device), "backward takes another tensor than was saved", placeholder
        )
        _require(not any(word in placeholder.name for word in FORBIDDEN), "a name that torch reads", placeholder)

    compressed = [c for c in plan.choices if not isinstance(c.codec, Keep)]
    for choice in compressed:
        node = choice.activation.node
        _require(node not in saved, "a compressed activation is saved all the same", node)
    quantized = forward.find_nodes(op="call_function", target=ops.quantize.default)
    wanted = Counter(_format(c.codec) for c in compressed if isinstance(c.codec, Quantize))
    _require(Counter(n.args[3:6] for n in quantized) == wanted, "formats of the plan and of forward differ", quantized)
    decoded = backward.find_nodes(op="call_function", target=ops.dequantize.default)
    used = {n.args[0]: n.args[5:8] for n in decoded}  # what is rebuilt from an activation decodes it apart
    _require(Counter(used.values()) == wanted, "formats of the plan and of backward differ", decoded)
    kinds = Counter(Narrow if _is_short_cast(c.codec) else type(c.codec) for c in compressed)
    for codec, (encoding, decoding) in PAIRS.items():
        number = kinds[codec]
        made = forward.find_nodes(op="call_function", target=encoding)
        read = {n.args[0] for n in backward.find_nodes(op="call_function", target=decoding)}
        _require((len(made), len(read)) == (number, number), "encoded, planned and decoded numbers differ", encoding)
    copies = sum(isinstance(c.codec, Copy) for c in compressed)
    made = forward.find_nodes(op="call_function", target=ops.copy.default)
    _require(len(made) == copies, "copied and planned numbers differ", made)
    signs = [
        {n.args[1:] for n in g.find_nodes(op="call_function", target=ops.rademacher.default)}
        for g in (forward, backward)
    ]
    _require(signs[0] == signs[1], "forward and backward project differently", signs)
    drawing = [n for n in forward.nodes if n.target in SEEDED]
    salts = [SEEDED[n.target](n.args) for n in drawing]
    _require(len(set(salts)) == len(salts), "two activations share random bits", salts)


def _is_short_cast(codec: object) -> bool:
    """Whether floats are cast as integers are narrowed; fp8 has ops of its own."""
    return isinstance(codec, Cast) and codec.dtype.itemsize > 1


def _format(codec: Quantize) -> tuple[object, ...]:
    return codec.format.bits, codec.format.block, codec.format.levels


def _returned(graph: fx.Graph) -> list[object]:
    args = graph.output_node().args[0]
    return list(args) if isinstance(args, (list, tuple)) else [args]


def _require(condition: bool, what: str, where: object) -> None:
    if not condition:
        raise InvariantError(f"actcompile: {what}: {where}; the graphs were not compiled")
