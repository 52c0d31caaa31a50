"""Magnitude pruning per row: `actcompile::prune` and `actcompile::restore_pruned`.

Of each row the `kept` elements of largest magnitude are stored with their columns; the rest come back as zero, as in
DropIT (ICLR 2023, arXiv 2202.13808), there over a whole tensor. Biased: it is always the small elements that are lost.

Bytes: per row, `kept` elements and as many columns, of one byte each (up to 256 columns), two (up to 2**15) or four.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..op import op
from .matrix import as_matrix, check_at_most_columns, check_float, matrix_size, row_chunks


def column_dtype(columns: int) -> torch.dtype:
    """The smallest integer dtype that holds every column's number; a symbolic `columns` is guarded on."""
    if columns <= 2**8:
        return torch.uint8
    return torch.int16 if columns <= 2**15 else torch.int32


def prune_nbytes(rows, columns: int, kept: int, dtype: torch.dtype):
    """Bytes of a (rows, columns) matrix of `dtype` after `prune`; `rows` may be a SymInt."""
    return rows * kept * (dtype.itemsize + column_dtype(columns).itemsize)


def _largest(x: Tensor, kept: int) -> Tensor:
    """The columns (rows, kept), int64, of each row's largest magnitudes, equal ones from the left.

    A float's bits without the sign are an integer that grows with the magnitude, infinity and then NaN being largest.
    With the column below them no two keys of a row are equal, so the order does not depend on how `topk` works.
    """
    columns = x.shape[1]
    if x.dtype == torch.float32:
        magnitude, shift = (x.view(torch.int32) & 0x7FFFFFFF).to(torch.int64), 32
    elif columns <= 2**16:
        magnitude, shift = (x.view(torch.int16) & 0x7FFF).to(torch.int32), 16
    else:
        magnitude, shift = (x.view(torch.int16) & 0x7FFF).to(torch.int64), 32
    from_the_right = torch.arange(columns - 1, -1, -1, dtype=magnitude.dtype, device=x.device)
    keys = (magnitude << shift) | from_the_right
    return columns - 1 - (keys.topk(kept, dim=1).values & ((1 << shift) - 1)).long()


@op("prune")
def prune(x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Keeps the `kept` largest magnitudes of each row, of equal ones those of lower column. Biased.

    Args:
        x: (..., columns), any strides, float32, bfloat16 or float16. NaN counts as larger than infinity, so a row that
            is not finite does not come back finite.
        kept: elements per row, from 1 to `columns`.

    Returns:
        values: (rows, kept) in the dtype of `x`, from the largest magnitude down.
        index: (rows, kept), their columns, in `column_dtype(columns)`.

    Raises:
        ValueError: `x` has another dtype or fewer than two dimensions, or `kept` is out of range.
    """
    values, index = _empty(x, kept)
    for part, some_values, some_index in row_chunks(as_matrix(x), values, index):
        column = _largest(part, kept)
        some_values.copy_(part.gather(1, column))
        some_index.copy_(column)
    return values, index


@prune.register_fake
def _empty(x, kept):
    check_float(x)
    rows, columns = matrix_size(x.shape)
    check_at_most_columns("kept", kept, columns)
    return x.new_empty(rows, kept), x.new_empty(rows, kept, dtype=column_dtype(columns))


@op("restore_pruned")
def restore_pruned(values: Tensor, index: Tensor, size: Sequence[int]) -> Tensor:
    """Spreads what `prune` returned over a contiguous tensor of shape `size`, zero elsewhere."""
    x = values.new_zeros(matrix_size(size))
    for part, some_values, some_index in row_chunks(x, values, index):
        part.scatter_(1, some_index.long(), some_values)
    return x.view(list(size))


@restore_pruned.register_fake
def _(values, index, size):
    return values.new_empty(size)
