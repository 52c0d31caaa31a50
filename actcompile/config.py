"""What a user can set: `Config`, and the rules for single modules."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch

from actcompile.kernels.format import BITS, LEVELS, Levels
from actcompile.passes.plan import Policy

Inner = Literal["inductor", "aot_eager"]
METADATA = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Rule:
    """How to keep what one module saves; made by `keep`, `lossless` or `bits`."""

    name: str
    bits: int | None


def keep() -> Rule:
    """Keeps everything that a module saves as it is."""
    return Rule("keep", None)


def lossless() -> Rule:
    """Uses lossless codecs only: masks in bits, narrow integers, constants made anew; floats stay exact."""
    return Rule("lossless", None)


def bits(number: int) -> Rule:
    """Keeps every float that a module saves in `number` bits, 1, 2, 4 or 8, whether that biases a gradient or not."""
    if number not in BITS:
        raise ValueError(f"bits(number): number must be one of {BITS}, got {number!r}")
    return Rule("bits", number)


@dataclass(frozen=True)
class Config:
    """How activations are kept.

    Args:
        bits: bits per element of floats whose rounding leaves every gradient unbiased: 1, 2, 4, 8, or None (exact).
        nonlinear_bits: the same for floats whose rounding biases some gradient; "auto" gives 4 bits where the bias is
            averaged over many elements (BatchNorm's input), else 8.
        block: elements that share a minimum and a maximum; fitted to each tensor's width.
        levels: "variance-minimising" or "uniform".
        metadata: dtype of a block's minimum and maximum, "float32" or "bfloat16".
        min_bytes: smaller tensors are kept.
        rules: from a pattern of module paths, such as "convs.0.*", to `keep()`, `lossless()` or `bits(8)`. A pattern
            also matches what is inside the module it names; the first match wins; "*" matches everything, also what the
            model computes outside its submodules.
        inner: the compiler of the rewritten graphs: "inductor", or "aot_eager", which runs them as they are.

    Raises:
        ValueError, TypeError: a field is wrong; the message names it.
    """

    bits: int | None = 2
    nonlinear_bits: int | Literal["auto"] | None = "auto"
    block: int = 256
    levels: Levels = "variance-minimising"
    metadata: Literal["float32", "bfloat16"] = "float32"
    min_bytes: int = 16384
    rules: Mapping[str, Rule] | tuple[tuple[str, Rule], ...] = field(default=())
    inner: Inner = "inductor"

    def __post_init__(self) -> None:
        _one_of("bits", self.bits, (*BITS, None))
        _one_of("nonlinear_bits", self.nonlinear_bits, (*BITS, "auto", None))
        _one_of("levels", self.levels, LEVELS)
        _one_of("metadata", self.metadata, tuple(METADATA))
        _one_of("inner", self.inner, ("inductor", "aot_eager"))
        for name, least in (("block", 8), ("min_bytes", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        pairs = tuple(self.rules.items()) if isinstance(self.rules, Mapping) else self.rules
        if not isinstance(pairs, (tuple, type({}.items()))) or not all(
            isinstance(p, tuple) and len(p) == 2 for p in pairs
        ):
            raise TypeError(f'rules must map module patterns to rules, like {{"head": bits(8)}}, got {self.rules!r}')
        for pattern, rule in pairs:
            if not isinstance(pattern, str) or not isinstance(rule, Rule):
                raise TypeError(f"rules[{pattern!r}] must be keep(), lossless() or bits(n), got {rule!r}")
        object.__setattr__(self, "rules", pairs)  # hashable, and with a stable order

    @classmethod
    def make(cls, config: "Config | None" = None, **options: Any) -> "Config":
        """A config from another one and single fields; an unknown field is an error that lists the known ones."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"unknown option {name!r}; known are {', '.join(known)}")
        return replace(config or cls(), **options)

    def policy(self) -> Policy:
        """The planner's view of this config."""
        base = Policy(self.bits, self.nonlinear_bits, self.block, self.levels, METADATA[self.metadata], self.min_bytes)
        made = {
            "keep": lambda rule: replace(base, lossless=False),
            "lossless": lambda rule: replace(base, bits=None, nonlinear_bits=None),
            "bits": lambda rule: replace(base, bits=rule.bits, nonlinear_bits=rule.bits),
        }
        rules = dict(self.rules)
        return replace(base, rules=tuple((pattern, made[rule.name](rule)) for pattern, rule in rules.items()))


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or isinstance(value, bool):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
