"""`plan`: which codec for which saved activation, and why. Pure: no graph is touched.

For now a table of rules, first match wins. An optimiser that weighs bytes, seconds and variance takes the same facts
and returns the same `Plan`.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from actcompile.kernels import BlockFormat
from actcompile.kernels.format import LANES, Levels

from . import _torch
from .bias import Dependence
from .codecs import Codec, Keep, Narrow, PackBits, Quantize, Recompute
from .find import SavedActivation, numel_hint

AVERAGED = 64  # a factor with so many times fewer elements than the activation is an average over its rounding noise


@dataclass(frozen=True)
class Policy:
    """What the rule table may do.

    Attributes:
        bits: bits for floats whose rounding biases no gradient; None keeps them exact.
        nonlinear_bits: bits for floats whose rounding biases a gradient; None keeps them exact. "auto" gives 4 where
            the bias is averaged over many elements (BatchNorm's input), else 8.
        block, levels, metadata: fields of `BlockFormat`; `block` is fitted to the tensor's width.
        min_bytes: tensors smaller than this are kept.
        lossless: False keeps everything as it is.
        rules: (pattern of module paths, policy for what those modules save), first match wins.
    """

    bits: int | None = 2
    nonlinear_bits: int | Literal["auto"] | None = "auto"
    block: int = 256
    levels: Levels = "variance-minimising"
    metadata: torch.dtype = torch.float32
    min_bytes: int = 16384
    lossless: bool = True
    rules: tuple[tuple[str, "Policy"], ...] = ()

    def for_module(self, path: str) -> "Policy":
        for pattern, policy in self.rules:
            if matches(pattern, path):
                return policy
        return self


def matches(pattern: str, path: str) -> bool:
    """Whether a rule's pattern names the module at `path`, or one that it is inside of."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")


@dataclass(frozen=True)
class Choice:
    """The codec of one saved activation, its bytes with it, and the reason."""

    activation: SavedActivation
    codec: Codec
    nbytes: int
    dependence: Dependence | None
    reason: str


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


def plan(activations: Sequence[SavedActivation], dependences: Mapping[fx.Node, Dependence], policy: Policy) -> Plan:
    """Chooses a codec for every saved activation.

    Args:
        activations: what `find` returned.
        dependences: what `bias` returned, by backward placeholder.
        policy: bits, block, levels and per-module rules.
    """
    choices = []
    for activation in activations:
        dependence = dependences.get(activation.placeholder)
        codec, reason = choose(activation, dependence, policy.for_module(activation.module))
        if isinstance(codec, Keep):
            nbytes = activation.nbytes
        else:
            nbytes = codec.nbytes(activation.numel, activation.value.dtype.itemsize)
        if nbytes >= activation.nbytes and not isinstance(codec, Keep):
            codec, nbytes, reason = Keep(), activation.nbytes, f"{codec} would take {nbytes} bytes: not less"
        choices.append(Choice(activation, codec, nbytes, dependence, reason))
    return Plan(tuple(choices))


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
        return PackBits(plane_width(value, 32, 32 * LANES)), "a mask: exact in one bit"
    if not value.is_floating_point():
        return _integer(a)
    if dependence is None or not dependence.biased:
        if policy.bits is None:
            return Keep(), "floats are kept exact by the configuration"
        return Quantize(fit_format(value, policy.bits, policy)), "used linearly: every gradient stays unbiased"
    if policy.nonlinear_bits is None:
        return Keep(), f"biased through {dependence.op}: kept exact by the configuration"
    if value.dim() < 2 or _torch.known_true(value.shape[-1] == 1):
        return Keep(), f"one number per row, biased through {dependence.op}: kept exact"
    bits, how = policy.nonlinear_bits, "in the configuration's bits"
    if bits == "auto":
        averaged = _averages(dependence, a)
        bits, how = (4, "a mean over many elements") if averaged else (8, "element by element")
    return Quantize(fit_format(value, bits, policy)), f"biased through {dependence.op}, {how}"


def _integer(a: SavedActivation) -> tuple[Codec, str]:
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


def _averages(dependence: Dependence, a: SavedActivation) -> bool:
    """Whether the op that biases multiplies the activation with something averaged over many of its elements."""
    through = dependence.through
    if through is None or through.target not in (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor):
        return False
    sizes = [numel_hint(v) for n in through.all_input_nodes if isinstance(v := n.meta.get("val"), torch.Tensor)]
    return len(sizes) > 1 and min(sizes) * AVERAGED <= a.numel


def plane_width(value: torch.Tensor, planes: int, group: int) -> int:
    """Words per group for which a plane never straddles a row: the loop over it then has a unit stride in the row.

    Of the divisors of the row's width and its multiples, the one nearest to `group / planes` that fills a vector
    register; `group / planes` itself where none is within a factor of four (prime widths), since larger blocks round
    more coarsely.
    """
    wanted = max(group // planes, LANES)
    width = value.shape[-1] if value.dim() > 0 else 1
    if not isinstance(width, int) or value.dim() < 2 or width % wanted == 0 or wanted % max(width, 1) == 0:
        return wanted
    divisors = [d for d in range(LANES, width + 1) if width % d == 0]
    multiples = [width * m for m in range(1, math.ceil(2 * LANES / width) + 1) if width * m >= LANES]
    near = [d for d in divisors + multiples if d <= 4 * wanted]
    return min(near, default=wanted, key=lambda d: (abs(math.log2(d / wanted)) + (d % LANES != 0) * 0.25, d))


def fit_format(value: torch.Tensor, bits: int, policy: Policy) -> BlockFormat:
    """The block format nearest to the policy's whose planes fit the rows of `value`."""
    planes = 32 // bits
    if policy.block < planes * LANES:  # several blocks to a group
        return BlockFormat(bits, policy.block, policy.levels, policy.metadata)
    words = plane_width(value, planes, policy.block)
    per_block = min(planes, 2 ** max(0, round(math.log2(max(policy.block / words, 1)))))
    return BlockFormat(bits, words * per_block, policy.levels, policy.metadata, words)
