"""What the rule table may do, for all of a model and for single modules."""

import fnmatch
from dataclasses import dataclass
from typing import Any, Literal

import torch

from actcompile.kernels.blocks.format import Levels

from ..graph.find import SavedActivation


@dataclass(frozen=True)
class Policy:
    """What the rule table may do.

    Attributes:
        bits: bits for floats whose rounding biases no gradient; None keeps them exact.
        nonlinear_bits: bits for floats whose rounding biases a gradient; None keeps them exact. "auto" gives `bits`
            where the bias is averaged over many elements (BatchNorm's input), 4 where over some, else 8.
        block, levels, metadata: fields of `BlockFormat`; `block` is fitted to the tensor's width, and "auto" levels
            are those of half a normal for what is never negative, of a clipped normal for all else.
        rows_per_block: a block is so many rows instead, of at most `MOST_OF_SEVERAL_ROWS` elements (i-EXACT's G/R).
        projection: floats whose rounding biases no gradient are projected at random to `width // projection` columns
            before they are rounded (EXACT's D/R); None: they are not.
        standardise: what a BatchNorm reads is rounded in the norm's own units.
        method: another codec for those floats than `Quantize`, as its name and its parameter.
        fitted: levels for single activations, by `SavedActivation.key`, for one or several numbers of bits.
        min_bytes: tensors smaller than this are kept.
        lossless: False keeps everything as it is.
        exact: why no float is rounded, or None.
        rules: (pattern of module paths, policy for what those modules save), first match wins.
    """

    bits: int | None = 2
    nonlinear_bits: int | Literal["auto"] | None = "auto"
    block: int = 64
    levels: Levels | Literal["auto"] = "auto"
    metadata: torch.dtype = torch.bfloat16
    min_bytes: int = 16384
    lossless: bool = True
    exact: str | None = None
    rows_per_block: int | None = None
    projection: int | None = None
    standardise: bool = True
    method: tuple[str, Any] | None = None
    fitted: tuple[tuple[str, str], ...] = ()
    rules: tuple[tuple[str, "Policy"], ...] = ()

    def compresses(self, activation: SavedActivation) -> bool:
        """Whether an activation is to be compressed, if only without loss."""
        return self.lossless and activation.nbytes >= self.min_bytes

    def wants(self, activation: SavedActivation) -> bool:
        """Whether a float is to be compressed, if only without loss."""
        return self.compresses(activation) and activation.value.is_floating_point()

    def for_module(self, path: str) -> "Policy":
        for pattern, policy in self.rules:
            if matches(pattern, path):
                return policy
        return self


def matches(pattern: str, path: str) -> bool:
    """Whether a rule's pattern names the module at `path`, or one that it is inside of."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")
