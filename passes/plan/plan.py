"""`plan`: which codec for which saved activation, and why. Pure: no graph is touched.

A table of rules, first match wins. Within bounds `fit` takes the same facts, and returns other ways.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from actcompile.kernels.blocks.format import LANES

from ..codecs.codecs import (
    EXACT,
    Cast,
    Codec,
    Copy,
    Keep,
    LowRank,
    Narrow,
    PackBits,
    Prune,
    Quantize,
    Recompute,
    SampleRows,
)
from ..codecs.standardise import standard
from ..graph import _torch
from ..graph.bias import Dependence
from ..graph.find import SavedActivation, memory_order, numel_hint, own_nbytes
from ..graph.split import root
from .formats import fit_format, plane_width, row_width
from .policy import Policy

# Elements to average over, from which rounding to 4 bits, or to 2, biases by less than 0.3 %: a block of normal values
# has a variance of 0.017, or 0.4, of their own.
FEW, MANY = 8, 1024
LINE = 128  # bytes that a GPU reads and writes at once: as many neighbours of a mask travel together
MOST_HEADS = 16  # of attention, in which each has one number to a row


@dataclass(frozen=True)
class Choice:
    """The codec of one saved activation, its bytes with it, and the reason; `by_rules`: what the rule table chose."""

    activation: SavedActivation
    codec: Codec
    nbytes: int
    dependence: Dependence | None
    reason: str
    by_rules: Codec


@dataclass(frozen=True)
class Plan:
    """One choice for every saved activation, in the order of the forward's outputs."""

    choices: tuple[Choice, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes without codecs; with exact masks that `masks` added, so more than torch alone would save."""
        return sum(c.activation.nbytes for c in self.choices)

    @property
    def bytes_after(self) -> int:
        return sum(c.nbytes for c in self.choices)

    def under(self, policy: Policy) -> "Plan":
        """What the rule table chooses for the same activations under another policy."""
        dependences = {c.activation.placeholder: c.dependence for c in self.choices if c.dependence is not None}
        return plan([c.activation for c in self.choices], dependences, policy)

    def rounding_only(self, keys: Collection[str]) -> "Plan":
        """The same plan, in which floats are rounded only where the activation's key is one of `keys`."""

        def exact(choice: Choice) -> Choice:
            if isinstance(choice.codec, EXACT) or choice.activation.key in keys:
                return choice
            return replace(choice, codec=Keep(), nbytes=choice.activation.nbytes, reason="kept exact, to compare")

        return Plan(tuple(exact(choice) for choice in self.choices))

    def taking(self, ways: Mapping[str, Choice], min_bytes: int) -> "Plan":
        """The same plan, with the codecs and reasons that other choices, by the activation's key, have for it."""
        saved = {choice.activation.node for choice in self.choices}

        def other(choice: Choice) -> Choice:
            way = ways.get(choice.activation.key)
            if way is None:
                return choice
            nbytes = nbytes_with(way.codec, choice.activation, saved)
            return replace(choice, codec=way.codec, nbytes=nbytes, reason=way.reason)

        return Plan(tuple(let_go([other(choice) for choice in self.choices], min_bytes)))


def plan(activations: Sequence[SavedActivation], dependences: Mapping[fx.Node, Dependence], policy: Policy) -> Plan:
    """Chooses a codec for every saved activation.

    Args:
        activations: what `find` returned.
        dependences: what `bias` returned, by backward placeholder.
        policy: bits, block, levels and per-module rules.
    """
    choices = []
    saved = {activation.node for activation in activations}
    units = {root(n) for a in activations if (form := standard(a.node)) for n in (form.scale, *form.plus, *form.minus)}
    for activation in activations:
        dependence = dependences.get(activation.placeholder)
        codec, reason = choose(activation, dependence, policy.for_module(activation.module))
        if not isinstance(codec, Keep) and root(activation.node) in units and activation.value.is_floating_point():
            codec, reason = Keep(), "others are rounded in its units: kept exact"
        nbytes = nbytes_with(codec, activation, saved)
        if nbytes >= min(activation.nbytes, own_nbytes(activation.value)) and not isinstance(codec, Keep):
            codec, nbytes, reason = Keep(), activation.nbytes, f"{codec} would take {nbytes} bytes: not less"
        choices.append(Choice(activation, codec, nbytes, dependence, reason, codec))
    return Plan(tuple(let_go(choices, policy.min_bytes)))


def let_go(choices: Sequence[Choice], min_bytes: int) -> list[Choice]:
    """Copies views that are kept where the memory that they are views of is needed for nothing else and is larger."""
    groups: dict[fx.Node, list[Choice]] = {}
    for choice in choices:
        groups.setdefault(root(choice.activation.node), []).append(choice)
    made: dict[fx.Node, Choice] = {}
    for group in groups.values():
        memory = sum(c.activation.nbytes for c in group)
        kept = [c for c in group if isinstance(c.codec, Keep)]
        pieces = {c.activation.node: own_nbytes(c.activation.value) for c in kept}
        if memory - sum(pieces.values()) >= max(min_bytes, 1):
            reason = "{}; copied, and the rest of the tensor that it is a view of is let go"
            codecs = [replace(c, codec=Copy(), reason=reason.format(c.reason)) for c in kept]
            made |= {c.activation.node: replace(c, nbytes=pieces[c.activation.node]) for c in codecs}
        elif kept and len(kept) < len(group):  # what others share of the memory stays, too
            others = memory - sum(c.nbytes for c in kept)
            made[kept[0].activation.node] = replace(kept[0], nbytes=kept[0].nbytes + others)
    return [made.get(c.activation.node, c) for c in choices]


def choose(a: SavedActivation, dependence: Dependence | None, policy: Policy) -> tuple[Codec, str]:
    """The rule table."""
    value = a.value
    if a.refusal is not None:
        return Keep(), a.refusal
    if not policy.lossless:
        return Keep(), "a rule of the configuration keeps it"
    if a.nbytes < policy.min_bytes:
        return Keep(), f"small: under {policy.min_bytes} bytes"
    if is_constant(a.node):
        return Recompute(), "a constant: made anew in backward"
    if value.dtype is torch.bool:
        on_cpu = value.device.type == "cpu"
        return PackBits(plane_width(row_width(a), 32, 32 * LANES) if on_cpu else LINE), "a mask: exact in one bit"
    if not value.is_floating_point():
        return _integer(a)
    if policy.exact is not None:
        return Keep(), policy.exact
    if policy.method is not None and policy.method[0] == "cast":
        return Cast(policy.method[1]), "rounded to nearest by the configuration: biased in itself"
    if dependence is None or not dependence.biased:
        if value.dim() > 1 and _is_column(value) and policy.bits is not None:
            return Keep(), "one number per row: its noise would reach the whole row"
        return _linear(a, policy)
    if policy.nonlinear_bits is None:
        return Keep(), f"biased through {dependence.op}: kept exact by the configuration"
    if _is_column(value):
        return Keep(), f"one number per row, biased through {dependence.op}: kept exact"
    if dependence.steep and policy.nonlinear_bits == "auto":
        how = f"biased through {dependence.op}, element by element, and steep near zero"
        if dependence.vanishing:
            return Keep(), f"{how}, of a sum that rounding may make zero: kept exact"
        if value.dtype is torch.float32:
            return Cast(torch.bfloat16), f"{how}: rounded relative to each element"
        return Keep(), f"{how}: kept exact"
    bits, how = bits_of(dependence, value, policy), "in the configuration's bits"
    assert bits is not None
    if policy.nonlinear_bits == "auto":
        over = dependence.averaged_over
        how = f"by its variance over {over}" if over > 1 else "element by element"
    return _quantize(a, bits, policy), f"biased through {dependence.op}, {how}"


def bits_of(dependence: Dependence, value: torch.Tensor, policy: Policy) -> int | None:
    """Bits for a float of which the gradients depend so; None where it is kept exact."""
    if not dependence.biased:
        return None if value.dim() > 1 and _is_column(value) else policy.bits
    if policy.nonlinear_bits is None or _is_column(value):
        return None
    if policy.nonlinear_bits != "auto":
        return policy.nonlinear_bits
    if dependence.steep:
        return 16  # at least
    if dependence.averaged_over >= MANY and policy.bits is not None:
        return policy.bits
    return max(4, policy.bits or 4) if dependence.averaged_over >= FEW else 8


def _is_column(value: torch.Tensor) -> bool:
    """Whether a tensor has one number to a row, or to each head of a row; more are a vector for an outer product."""
    if value.dim() < 2:
        return True
    heads = math.prod(value.shape[1:-1])
    return _torch.known_true(value.shape[-1] == 1) and _torch.known_true(heads <= MOST_HEADS)


def _linear(a: SavedActivation, policy: Policy) -> tuple[Codec, str]:
    """For a float that no gradient is non-linear in: all methods serve, and a projection."""
    width = row_width(a)
    wide = width if isinstance(width, int) else 0
    if policy.method is not None:
        name, ratio = policy.method
        if name == "sample_rows" and a.value.dim() > 1:
            return SampleRows(ratio), "used linearly: rows are sampled, and every gradient stays unbiased"
        if name in ("prune", "low_rank") and wide >= ratio:
            codec = Prune(wide // ratio) if name == "prune" else LowRank(wide // ratio)
            return codec, "used linearly; the codec itself is biased"
    if policy.bits is None:
        return Keep(), "floats are kept exact by the configuration"
    if policy.projection is not None and wide >= 2 * policy.projection:
        columns = wide // policy.projection
        return Quantize(fit_format(a, policy.bits, policy, columns), columns), (
            "used linearly: every gradient stays unbiased, also through a random projection"
        )
    return _quantize(a, policy.bits, policy), "used linearly: every gradient stays unbiased"


def _quantize(a: SavedActivation, bits: int, policy: Policy) -> Quantize:
    contiguous = memory_order(a.value) == list(range(a.value.dim()))
    standardised = policy.standardise and contiguous and standard(a.node) is not None
    return Quantize(fit_format(a, bits, policy, signed=standardised), standardised=standardised)


def nbytes_with(codec: Codec, a: SavedActivation, saved: Collection[fx.Node]) -> int:
    """Bytes that an activation takes with a codec, and those of statistics that are saved for it alone."""
    if isinstance(codec, Keep):
        return a.nbytes
    form = standard(a.node) if isinstance(codec, Quantize) and codec.standardised else None
    nodes = (form.scale, *form.plus) if form else ()
    statistics = sum(4 * numel_hint(n.meta["val"]) for n in nodes if n not in saved)
    return codec.nbytes(a.shape, a.value.dtype) + statistics


def _integer(a: SavedActivation) -> tuple[Codec, str]:
    if a.value.dtype is torch.uint8:
        return Keep(), "a mask of fused message passing: eight decisions a byte"
    if a.bound is None:
        return Keep(), "integers whose range is not known"
    if isinstance(a.bound, int):
        dtypes = (torch.int8, torch.int16, torch.int32)
        fits = next((d for d in dtypes if a.bound <= torch.iinfo(d).max), None)
    else:
        fits = torch.int32  # asserted at run time
    if fits is None or fits.itemsize >= a.value.dtype.itemsize:
        return Keep(), "integers that need their whole range"
    return Narrow(fits), f"an index below {a.bound}: exact in {8 * fits.itemsize} bits"


def is_constant(node: fx.Node) -> bool:
    """Whether a forward node is made of numbers and sizes alone."""
    makers = (torch.ops.aten.full.default, torch.ops.aten.arange.start_step, torch.ops.prims.iota.default)
    return node.target in makers and not any(isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes)
