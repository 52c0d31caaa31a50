"""A saved activation read as a matrix: all dimensions but the last are rows, the last one is the columns."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 1 << 20  # elements whose float32 or float64 copies stay in a CPU's cache: several times faster than all at once
CHUNK_CUDA = 1 << 26  # enough to fill a GPU; the copies stay far below the memory that an activation takes


def check_float(x: Tensor) -> None:
    """Raises ValueError unless `x` is of a dtype that these ops encode."""
    if x.dtype not in FLOATS:
        raise ValueError(f"x must be float32, bfloat16 or float16, got {x.dtype}; cast it, or keep it as it is")


def check_at_most_columns(name: str, value: int, columns: int) -> None:
    """Raises ValueError unless `value`, the argument `name`, is from 1 to `columns` (0 where there are none)."""
    if not min(1, columns) <= value <= columns:
        raise ValueError(f"{name} must be from 1 to {columns}, the columns of x, got {value}")


def matrix_size(size: Sequence[int]):
    """(rows, columns) of a tensor of shape `size`, ints or SymInts; nothing is guarded on.

    Raises:
        ValueError: `size` has fewer than two dimensions.
    """
    if len(size) < 2:
        raise ValueError(f"x must have at least 2 dimensions, got shape {tuple(size)}; unsqueeze it, or keep it")
    return math.prod(size[:-1]), size[-1]


def as_matrix(x: Tensor) -> Tensor:
    """`x` in row-major order, (rows, columns); a view where its strides allow."""
    return x.reshape(matrix_size(x.shape)).contiguous()


def _chunk(x: Tensor) -> int:
    return CHUNK if x.device.type == "cpu" else CHUNK_CUDA


def row_chunks(matrix: Tensor, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields runs of rows of `matrix`, and the same rows of the tensors `beside` it; at least one run, even if empty.

    What is converted run by run needs no temporary of the activation's size.
    """
    rows = max(1, _chunk(matrix) // max(1, matrix.shape[1]))
    return zip(*(t.split(rows) for t in (matrix, *beside)), strict=True)


def flat_chunks(x: Tensor, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields runs of elements of the contiguous `x` and of the contiguous tensors `beside` it; none if it is empty."""
    if x.numel() == 0:
        return iter(())
    return zip(*(t.view(-1).split(_chunk(x)) for t in (x, *beside)), strict=True)


def largest_finite(x: Tensor) -> Tensor:
    """The largest magnitude among the finite elements of the contiguous `x`, or 0; float32, shape (1,)."""
    parts = [torch.where(part.isfinite(), part, 0).abs().amax(0, keepdim=True) for (part,) in flat_chunks(x)]
    return torch.cat([x.new_zeros(1), *parts]).amax(0, keepdim=True).float()


def power_of_two(exponent: Tensor) -> Tensor:
    """Exactly `2**exponent` in float32; an int32 exponent outside the normal numbers' -126 to 127 is brought there."""
    return ((exponent.clamp(-126, 127) + 127) << 23).view(torch.float32)
