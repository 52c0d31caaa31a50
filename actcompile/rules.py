"""Rules: how what single modules save is kept, instead of what the config says of all."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from actcompile.kernels.blocks.format import BITS
from actcompile.passes.plan.policy import Policy

CASTS = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Rule:
    """How to keep what a module saves; made by `keep`, `lossless`, `bits`, or a method such as `sample_rows`."""

    name: str
    value: Any = None

    def __str__(self) -> str:
        return f"actcompile.{self.name}({'' if self.value is None else repr(self.value)})"


def keep() -> Rule:
    """Keeps everything that a module saves as it is."""
    return Rule("keep")


def lossless() -> Rule:
    """Uses lossless codecs only: masks in bits, narrow integers, constants made anew; floats stay exact."""
    return Rule("lossless")


def bits(number: int) -> Rule:
    """Keeps every float that a module saves in `number` bits, 1, 2, 4 or 8, whether that biases a gradient or not."""
    if number not in BITS:
        raise ValueError(f"bits(number): number must be one of {BITS}, got {number!r}")
    return Rule("bits", number)


def prune(ratio: int) -> Rule:
    """Keeps of every row the one in `ratio` elements of largest magnitude. Biased; for floats used linearly only."""
    return _method("prune", ratio)


def low_rank(ratio: int) -> Rule:
    """Keeps the best approximation of rank `width // ratio`. Biased; for floats used linearly only."""
    return _method("low_rank", ratio)


def sample_rows(ratio: int) -> Rule:
    """Keeps one in `ratio` rows, weighted (WTA-CRS, NeurIPS 2023). Unbiased; for floats used linearly only."""
    return _method("sample_rows", ratio)


def cast(dtype: str) -> Rule:
    """Rounds every float to nearest in "bfloat16", "float8_e4m3fn" or "float8_e5m2". Biased."""
    if dtype not in CASTS:
        raise ValueError(f"cast(dtype): dtype must be one of {', '.join(map(repr, CASTS))}, got {dtype!r}")
    return Rule("cast", dtype)


def _method(name: str, ratio: int) -> Rule:
    if not isinstance(ratio, int) or isinstance(ratio, bool) or ratio < 2:
        raise ValueError(f"{name}(ratio): ratio must be an integer of at least 2, got {ratio!r}")
    return Rule(name, ratio)


METHODS = ("prune", "low_rank", "sample_rows", "cast")


def with_rule(policy: Policy, rule: Rule) -> Policy:
    """The policy for a module that a rule is for."""
    match rule.name:
        case "keep":
            return replace(policy, lossless=False)
        case "lossless":
            return replace(policy, bits=None, nonlinear_bits=None, method=None)
        case "bits":
            return replace(policy, bits=rule.value, nonlinear_bits=rule.value, method=None)
        case "cast":
            return replace(policy, method=(rule.name, CASTS[rule.value]))
    return replace(policy, method=(rule.name, rule.value))


def rule_of(value: Any) -> Rule:
    """The rule of that name and parameter, as a saved plan has them.

    Raises:
        ValueError: there is none; the message lists what is known.
    """
    name, parameter = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    makers: dict[str, Callable[[Any], Rule]] = {
        "keep": lambda _: keep(),
        "lossless": lambda _: lossless(),
        "bits": bits,
        "cast": cast,
    }
    makers |= {"prune": prune, "low_rank": low_rank, "sample_rows": sample_rows}
    if name not in makers:
        raise ValueError(f"plan: there is no rule {name!r}; known are {', '.join(makers)}")
    return makers[name](parameter)
