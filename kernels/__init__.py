"""Number formats and ops. Importing this package registers `torch.ops.actcompile.*`."""

from . import cpu, cuda  # register the ops on tensors of either
from .baselines.fp8 import cast_fp8, fp8_nbytes, restore_fp8
from .baselines.low_rank import low_rank, low_rank_nbytes, restore_low_rank
from .baselines.projection import projection_nbytes, rademacher, rademacher_aten
from .baselines.prune import prune, prune_nbytes, restore_pruned
from .baselines.sample_rows import restore_rows, sample_rows, sample_rows_nbytes
from .bits.lossless import narrow, pack_bits, unpack_bits, widen
from .bits.random_mask import random_mask
from .blocks.format import BlockFormat, bit_words
from .blocks.quantize import dequantize, quantize
from .blocks.random_bits import draw_seed
from .edges.ops import aggregate, degree, edges, group_edges
from .edges.spmm import pointer_to, rows_of, spmm, spmm_extremum, spmm_transposed
from .rows.products import products, products_
from .rows.tiles import row_sums

__all__ = [
    "aggregate",
    "BlockFormat",
    "bit_words",
    "cast_fp8",
    "cpu",
    "cuda",
    "degree",
    "dequantize",
    "draw_seed",
    "edges",
    "fp8_nbytes",
    "group_edges",
    "low_rank",
    "low_rank_nbytes",
    "narrow",
    "pack_bits",
    "pointer_to",
    "products",
    "products_",
    "projection_nbytes",
    "prune",
    "prune_nbytes",
    "quantize",
    "rademacher",
    "rademacher_aten",
    "random_mask",
    "restore_fp8",
    "restore_low_rank",
    "restore_pruned",
    "restore_rows",
    "row_sums",
    "rows_of",
    "sample_rows",
    "sample_rows_nbytes",
    "spmm",
    "spmm_extremum",
    "spmm_transposed",
    "unpack_bits",
    "widen",
]
