"""Winner-take-all column-row sampling: `actcompile::sample_rows` and `actcompile::restore_rows`.

In a weight's gradient `x.T @ g` every row of `x` meets one row of `g`, so some rows of `x` can stand for all of them
(WTA-CRS, NeurIPS 2023, arXiv 2305.15265). Row `i` has the probability `p_i` proportional to its norm. The set `C` of
the likeliest rows is kept surely with weight one; the other `k - |C|` of the `k` rows that are kept are drawn from the
rest with replacement and have weight `(1 - P_C) / ((k - |C|) p_i)`, where `P_C` is the probability of `C`. `|C|`
minimises `(1 - P_C) / (k - |C|)`, the factor of the variance that it decides (there, theorem 2). No row outside of `C`
is then expected more than once.

Unbiased. The paper takes `p_i` proportional to the product of the norms of both rows, and estimates the gradient's by
those of the step before; in a forward graph no gradient is known, so `p_i` is here of the activation alone.

Bytes: `ceil(rows / ratio)` rows and as many indices of four bytes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks.random_bits import random_words
from ..op import op
from .matrix import as_matrix, check_float, matrix_size, row_chunks

MOST_ROWS = 2**31


def sampled(rows, ratio: int):
    """Rows that are kept of `rows`, an int or a SymInt: at least one if there are any."""
    return (rows + ratio - 1) // ratio


def sample_rows_nbytes(rows, columns: int, ratio: int, dtype: torch.dtype):
    """Bytes of a (rows, columns) matrix of `dtype` after `sample_rows`; `rows` may be a SymInt."""
    return sampled(rows, ratio) * (columns * dtype.itemsize + 4)


def uniform(count: int, seed: Tensor, salt: int) -> Tensor:
    """float64 (count,) in the open interval (0, 1): the middles of 2**52 steps, each from two words of random bits."""
    index = torch.arange(2 * count, device=seed.device).to(torch.int32)
    word = next(random_words(index, seed, salt, 1)).view(count, 2).long() & 0xFFFFFFFF
    return ((word[:, 0] << 20 | word[:, 1] >> 12).double() + 0.5) * 2.0**-52


def choose(norms: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses `k` of `n > k` rows; no size depends on data, and nothing waits for the device.

    Args:
        norms: float64 (n,). Rows whose norm is not finite are sure, as far as there is room.
        numbers: float64 (k,), uniform in (0, 1).

    Returns:
        index: int64 (k,), the sure rows first.
        weight: float64 (k,), positive; zero where all rows that are not sure are zero.
        sure: int64 (), how many rows are sure.
    """
    n, k = len(norms), len(numbers)
    norms, order = torch.where(norms.isfinite(), norms, float("inf")).sort(descending=True, stable=True)
    infinite = norms.isinf()
    norms = torch.where(infinite, 0.0, norms)
    place = torch.arange(n, device=norms.device)

    rest = norms.flip(0).cumsum(0).flip(0)[: k + 1]  # what remains after the first 0, 1, ..., k rows
    bound = torch.where(rest == 0, 0.0, rest / (k - place[: k + 1]))
    bound = torch.where(infinite[: k + 1], float("inf"), bound)
    sure = torch.maximum(bound.argmin(), infinite.sum().clamp_max(k))

    cumulative = torch.where(place < sure, 0.0, norms).cumsum(0)
    total = cumulative[-1]
    drawn = torch.searchsorted(cumulative, numbers * total, right=True).clamp_max(n - 1)
    is_sure = place[:k] < sure
    chosen = torch.where(is_sure, place[:k], drawn)
    weight = torch.where(total > 0, total / ((k - sure) * norms[chosen]), 0.0)
    return order[chosen], torch.where(is_sure, 1.0, weight), sure


def _sizes(x: Tensor, ratio: int):
    """(rows of x, rows kept, columns)."""
    check_float(x)
    if ratio < 1:
        raise ValueError(f"ratio must be at least 1, got {ratio}: of so many rows one is kept")
    rows, columns = matrix_size(x.shape)
    return rows, sampled(rows, ratio), columns


@op("sample_rows")
def sample_rows(x: Tensor, seed: Tensor, salt: int, ratio: int) -> tuple[Tensor, Tensor]:
    """Keeps one of `ratio` rows, weighted so that the mean is `x`. Unbiased up to the rounding of a weighted row.

    Args:
        x: (..., columns), any strides, float32, bfloat16 or float16, at most 2**31 rows. Rows that are not finite are
            kept before all others, as they are. With `ratio` 1, or one row, all rows are.
        seed: int32 of shape (activations, 2), on the device of `x`, drawn by `draw_seed` once per forward call.
        salt: this activation's row in `seed`: no two activations share random bits.
        ratio: at least 1.

    Returns:
        rows: (k, columns) in the dtype of `x`, `k = ceil(rows of x / ratio)`; times their weights, by which a row can
            become up to `ratio` times as long as the longest, which float16 may not hold.
        index: int32 (k,), which rows of `x` they are; drawn ones may repeat.

    Raises:
        ValueError: `x` has another dtype, fewer than two dimensions or too many rows, or `ratio` is out of range.
    """
    n, k, _ = _sizes(x, ratio)
    matrix = as_matrix(x)
    if n > MOST_ROWS:
        raise ValueError(f"x must have at most 2**31 rows, got {n}: keep it, or quantize it")
    if k == n:
        return matrix.clone(memory_format=torch.contiguous_format), torch.arange(n, dtype=torch.int32, device=x.device)
    norms = torch.cat([torch.linalg.vector_norm(part.double(), dim=1) for (part,) in row_chunks(matrix)])
    index, weight, _ = choose(norms, uniform(k, seed, salt))
    rows = (matrix[index].double() * weight[:, None]).to(x.dtype)
    return rows, index.to(torch.int32)


@sample_rows.register_fake
def _(x, seed, salt, ratio):
    _, k, columns = _sizes(x, ratio)
    return x.new_empty(k, columns), x.new_empty(k, dtype=torch.int32)


@op("restore_rows")
def restore_rows(rows: Tensor, index: Tensor, size: Sequence[int]) -> Tensor:
    """Adds the rows that `sample_rows` returned to a contiguous tensor of zeros of shape `size`."""
    return rows.new_zeros(matrix_size(size)).index_add_(0, index, rows).view(list(size))


@restore_rows.register_fake
def _(rows, index, size):
    return rows.new_empty(size)
