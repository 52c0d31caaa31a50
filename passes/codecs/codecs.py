"""The ways to keep a saved activation. A codec knows its bytes; `encode` knows which ops it means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actcompile.kernels import BlockFormat, bit_words
from actcompile.kernels.baselines.fp8 import fp8_nbytes
from actcompile.kernels.baselines.low_rank import low_rank_nbytes
from actcompile.kernels.baselines.prune import prune_nbytes
from actcompile.kernels.baselines.sample_rows import sample_rows_nbytes

Shape = Sequence[int]  # or of SymInts, which give a SymInt; nothing is guarded on


@dataclass(frozen=True)
class Keep:
    """As it is."""

    def __str__(self) -> str:
        return "keep"

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return math.prod(shape) * dtype.itemsize


@dataclass(frozen=True)
class Copy:
    """As it is, in memory of its own: the larger tensor that it is a view of is let go."""

    def __str__(self) -> str:
        return "copy"

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return math.prod(shape) * dtype.itemsize


@dataclass(frozen=True)
class Recompute:
    """Not at all: backward makes it anew from what it has."""

    def __str__(self) -> str:
        return "recompute"

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return 0


@dataclass(frozen=True)
class PackBits:
    """A bool tensor, lossless, one bit each; `words` 32-bit words to a group."""

    words: int

    def __str__(self) -> str:
        return "pack_bits"

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        groups, words = bit_words(math.prod(shape), self.words)
        return 4 * groups * words


@dataclass(frozen=True)
class Narrow:
    """An integer tensor, lossless, in a smaller integer dtype that holds every value it can have.

    `bound` is a size that no index reaches; where it is symbolic the graph asserts at run time that it fits.
    """

    dtype: torch.dtype

    def __str__(self) -> str:
        return f"narrow({_name(self.dtype)})"

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return math.prod(shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Quantize:
    """A float tensor in `format.bits` bits per element and a minimum and maximum per block.

    `columns`: the last dimension is first projected at random to so many columns (EXACT, sec. 3.2); 0: it is not.
    `standardised`: its columns are first brought to mean 0 and deviation 1, as the norm does that reads them.
    """

    format: BlockFormat
    columns: int = 0
    standardised: bool = False

    def __str__(self) -> str:
        kinds = {"uniform": "", "variance-minimising": ", normal levels", "half-normal": ", half-normal levels"}
        levels = kinds.get(self.format.levels, ", fitted levels") if self.format.bits > 1 else ""
        projection = f"projected to {self.columns}, " if self.columns else ""
        standardised = ", standardised" if self.standardised else ""
        return f"quantize({projection}{self.format.bits} bits, block {self.format.block}{standardised}{levels})"

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        numel = math.prod(shape)
        return self.format.nbytes(numel // shape[-1] * self.columns if self.columns else numel)


@dataclass(frozen=True)
class Prune:
    """The `kept` largest magnitudes of each row, and where they stand."""

    kept: int

    def __str__(self) -> str:
        return f"prune({self.kept} per row)"

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return prune_nbytes(math.prod(shape[:-1]), shape[-1], self.kept, dtype)


@dataclass(frozen=True)
class LowRank:
    """The best approximation of rank `rank` of the matrix of all rows."""

    rank: int

    def __str__(self) -> str:
        return f"low_rank({self.rank})"

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return low_rank_nbytes(math.prod(shape[:-1]), shape[-1], self.rank, dtype)


@dataclass(frozen=True)
class SampleRows:
    """One of `ratio` rows: the largest surely, others by chance and weighted, so that the mean is kept (WTA-CRS)."""

    ratio: int

    def __str__(self) -> str:
        return f"sample_rows(1 in {self.ratio})"

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return sample_rows_nbytes(math.prod(shape[:-1]), shape[-1], self.ratio, dtype)


@dataclass(frozen=True)
class Cast:
    """Rounded to nearest in a shorter float dtype; fp8 dtypes with one power of two for the whole tensor."""

    dtype: torch.dtype

    def __str__(self) -> str:
        return f"cast({_name(self.dtype)})"

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return fp8_nbytes(math.prod(shape)) if self.dtype.itemsize == 1 else math.prod(shape) * self.dtype.itemsize


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


Codec = Keep | Copy | Recompute | PackBits | Narrow | Quantize | Prune | LowRank | SampleRows | Cast
EXACT = (Keep, Copy, Recompute, PackBits, Narrow)  # decoding gives back the same bits
UNBIASED = (*EXACT, Quantize, SampleRows)  # it gives the same mean, over the random bits of encoding
