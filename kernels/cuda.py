"""The ops on CUDA tensors: Triton kernels, or the references, run by run, where Triton cannot be imported.

Triton is imported when the first op runs on a CUDA tensor, not before: importing it takes a second, and CPU users need
not have it.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .bits.lossless import pack_bits, pack_bits_in_runs, unpack_bits, unpack_bits_in_runs
from .blocks.format import BlockFormat, block_format
from .blocks.quantize import dequantize, dequantize_in_runs, quantize, quantize_in_runs

log = logging.getLogger(__name__)


class Quantize(Protocol):
    def __call__(
        self, x: Tensor, seed: Tensor, salt: int, fmt: BlockFormat, shift: Tensor | None, scale: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Dequantize(Protocol):
    def __call__(
        self,
        words: Tensor,
        low: Tensor,
        high: Tensor,
        size: Sequence[int],
        dtype: torch.dtype,
        fmt: BlockFormat,
        shift: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor: ...


class PackBits(Protocol):
    def __call__(self, mask: Tensor, words: int) -> Tensor: ...


class UnpackBits(Protocol):
    def __call__(self, packed: Tensor, size: Sequence[int]) -> Tensor: ...


class Forms(NamedTuple):
    """One implementation of each op. `edges` runs programs over edges; None where their reference has to."""

    quantize: Quantize
    dequantize: Dequantize
    pack_bits: PackBits
    unpack_bits: UnpackBits
    edges: Callable[..., None] | None


@lru_cache
def forms() -> Forms:
    """The Triton kernels; without Triton the references, which launch many kernels where Triton launches one."""
    try:
        from .bits.triton_lossless import pack_bits_triton, unpack_bits_triton
        from .blocks.triton_dequantize import dequantize_triton
        from .blocks.triton_quantize import quantize_triton
        from .edges.triton_run import run_triton
    except ImportError as error:
        log.warning(
            "Triton cannot be imported (%s): activations on CUDA are encoded, and fused message passing runs, by plain "
            "torch ops, several times slower and with more temporary memory. `pip install triton` (`triton-windows` on "
            "Windows) brings the kernels.",
            error,
        )
        return Forms(quantize_in_runs, dequantize_in_runs, pack_bits_in_runs, unpack_bits_in_runs, None)
    return Forms(quantize_triton, dequantize_triton, pack_bits_triton, unpack_bits_triton, run_triton)


@quantize.register_kernel("cuda")
def _(
    x: Tensor,
    seed: Tensor,
    salt: int,
    bits: int,
    block: int,
    levels: str,
    metadata: torch.dtype,
    words: int,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return forms().quantize(x, seed, salt, block_format(bits, block, levels, metadata, words), shift, scale)


@dequantize.register_kernel("cuda")
def _(
    words: Tensor,
    low: Tensor,
    high: Tensor,
    size: Sequence[int],
    dtype: torch.dtype,
    bits: int,
    block: int,
    levels: str,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    fmt = block_format(bits, block, levels, low.dtype, words.shape[1])
    return forms().dequantize(words, low, high, size, dtype, fmt, shift, scale)


@pack_bits.register_kernel("cuda")
def _(mask: Tensor, words: int) -> Tensor:
    return forms().pack_bits(mask, words)


@unpack_bits.register_kernel("cuda")
def _(packed: Tensor, size: Sequence[int], dtype: torch.dtype = torch.bool) -> Tensor:
    return forms().unpack_bits(packed, size).view(dtype)
