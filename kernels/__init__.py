"""Number formats and ops. Importing this package registers `torch.ops.actcompile.*`."""

from . import cuda  # registers the ops on CUDA tensors
from .format import BlockFormat, bit_words
from .lossless import narrow, pack_bits, unpack_bits, widen
from .quantize import dequantize, quantize
from .random_bits import draw_seed

__all__ = [
    "BlockFormat",
    "bit_words",
    "cuda",
    "dequantize",
    "draw_seed",
    "narrow",
    "pack_bits",
    "quantize",
    "unpack_bits",
    "widen",
]
