"""`products`: sums of matrix products, added up where the first of them is; `products_` writes them over an operand.

torch adds a product to a tensor by copying the tensor first, and a layer's gradient has the layer's output's gradient
alive until it is made. Where rows are as long as before and their old values serve for nothing else, tiles of them are
replaced one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..op import op
from .threads import in_threads

TILE = 1 << 18  # elements of a tile of rows: they stay in a CPU's cache


@op("products")
def products(bias: Tensor | None, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """`bias + left[0] @ right[0] + left[1] @ right[1] + ...`, of matrices of one dtype; at least one product."""
    return _products(bias, left, right)


def _products(bias: Tensor | None, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    first = torch.mm(left[0], right[0]) if bias is None else torch.addmm(bias, left[0], right[0])
    for a, b in zip(left[1:], right[1:], strict=True):
        first.addmm_(a, b)
    return first


@products.register_fake
def _(bias, left, right):
    return left[0].new_empty(left[0].shape[0], right[0].shape[1])


@torch.library.custom_op("actcompile::products_", mutates_args=("into",))
def products_(
    into: Tensor, weight: Tensor, bias: Tensor | None, left: Sequence[Tensor], right: Sequence[Tensor]
) -> None:
    """Replaces the matrix `into` by `into @ weight + products(bias, left, right)`; `weight` is square."""
    rows = max(1, TILE // max(into.shape[1], 1))

    def replace(tiles: range) -> None:
        for first in tiles:
            tile, *others = (matrix[first : first + rows] for matrix in (into, *left))
            tile.copy_(_products(bias, [tile, *others], [weight, *right]))

    in_threads(into.shape[0], rows, replace)


@products_.register_fake
def _(into, weight, bias, left, right):
    return None
