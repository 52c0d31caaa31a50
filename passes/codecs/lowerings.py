"""Inductor lowerings of our ops that are loops over elements: they fuse with what is around them.

All others are called.
"""

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from actcompile.kernels.bits.random_mask import WORDS
from actcompile.kernels.blocks.random_bits import MIX_1, MIX_2, signed32

from ..graph import _torch

LONG = 32  # elements of a row, from which loops over rows and columns are as quick as over all elements

for cast in (torch.ops.actcompile.narrow.default, torch.ops.actcompile.widen.default):
    _torch.register_lowering(cast, type_promotion_kind=None)(
        _torch.lowerings[torch.ops.prims.convert_element_type.default]
    )


@_torch.register_lowering(torch.ops.actcompile.mask_to_bytes.default, type_promotion_kind=None)
def _mask_to_bytes(mask: Any) -> Any:
    ops = _torch.loop_ops
    load = mask.make_loader()

    def byte(index: Sequence[Any]) -> Any:
        number = ops.where(load(index), ops.constant(1, torch.int32), ops.constant(0, torch.int32))
        return ops.to_dtype(number, torch.uint8)

    return _torch.Pointwise.create(device=mask.get_device(), dtype=torch.uint8, inner_fn=byte, ranges=mask.get_size())


@_torch.register_lowering(torch.ops.actcompile.bytes_to_mask.default, type_promotion_kind=None)
def _bytes_to_mask(byte: Any) -> Any:
    ops = _torch.loop_ops
    load = byte.make_loader()

    def mask(index: Sequence[Any]) -> Any:
        return ops.to_dtype(load(index), torch.int32) > ops.constant(0, torch.int32)

    return _torch.Pointwise.create(device=byte.get_device(), dtype=torch.bool, inner_fn=mask, ranges=byte.get_size())


@_torch.register_lowering(torch.ops.actcompile.random_mask.default, type_promotion_kind=None)
def _random_mask(seed: Any, salt: int, size: Sequence[Any], threshold: int, below: bool) -> Any:
    """`random_mask_at`, word by word; torch's C++ makes vectors of it, since a position is affine in the loop's index.

    The high bits of positions, two vectors of 64-bit integers, are left out where no position has any. Where rows are
    long, a position is that of its row and one in the row: of a position alone Inductor makes a loop over all
    elements, which it does not fuse with the loop over rows and columns that a BatchNorm before the dropout is.
    """
    load, ops = seed.make_loader(), _torch.loop_ops
    numel = sympy.Mul(*map(sympy.sympify, size))
    by_row = len(size) > 1 and isinstance(size[-1], (int, sympy.Integer)) and size[-1] >= LONG

    def number(value: int) -> Any:
        return ops.constant(signed32(value), torch.int32)

    def shift_right(word: Any, bits: int) -> Any:
        return ops.bitwise_right_shift(word, number(bits)) & number((1 << (32 - bits)) - 1)

    def mask(index: Sequence[Any]) -> Any:
        position = sympy.Integer(0)
        for i, length in zip(index, size, strict=True):
            position = position * length + i
        first, second = (load([sympy.Integer(salt), sympy.Integer(i)]) for i in range(2))
        if not _torch.at_most(numel, WORDS):
            high = ops.bitwise_right_shift(ops.index_expr(position, torch.int64), ops.constant(32, torch.int64))
            second = second ^ (ops.to_dtype(high, torch.int32) * number(MIX_2))
        parts = [position - index[-1], index[-1]] if by_row else [position]
        word = first  # added one by one, lest Inductor adds the parts up itself
        for part in parts:
            word = word + ops.index_expr(part, torch.int32)
        word = (word ^ shift_right(word, 16)) * number(MIX_1)
        word = word ^ second
        word = (word ^ shift_right(word, 13)) * number(MIX_2)
        word = word ^ shift_right(word, 16)
        return word < number(threshold) if below else word >= number(threshold)

    return _torch.Pointwise.create(device=seed.get_device(), dtype=torch.bool, inner_fn=mask, ranges=list(size))
