"""The ops on CPU tensors: small C++ kernels, compiled once and kept, or the references, run by run.

The C++ is compiled by what Inductor compiles its own with, and kept where Inductor keeps its own. Where there is no
compiler, the references stand in.
"""

import ctypes
import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ._cpp import I32, I64, P, begin, library
from .bits.lossless import pack_bits, pack_bits_in_runs, unpack_bits, unpack_bits_in_runs
from .blocks.format import BlockFormat, bit_words, block_format
from .blocks.levels import decode_map, encode_map
from .blocks.quantize import columns, dequantize, dequantize_in_runs, empty_encoding, quantize, quantize_in_runs

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ALONE = 1 << 15  # elements that one thread works on sooner than others are woken


QUANTIZE = {
    "quantize": (P, P, I64, P, P, I64, P, P, P, P, I32),
    "dequantize": (P, P, P, P, I64, P, P, I64, P, I32),
}
BITS = {"pack_bits": (P, I64, I64, P, I32), "unpack_bits": (P, I64, I64, P, I32)}
MOST_TERMS = 16
SPECIALISE = True


class Format(ctypes.Structure):
    """`Format` of quantize.cpp."""

    _fields_ = [
        *((name, I32) for name in ("block", "words", "group", "blocks", "bfloat16")),
        *((name, ctypes.c_float) for name in ("limit", "encode_slope", "decode_slope")),
        *((name, ctypes.c_float * (3 * MOST_TERMS)) for name in ("encode", "decode")),
    ]


@lru_cache
def compiled(fmt: BlockFormat, dtype: torch.dtype) -> tuple[ctypes.CDLL | None, Format]:
    """`quantize` and `dequantize`, None where they can't be compiled or have no such dtype; the format as they take it.

    Every format is compiled by itself for each dtype of elements, in less than a second; while `SPECIALISE` is false,
    formats of the same bits and the same number of clamps share their code.
    """
    (encode_slope, encode), (decode_slope, decode) = encode_map(fmt), decode_map(fmt)
    bfloat16 = fmt.metadata == torch.bfloat16
    sizes = (fmt.block, fmt.words, fmt.group, fmt.blocks_per_group, bfloat16)
    numbers = (*sizes, torch.finfo(fmt.metadata).max, encode_slope, decode_slope)
    terms = ((ctypes.c_float * (3 * MOST_TERMS))(*itertools.chain(*terms)) for terms in (encode, decode))
    native = Format(*numbers, *terms)
    if dtype not in KINDS:
        return None, native
    constants = {"KIND": KINDS[dtype], "BITS": fmt.bits, "ENCODE_TERMS": len(encode), "DECODE_TERMS": len(decode)}
    constants |= dict(zip(("BLOCK", "WORDS", "GROUP", "BLOCKS"), sizes if SPECIALISE else (0, 0, 0, 0), strict=False))
    return library("blocks/quantize.cpp", QUANTIZE, **constants), native


def bits_library() -> ctypes.CDLL | None:
    """`pack_bits` and `unpack_bits`; None where they can't be compiled."""
    return library("bits/bits.cpp", BITS)


def prepare_format(fmt: BlockFormat, dtype: torch.dtype) -> None:
    """Begins to compile `quantize` and `dequantize` of a format, beside what else goes on."""
    begin(compiled, fmt, dtype)


def prepare_bits() -> None:
    """Begins to compile `pack_bits` and `unpack_bits`, beside what else goes on."""
    begin(bits_library)


def _threads(numel: int) -> int:
    return 1 if numel < ALONE else torch.get_num_threads()


@quantize.register_kernel("cpu")
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
    fmt = block_format(bits, block, levels, metadata, words)
    kernels, native = compiled(fmt, x.dtype)
    if kernels is None:
        return quantize_in_runs(x, seed, salt, fmt, shift, scale)
    encoded = empty_encoding(x, fmt)
    dense, by_column = x.contiguous(), _by_column(shift, scale)
    kernels.quantize(
        ctypes.addressof(native), dense.data_ptr(), x.numel(), *map(_address, by_column), _width(x.shape),
        seed[salt].contiguous().data_ptr(), *(part.data_ptr() for part in encoded),
        _threads(x.numel()),
    )  # fmt: skip
    return encoded


@dequantize.register_kernel("cpu")
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
    return decoder(fmt, dtype, shift, scale)(words, low, high, size)


Decoder = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


def decoder(fmt: BlockFormat, dtype: torch.dtype, shift: Tensor | None, scale: Tensor | None) -> Decoder:
    """What decodes words, low and high to a tensor of a size, as `dequantize` does; for many tensors of one format."""
    kernels, native = compiled(fmt, dtype)
    if kernels is None:
        return lambda words, low, high, size: dequantize_in_runs(words, low, high, size, dtype, fmt, shift, scale)
    by_column = _by_column(shift, scale, inverse=True)

    def decode(words: Tensor, low: Tensor, high: Tensor, size: Sequence[int]) -> Tensor:
        x = torch.empty(list(size), dtype=dtype)
        parts = [part.contiguous() for part in (words, low, high)]
        kernels.dequantize(
            ctypes.addressof(native), *(part.data_ptr() for part in parts), x.numel(), *map(_address, by_column),
            _width(size), x.data_ptr(), _threads(x.numel()),
        )  # fmt: skip
        return x

    return decode


@pack_bits.register_kernel("cpu")
def _(mask: Tensor, words: int) -> Tensor:
    kernels = bits_library()
    if kernels is None:
        return pack_bits_in_runs(mask, words)
    packed = torch.empty(bit_words(mask.numel(), words), dtype=torch.float32)
    dense = mask.contiguous()
    kernels.pack_bits(dense.data_ptr(), mask.numel(), words, packed.data_ptr(), _threads(mask.numel()))
    return packed


@unpack_bits.register_kernel("cpu")
def unpack_bits_on_cpu(packed: Tensor, size: Sequence[int], dtype: torch.dtype = torch.bool) -> Tensor:
    kernels = bits_library()
    if kernels is None:
        return unpack_bits_in_runs(packed, size).view(dtype)
    mask = torch.empty(list(size), dtype=dtype)
    dense = packed.contiguous()
    kernels.unpack_bits(dense.data_ptr(), mask.numel(), packed.shape[1], mask.data_ptr(), _threads(mask.numel()))
    return mask


def _by_column(
    shift: Tensor | None, scale: Tensor | None, inverse: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Shift and scale, or its inverse, as contiguous rows of numbers."""
    if scale is None:
        return None, None
    shift, scale = columns(shift, scale)
    return shift.contiguous(), (scale.reciprocal() if inverse else scale).contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _width(size: Sequence[int]) -> int:
    return size[-1] if size else 1
