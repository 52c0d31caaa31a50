"""Inductor lowerings of the decoding ops on the CPU: `dequantize` and `unpack_bits`, each as one loop body.

Where the tensor fills its groups, the loop is over groups, planes and words. Where the last group is not full, but a
group is made of whole rows, and a row of whole planes or a plane of whole rows, it is over rows: no division is left in
its inner loop, so it vectorises and fuses into what reads it. Else whole groups are decoded into memory, and the tensor
is a view of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from actcompile.kernels import BlockFormat
from actcompile.kernels.levels import apply_map, decode_map
from actcompile.kernels.quantize import SMALLEST_HALF_RANGE, WIDE_HALF_RANGE

from . import _torch
from ._torch import loop_ops as ops
from .loops import Value, bitcast, fills, float32, int32, pointwise, select

aten = torch.ops.aten


def dequantize_loop(words: Any, low: Any, high: Any, size: Sequence[Any], dtype: torch.dtype, fmt: BlockFormat) -> Any:
    """Lowers `dequantize` for tensor boxes; see `dequantize_aten`."""
    load_words, load_low, load_high = (t.make_loader() for t in (words, low, high))
    planes_per_block = fmt.planes // fmt.blocks_per_group

    def element(group: Any, plane: Any, word: Any) -> Value:
        packed = bitcast(Value(load_words([group, word]), float32), int32)
        shift = Value(ops.index_expr(plane * fmt.bits, int32), int32)
        level = apply_map(((packed >> shift) & fmt.top).to(float32), decode_map(fmt))
        block = [group, _torch.FloorDiv(plane, planes_per_block)]
        lowest, highest = (Value(load(block), fmt.metadata).to(float32) for load in (load_low, load_high))
        half = (highest * 0.5 - lowest * 0.5).at_least(SMALLEST_HALF_RANGE)
        wide = half > WIDE_HALF_RANGE
        shrink = select(wide, 0.25, 1.0)
        step, minimum = half * shrink * (2.0 / fmt.top), lowest * shrink
        return ((level * step + minimum) * select(wide, 4.0, 1.0)).to(dtype)

    def slot(index: Sequence[Any]) -> Value:
        group, position = index
        return element(group, _torch.FloorDiv(position, fmt.words), _torch.ModularIndexing(position, 1, fmt.words))

    full = fmt.planes * fmt.words == fmt.group
    if full and (rows := _by_rows(words, dtype, size, fmt.planes, fmt.words, element)) is not None:
        return rows
    groups = words.get_size()[0]
    if full:
        decoded = pointwise(words, dtype, [groups, fmt.planes, fmt.words], lambda index: element(*index))
    else:
        decoded = pointwise(words, dtype, [groups, fmt.group], slot)
    return _shaped(decoded, size, fmt.group)


def unpack_bits_loop(packed: Any, size: Sequence[Any]) -> Any:
    """Lowers `unpack_bits` for a tensor box."""
    load = packed.make_loader()
    groups, words = packed.get_size()

    def bit(group: Any, plane: Any, word: Any) -> Value:
        shift = Value(ops.index_expr(plane, int32), int32)
        field = (bitcast(Value(load([group, word]), float32), int32) >> shift) & 1
        return Value(ops.ne(field.value, ops.constant(0, int32)), torch.bool)

    rows = _by_rows(packed, torch.bool, size, 32, words, bit)
    if rows is not None:
        return rows
    return _shaped(pointwise(packed, torch.bool, [groups, 32, words], lambda index: bit(*index)), size, 32 * words)


def _by_rows(
    like: Any, dtype: torch.dtype, size: Sequence[Any], planes: int, words: Any, element: Callable[..., Value]
) -> Any:
    """A tensor of shape `size` that does not fill its groups, as a loop over its rows; None where these do not fit."""
    words, width = int(words), size[-1] if size else 1
    group = planes * words
    numel = _torch.sympy.prod(size)
    if (
        fills(numel, group)
        or not getattr(width, "is_Integer", isinstance(width, int))
        or not width
        or group % int(width)
    ):
        return None
    width, per_group = int(width), group // int(width)
    rows = _torch.sympy.prod(size[:-1])

    def by_planes(index: Sequence[Any]) -> Value:
        row, plane, word = index
        first = _torch.ModularIndexing(row, 1, per_group) * (width // words)
        return element(_torch.FloorDiv(row, per_group), first + plane, word)

    def in_planes(index: Sequence[Any]) -> Value:
        row, column = index
        plane = _torch.FloorDiv(_torch.ModularIndexing(row, 1, per_group), words // width)
        word = _torch.ModularIndexing(row, 1, words // width) * width + column
        return element(_torch.FloorDiv(row, per_group), plane, word)

    if width % words == 0:
        decoded = pointwise(like, dtype, [rows, width // words, words], by_planes)
    elif words % width == 0:
        decoded = pointwise(like, dtype, [rows, width], in_planes)
    else:
        return None
    return _torch.lowerings[aten.view.default](decoded, list(size))


def _shaped(decoded: Any, size: Sequence[Any], group: Any) -> Any:
    """The first elements of whole groups, as a tensor of shape `size`."""
    lower = _torch.lowerings
    numel = _torch.sympy.prod(size)
    if fills(numel, group):
        return lower[aten.view.default](decoded, list(size))
    decoded.realize()
    flat = lower[aten.view.default](decoded, [_torch.sympy.prod(decoded.get_size())])
    return lower[aten.view.default](lower[aten.slice.Tensor](flat, 0, 0, numel), list(size))


def register() -> None:
    """Registers both lowerings; on other devices than the CPU the ops stay calls of their kernels."""
    call_dequantize = _torch.fallback_handler(torch.ops.actcompile.dequantize.default)
    call_unpack = _torch.fallback_handler(torch.ops.actcompile.unpack_bits.default)

    @_torch.register_lowering(torch.ops.actcompile.dequantize.default, type_promotion_kind=None)
    def _dequantize(words, low, high, size, dtype, bits, block, levels):
        if words.get_device().type != "cpu":
            return call_dequantize(words, low, high, size, dtype, bits, block, levels)
        fmt = BlockFormat(bits, block, levels, low.get_dtype(), int(words.get_size()[1]))
        return dequantize_loop(words, low, high, size, dtype, fmt)

    @_torch.register_lowering(torch.ops.actcompile.unpack_bits.default, type_promotion_kind=None)
    def _unpack_bits(packed, size):
        if packed.get_device().type != "cpu":
            return call_unpack(packed, size)
        return unpack_bits_loop(packed, size)


register()
