"""What the Triton kernels have in common: how a planar group is cut into tiles, and how a tile's ends are masked.

A program works on a tile of `groups` groups by `width` words. Plane `k` of a tile is a two-dimensional run of elements,
`width` of them contiguous, so a thread that holds `lanes` neighbouring words loads `lanes` neighbouring elements of
every plane in one instruction, has all bits of its words in its own registers, and hashes once per word. Sizes are
runtime values: `PARTIAL` (the last group is not full) is the only thing about them that is compiled in, and even then
all tiles but the last run without masks. Offsets are 64 bit up to the start of a tile and 32 bit within it.
"""

import contextlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .format import BlockFormat

THREADS = 32  # per warp
LOAD = 16  # bytes that one instruction of one thread loads at most
WARPS = 4
LONGEST = 1024  # words of one group that a program keeps in registers


@dataclass(frozen=True)
class Tile:
    """`groups` groups by `width` words (both powers of two) for one program of `warps` warps."""

    groups: int
    width: int
    warps: int

    def programs(self, groups: int) -> int:
        return -(-groups // self.groups)


@dataclass(frozen=True)
class Units:
    """How elements are standardised: of so many columns, 0 for not at all, with a shift or without."""

    columns: int = 0
    shifted: bool = False

    @staticmethod
    def of(shift: Tensor | None, scale: Tensor | None, columns: int) -> "Units":
        return NONE if scale is None else Units(columns, shift is not None)


NONE = Units()


def constants(fmt: BlockFormat, mapping: tuple, tile: Tile, units: Units) -> dict[str, Any]:
    """The compile-time arguments of all kernels of a format; `mapping` is an `encode_map` or `decode_map`."""
    slope, terms = mapping
    return {
        "BITS": fmt.bits,
        "BLOCK": fmt.block,
        "WORDS": fmt.words,
        "GROUP": fmt.group,
        "SLOPE": slope,
        "TERMS": terms,
        "GROUPS": tile.groups,
        "W": tile.width,
        "COLUMNS": units.columns,
        "SHIFTED": units.shifted,
    }


@lru_cache(maxsize=1024)
def tile_for(words: int, lanes: int) -> Tile:
    """The tile for groups of `words` words, of which each thread holds `lanes` neighbours, or all of them."""
    width = min(triton.next_power_of_2(words), LONGEST)
    lanes = min(lanes, width)
    groups = max(1, WARPS * THREADS * lanes // width)
    return Tile(groups, width, min(32, max(WARPS, groups * width // (THREADS * lanes))))


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of `x` the current one, which Triton launches on; the interpreter's CPU tensors need nothing."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
def rows(tile, groups, GROUPS: tl.constexpr):
    """The tile's groups, those past the end replaced by the last one, so that loads need no mask; and which exist."""
    g = tl.arange(0, GROUPS)
    left = tl.minimum(groups - tile, GROUPS).to(tl.int32)
    return tl.minimum(g, left - 1), g < left


@triton.jit
def elements_left(numel, tile, GROUP: tl.constexpr, GROUPS: tl.constexpr, LONG: tl.constexpr):
    """Elements from the start of group `tile` on, at most as many as a tile has; an int32, an int64 where `LONG`."""
    left = tl.minimum(numel - tile * GROUP, GROUPS * GROUP)
    return left if LONG else left.to(tl.int32)


@triton.jit
def plane_mask(row, j, left, k: tl.constexpr, PARTIAL: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr):
    """Which words `j` of groups `row` have an element in plane `k`; `left` counts where the last group is `PARTIAL`."""
    within = k * WORDS + j[None, :]
    mask = (j < WORDS)[None, :] & (within < GROUP)
    if PARTIAL:
        mask = mask & (row[:, None] * GROUP + within < left)
    return mask
