"""The ways to keep a saved activation. A codec knows its bytes; `rewrite` knows which ops it means."""

from dataclasses import dataclass

import torch

from actcompile.kernels import BlockFormat, bit_words


@dataclass(frozen=True)
class Keep:
    """As it is."""

    def __str__(self) -> str:
        return "keep"

    def nbytes(self, numel: int, itemsize: int) -> int:
        return numel * itemsize


@dataclass(frozen=True)
class Recompute:
    """Not at all: backward makes it anew from what it has."""

    def __str__(self) -> str:
        return "recompute"

    def nbytes(self, numel: int, itemsize: int) -> int:
        return 0


@dataclass(frozen=True)
class PackBits:
    """A bool tensor, lossless, one bit each; `words` 32-bit words to a group."""

    words: int

    def __str__(self) -> str:
        return "pack_bits"

    def nbytes(self, numel: int, itemsize: int) -> int:
        groups, words = bit_words(numel, self.words)
        return 4 * groups * words


@dataclass(frozen=True)
class Narrow:
    """An integer tensor, lossless, in a smaller integer dtype that holds every value it can have.

    `bound` is a size that no index reaches; where it is symbolic the graph asserts at run time that it fits.
    """

    dtype: torch.dtype

    def __str__(self) -> str:
        return f"narrow({str(self.dtype).removeprefix('torch.')})"

    def nbytes(self, numel: int, itemsize: int) -> int:
        return numel * self.dtype.itemsize


@dataclass(frozen=True)
class Quantize:
    """A float tensor in `format.bits` bits per element and a minimum and maximum per block."""

    format: BlockFormat

    def __str__(self) -> str:
        levels = ", minimal variance" if self.format.levels != "uniform" and self.format.bits > 1 else ""
        return f"quantize({self.format.bits} bits, block {self.format.block}{levels})"

    def nbytes(self, numel: int, itemsize: int) -> int:
        return self.format.nbytes(numel)


Codec = Keep | Recompute | PackBits | Narrow | Quantize
