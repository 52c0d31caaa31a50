"""A matrix for random projection, made from random bits wherever it is needed: `actcompile::rademacher`.

EXACT (ICLR 2022, section 3.2) saves `x @ P` instead of `x` and restores `x @ P @ P.T`, which is unbiased because
`E[P @ P.T] = I`. `P` is a function of the seed alone, so backward makes it anew and nothing of it is saved.

Bytes: of `x @ P`, `rows * columns` elements.
"""

import torch
from torch import Tensor

from ..blocks.random_bits import random_words
from ..op import op


def projection_nbytes(rows, columns: int, dtype: torch.dtype):
    """Bytes of `x @ P` in `dtype`, for an `x` of `rows` rows, an int or a SymInt, and a `P` of `columns` columns."""
    return rows * columns * dtype.itemsize


def rademacher_aten(seed: Tensor, salt: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """`rademacher` in plain aten ops: element `32 * w + b` of the row-major matrix is negative if bit `b` of word `w`
    of the random bits is set."""
    numel = rows * columns
    word = next(random_words(torch.arange((numel + 31) // 32, dtype=torch.int32, device=seed.device), seed, salt, 1))
    bit = (word[:, None] >> torch.arange(32, dtype=torch.int32, device=seed.device)) & 1
    magnitude = columns**-0.5 if columns else 0.0
    signed = torch.where(bit != 0, -magnitude, magnitude).to(dtype)
    return signed.view(-1)[:numel].view(rows, columns)


@op("rademacher")
def rademacher(seed: Tensor, salt: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Independent random signs times `1 / sqrt(columns)`: `P` with `E[P @ P.T] = I`, so a projection is unbiased.

    In bfloat16 and float16 `1 / sqrt(columns)` is rounded, unless `columns` is a power of four: `E[P @ P.T]` is then
    off by up to one unit in the last place of a square. Project in float32 where that matters.

    Args:
        seed: int32 of shape (activations, 2), drawn by `draw_seed` once per forward call.
        salt: this activation's row in `seed`: no two activations share random bits.
        rows, columns: the shape, not symbolic; `rows` is the width of what is projected, `columns` the width after.
        dtype: float32, bfloat16 or float16.

    Returns:
        (rows, columns) in `dtype`, on the device of `seed`, the same in every call.
    """
    return rademacher_aten(seed, salt, rows, columns, dtype).clone()


@rademacher.register_fake
def _(seed, salt, rows, columns, dtype):
    return seed.new_empty(rows, columns, dtype=dtype)
