"""Block formats that fit a tensor's width: the loops over them then have a unit stride."""

import math
from typing import Any

import torch

from actcompile.kernels import BlockFormat
from actcompile.kernels.blocks.format import LANES, Levels

from ..graph.find import SavedActivation, memory_order
from ..graph.signs import never_negative
from .policy import Policy

MOST_OF_SEVERAL_ROWS = 1024  # elements; i-EXACT's published bytes fit no larger blocks


def row_width(a: SavedActivation) -> Any:
    """Elements of a row, the dimension that is contiguous in memory; 1 where there are no rows."""
    return a.value.shape[memory_order(a.value)[-1]] if a.value.dim() > 1 else 1


def plane_width(width: Any, planes: int, group: int) -> int:
    """Words per group for which a plane never straddles a row: the loop over it then has a unit stride in the row.

    Of the divisors of the row's width and its multiples, the one nearest to `group / planes` that fills a vector
    register; `group / planes` itself where none is within a factor of four (prime widths), since larger blocks round
    more coarsely.
    """
    wanted = max(group // planes, LANES)
    if not isinstance(width, int) or width % wanted == 0 or wanted % max(width, 1) == 0:
        return wanted
    divisors = [d for d in range(LANES, width + 1) if width % d == 0]
    multiples = [width * m for m in range(1, math.ceil(2 * LANES / width) + 1) if width * m >= LANES]
    near = [d for d in divisors + multiples if d <= 4 * wanted]
    lanes = {d: -(-d // LANES) * LANES for d in near}  # those of the vectors that a run of `d` words takes
    return min(near, default=wanted, key=lambda d: (abs(math.log2(d / wanted)) + 1.5 * math.log2(lanes[d] / d), d))


def fit_format(a: SavedActivation, bits: int, policy: Policy, columns: int = 0, signed: bool = False) -> BlockFormat:
    """The block format of an activation, with `columns` columns after a projection, nearest to the policy's.

    `signed`: what is rounded has both signs, whatever the activation has.
    """
    fitted = (text for key, text in policy.fitted if key == a.key and len(text.split(",")) == 2**bits)
    levels: str | None = next(fitted, None)
    if levels is None:
        levels = _levels(a, bits, signed or columns > 0) if policy.levels == "auto" else policy.levels
    width = columns or row_width(a)
    if policy.rows_per_block is not None and isinstance(width, int) and width > 1:
        rows = max(1, min(policy.rows_per_block, MOST_OF_SEVERAL_ROWS // width))
        return BlockFormat(bits, rows * width, levels, policy.metadata)
    return block_format(width, bits, policy.block, levels, policy.metadata)


def _levels(a: SavedActivation, bits: int, signed: bool) -> Levels:
    """Half a normal's levels for what is never negative; with more bits they gain too little for their many clamps."""
    if signed or not never_negative(a.node):  # a projection has random signs
        return "variance-minimising"
    return "half-normal" if bits == 2 else "uniform"


def block_format(
    width: Any, bits: int, block: int, levels: str = "uniform", metadata: torch.dtype = torch.float32
) -> BlockFormat:
    """The block format nearest to `block` whose planes fit rows of `width` elements (1: not made of rows)."""
    planes = 32 // bits
    if block < LANES:
        return BlockFormat(bits, block, levels, metadata)
    words = plane_width(width, planes, block)  # several blocks to a group where it is longer than `block`
    per_block = min(planes, 2 ** max(0, round(math.log2(max(block / words, 1)))))
    return BlockFormat(bits, words * per_block, levels, metadata, words)
