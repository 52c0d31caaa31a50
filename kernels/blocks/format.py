"""`BlockFormat`: the one place that knows how many bits, bytes and words a quantised tensor has.

The layout. A tensor is read in row-major order. `group` consecutive elements are packed together into `words` 32-bit
words; a word has `planes = 32 // bits` fields, and field `k` of word `j` holds element `k * words + j` of its group. So
plane `k` of a group is a run of `words` consecutive elements, and packing is a loop over `j` with unit stride in every
load and store: no lane ever needs a neighbour's value, neither in a Triton program nor in a SIMD register.

`block` consecutive elements share a minimum and a maximum. A group holds one block, or several blocks of whole planes:
short blocks then still fill a vector register, and rows of an odd width (47, 100) can be one plane each.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

Levels = Literal["uniform", "variance-minimising", "half-normal"]

BITS = (1, 2, 4, 8)
LEVELS: tuple[Levels, ...] = ("uniform", "variance-minimising", "half-normal")
EXPLICIT_BITS = (2, 4)  # 1 bit has both levels at the ends; 256 levels would be 255 clamps, and gain next to nothing
GRID = 2**20  # levels are multiples of 1 / GRID: the same on every machine, and up to 4 bits exact in float32
METADATA = (torch.float32, torch.bfloat16)
LANES = 16  # 32-bit lanes of an AVX-512 register, two of AVX2: the least `words` that a vectorised loop over `j` fills


def levels_text(values: Iterable[float]) -> str:
    """The one spelling of explicit levels: each rounded to 1 / GRID, in the fewest decimals that tell it apart."""
    return ",".join(_shortest(float(value)) for value in values)


def _shortest(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError(f"levels must be finite, got {value!r}")
    place = round(value * GRID)
    decimals = (f"{place / GRID:.{digits}f}" for digits in range(8))  # 10**-7 < 1 / GRID: seven are always enough
    return next(text for text in decimals if round(float(text) * GRID) == place)


@lru_cache
def explicit_levels(text: str, bits: int) -> tuple[float, ...]:
    """The `2**bits` levels on the code axis that `text` spells, rounded to 1 / GRID.

    Raises:
        ValueError: `text` is neither a name in `LEVELS` nor `2**bits` ascending numbers from 0 to `2**bits - 1`.
    """
    top = 2**bits - 1
    try:
        values = tuple(round(float(value) * GRID) / GRID for value in text.split(","))
    except (ValueError, OverflowError):  # not a number; not a finite one
        wanted = f"or {top + 1} finite ascending numbers from 0 to {top} such as '0,0.8,2.1,3' for 2 bits"
        raise ValueError(f"levels must be one of {LEVELS}, {wanted}, got {text!r}") from None
    if bits not in EXPLICIT_BITS:
        raise ValueError(f"levels must be one of {LEVELS} for {bits} bits, explicit ones are for 2 and 4, got {text!r}")
    if len(values) != top + 1:
        raise ValueError(f"levels must be {top + 1} numbers for {bits} bits, got {len(values)} in {text!r}")
    if values[0] != 0 or values[-1] != top:
        raise ValueError(f"levels must start at 0 and end at {top}, the ends of a block, got {text!r}")
    if any(right <= left for left, right in zip(values, values[1:], strict=False)):
        raise ValueError(f"levels must ascend by at least 2**-20 each, got {text!r}")
    return values


@dataclass(frozen=True)
class BlockFormat:
    """A block-wise quantised number format.

    Args:
        bits: bits per element, 1, 2, 4 or 8.
        block: elements that share one minimum and one maximum, at least 1.
        levels: "uniform"; "variance-minimising" for a block modelled as a clipped normal (i-EXACT, eq. 6 to 9);
            "half-normal" for one modelled as the positive half of a normal, as ReLU leaves it; or, for 2 and 4 bits,
            `2**bits` ascending numbers from 0 to `2**bits - 1`, as in "0,0.8,2.1,3", that the format
            keeps as `levels_text` spells them.
        metadata: dtype in which a block's minimum and maximum are kept, `torch.float32` or `torch.bfloat16`.
        words: 32-bit words per group; 0 chooses it from `block`.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    bits: int = 2
    block: int = 256
    levels: str = "uniform"
    metadata: torch.dtype = torch.float32
    words: int = 0

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {self.bits!r}")
        if not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"block must be a positive integer, got {self.block!r}")
        if not isinstance(self.levels, str):
            raise ValueError(f"levels must be a string, one of {LEVELS} or numbers, got {self.levels!r}")
        if self.levels not in LEVELS:
            object.__setattr__(self, "levels", levels_text(explicit_levels(self.levels, self.bits)))
        if self.metadata not in METADATA:
            raise ValueError(f"metadata must be torch.float32 or torch.bfloat16, got {self.metadata!r}")
        if type(self.words) is not int or self.words < 0:
            raise ValueError(f"words must be an integer of at least 0, got {self.words!r}")
        if self.words == 0:
            object.__setattr__(self, "words", self._default_words())
        slots = self.planes * self.words
        whole_planes = slots % self.block == 0 and self.block % self.words == 0
        if not whole_planes and not self.block <= slots < self.block + self.planes:
            raise ValueError(
                f"words={self.words} does not fit block={self.block}: a group of {slots} slots must hold one block, or "
                f"several blocks of whole planes of {self.words} elements; pass words=0 to choose it automatically"
            )

    def _default_words(self) -> int:
        short = self.block < self.planes * LANES
        if short and (self.planes * LANES) % self.block == 0 and self.block % LANES == 0:
            return LANES
        return -(-self.block // self.planes)

    @property
    def planes(self) -> int:
        """Elements per 32-bit word."""
        return 32 // self.bits

    @property
    def top(self) -> int:
        """The largest code, `2**bits - 1` (B in the papers)."""
        return (1 << self.bits) - 1

    @property
    def group(self) -> int:
        """Consecutive elements that are packed into one run of `words` words."""
        slots = self.planes * self.words
        return slots if slots % self.block == 0 else self.block

    @property
    def blocks_per_group(self) -> int:
        return self.group // self.block

    def groups(self, numel):
        """Groups of a tensor of `numel` elements (an int or a SymInt; nothing is guarded on)."""
        return (numel + self.group - 1) // self.group

    def nbytes(self, numel):
        """Bytes that `numel` elements take: words and metadata, the unused end of the last group included."""
        metadata = 2 * self.blocks_per_group * self.metadata.itemsize
        return self.groups(numel) * (4 * self.words + metadata)


@lru_cache(maxsize=1024)
def block_format(bits: int, block: int, levels: str, metadata: torch.dtype, words: int) -> BlockFormat:
    """A `BlockFormat`, made and checked once: of the arguments of an op, in every call."""
    return BlockFormat(bits, block, levels, metadata, words)


def bit_words(numel, words: int):
    """Shape `(groups, words)` of `numel` booleans packed to one bit each, `32 * words` to a group."""
    return (numel + 32 * words - 1) // (32 * words), words
