"""Inductor lowerings of the encoding ops on the CPU: `quantize` and `pack_bits`, each as one loop body.

`quantize_aten` and `pack_bits_aten` say the same in aten ops, and agree bit for bit. They are some hundred nodes each,
which Inductor inlines into one another at a cost that grows with the square of their number; as one loop body an
encoded tensor compiles in a second, and the random words stay in registers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from actcompile.kernels import BlockFormat
from actcompile.kernels.levels import apply_map, encode_map
from actcompile.kernels.quantize import SMALLEST_HALF_RANGE
from actcompile.kernels.random_bits import random_words

from . import _torch
from ._torch import loop_ops as ops

aten = torch.ops.aten
int32, float32 = torch.int32, torch.float32


class Value:
    """A scalar of a loop body with tensor-like arithmetic, so that the loop is spelled by the reference's functions."""

    def __init__(self, value: Any, dtype: torch.dtype) -> None:
        self.value, self.dtype = value, dtype

    def _binary(self, name: str, other: Any, dtype: torch.dtype | None = None) -> "Value":
        other = other.value if isinstance(other, Value) else ops.constant(other, self.dtype)
        return Value(getattr(ops, name)(self.value, other), dtype or self.dtype)

    def __add__(self, other: Any) -> "Value":
        return self._binary("add", other)

    def __sub__(self, other: Any) -> "Value":
        return self._binary("sub", other)

    def __mul__(self, other: Any) -> "Value":
        return self._binary("mul", other)

    def __rtruediv__(self, other: float) -> "Value":
        return Value(ops.reciprocal(self.value), self.dtype) * other  # as torch divides a number by a tensor

    def __and__(self, other: Any) -> "Value":
        return self._binary("bitwise_and", other)

    def __or__(self, other: Any) -> "Value":
        return self._binary("bitwise_or", other)

    def __xor__(self, other: Any) -> "Value":
        return self._binary("bitwise_xor", other)

    def __rshift__(self, other: Any) -> "Value":
        return self._binary("bitwise_right_shift", other)

    def __lshift__(self, other: Any) -> "Value":
        return self._binary("bitwise_left_shift", other)

    def __lt__(self, other: Any) -> "Value":
        return self._binary("lt", other, torch.bool)

    def clamp(self, lower: float, upper: float) -> "Value":
        return self._binary("maximum", lower)._binary("minimum", upper)

    def to(self, dtype: torch.dtype) -> "Value":
        return Value(ops.to_dtype(self.value, dtype, src_dtype=self.dtype), dtype)

    def or_zero(self, condition: "Value") -> "Value":
        """This value where `condition` holds, else zero."""
        return Value(ops.where(condition.value, self.value, ops.constant(0, self.dtype)), self.dtype)


class Seed:
    """Rows of the seed tensor, as `random_words` indexes them."""

    def __init__(self, load: Callable[[Sequence[Any]], Any]) -> None:
        self.load = load

    def __getitem__(self, index: tuple[int, int]) -> Value:
        return Value(self.load([_torch.sympy.Integer(i) for i in index]), int32)


def quantize_loop(x: Any, seed: Any, salt: int, fmt: BlockFormat, tail: bool) -> tuple[Any, Any, Any]:
    """Lowers `quantize` for a tensor box `x`; `tail` says whether the last group may be partly filled."""
    lower = _torch.lowerings
    numel = _torch.sympy.prod(x.get_size())
    full = _torch.FloorDiv(numel, fmt.group)
    if not tail:
        return _encode(lower[aten.view.default](x, [full, fmt.group]), None, 0, seed, salt, fmt)
    flat = lower[aten.view.default](x, [numel])
    flat.realize()
    start, rest = full * fmt.group, numel - full * fmt.group
    main = lower[aten.view.default](lower[aten.slice.Tensor](flat, 0, 0, start), [full, fmt.group])
    last = lower[aten.slice.Tensor](flat, 0, start, numel)
    last = lower[aten.view.default](lower[aten.constant_pad_nd.default](last, [0, fmt.group - rest]), [1, fmt.group])
    parts = _encode(main, None, 0, seed, salt, fmt), _encode(last, rest, full, seed, salt, fmt)
    groups = _torch.FloorDiv(numel + fmt.group - 1, fmt.group)
    joined = (_concatenate(pair) for pair in zip(*parts, strict=True))
    words, low, high = (lower[aten.slice.Tensor](part, 0, 0, groups) for part in joined)
    return words, low, high


def _concatenate(parts: Sequence[Any]) -> Any:
    for part in parts:
        part.realize()
    return _torch.TensorBox(_torch.ConcatKernel.create(list(parts), 0))


def _encode(x: Any, rest: Any, first: Any, seed: Any, salt: int, fmt: BlockFormat) -> tuple[Any, Any, Any]:
    """Encodes whole groups (groups, group); with `rest` only the first `rest` elements of the one group exist."""
    lower = _torch.lowerings
    groups, (blocks, width) = x.get_size()[0], (fmt.blocks_per_group, fmt.words)
    device = x.get_device()
    x_dtype = x.get_dtype()

    def pointwise(dtype: torch.dtype, sizes: list[Any], body: Callable[[Sequence[Any]], Value]) -> Any:
        return _torch.Pointwise.create(
            device=device, dtype=dtype, inner_fn=lambda index: body(index).value, ranges=sizes
        )

    def exists(position: Any) -> Value:
        return Value(ops.index_expr(position, torch.int64), torch.int64) < Value(
            ops.index_expr(rest, torch.int64), torch.int64
        )

    load_x = x.make_loader()

    def bounded(fill: float) -> Any:
        if rest is None:
            return lower[aten.view.default](x, [groups, blocks, fmt.block])

        def body(index: Sequence[Any]) -> Value:
            value = Value(load_x([index[0], index[1] * fmt.block + index[2]]), x_dtype).to(float32)
            other = ops.constant(fill, float32)
            return Value(ops.where(exists(index[1] * fmt.block + index[2]).value, value.value, other), float32)

        return pointwise(float32, [groups, blocks, fmt.block], body)

    low = lower[aten.amin.default](bounded(float("inf")), [2])
    high = lower[aten.amax.default](bounded(-float("inf")), [2])
    low, high = (lower[torch.ops.prims.convert_element_type.default](m, float32) for m in (low, high))
    if rest is not None or fmt.metadata is not float32:
        found = low.make_loader(), high.make_loader()

        def settled(load: Callable[[Sequence[Any]], Any], away: Callable[[Value], Value]) -> Any:
            def body(index: Sequence[Any]) -> Value:
                value = Value(load(index), float32)
                if rest is not None:
                    value = value.or_zero(exists(index[1] * fmt.block))
                return value if fmt.metadata is float32 else _truncate(value, away(value))

            return pointwise(float32, [groups, blocks], body)

        low, high = (
            settled(found[0], lambda v: v < 0.0),
            settled(found[1], lambda v: Value(ops.constant(0.0, float32), float32) < v),
        )
    low.realize()
    high.realize()
    load_low, load_high = low.make_loader(), high.make_loader()
    load_seed = Seed(seed.make_loader())

    def words_of(index: Sequence[Any]) -> Value:
        group, j = index
        position = Value(ops.index_expr((group + first) * width + j, int32), int32)
        noise: list[Any] = list(random_words(position, load_seed, salt, -(-fmt.planes // 4)))  # type: ignore[arg-type]
        words = None
        scales: dict[int, tuple[Value, Value, Value]] = {}
        for k in range(fmt.planes):
            b = k * width // fmt.block
            if b not in scales:
                half_low = Value(load_low([group, _torch.sympy.Integer(b)]), float32) * 0.5
                half_high = Value(load_high([group, _torch.sympy.Integer(b)]), float32) * 0.5
                half = (half_high - half_low)._binary("maximum", SMALLEST_HALF_RANGE)
                scales[b] = half_low, (fmt.top * 256.0) / half, half < float("inf")  # type: ignore[operator]
            half_low, inverse, finite = scales[b]
            if k * width >= fmt.group:
                break
            inside = None  # the last plane of a group with unused slots is cut short
            if (k + 1) * width > fmt.group:
                inside = Value(ops.index_expr(j, torch.int64), torch.int64) < fmt.group - k * width
            plane = Value(_load(load_x, [group, k * width + j], inside), x_dtype).to(float32)
            place = apply_map((plane * 0.5 - half_low) * inverse, encode_map(fmt))
            code = ((place + 0.5).to(int32) + ((noise[k // 4] >> (8 * (k % 4))) & 0xFF)) >> 8
            if rest is not None:
                code = code.or_zero(exists(k * width + j))
            if inside is not None:
                code = code.or_zero(inside)
            if blocks > 1:
                code = code.or_zero(finite)
            code = code << (fmt.bits * k) if k else code
            words = code if words is None else words | code
        assert words is not None
        return words.or_zero(scales[0][2]) if blocks == 1 else words

    words = pointwise(int32, [groups, width], words_of)
    words = lower[aten.view.dtype](words, float32)
    if fmt.metadata is not float32:
        low, high = (lower[torch.ops.prims.convert_element_type.default](m, fmt.metadata) for m in (low, high))
    return words, low, high


def _load(load: Callable[[Sequence[Any]], Any], index: Sequence[Any], inside: Value | None) -> Any:
    return load(index) if inside is None else ops.masked(inside.value, lambda: load(index), 0.0)


def _truncate(x: Value, away: Value) -> Value:
    """Cuts float32 to bfloat16's bits, away from zero where `away`; NaN and infinity stay. See `round_outward`."""
    bits = Value(ops.to_dtype_bitcast(x.value, int32, float32), int32)
    finite = Value(ops.abs(x.value), float32) < float("inf")
    up = Value(ops.where(ops.logical_and(away.value, finite.value), (bits + 0xFFFF).value, bits.value), int32)
    cut = ops.to_dtype_bitcast((up & -65536).value, float32, int32)
    return Value(ops.where(finite.value, cut, x.value), float32)


def pack_bits_loop(mask: Any, words: int, tail: bool) -> Any:
    """Lowers `pack_bits` for a tensor box `mask`."""
    lower = _torch.lowerings
    numel, group = _torch.sympy.prod(mask.get_size()), 32 * words
    full = _torch.FloorDiv(numel, group)
    if not tail:
        return lower[aten.view.dtype](_pack(lower[aten.view.default](mask, [full, group]), words), float32)
    flat = lower[aten.view.default](mask, [numel])
    flat.realize()
    start, rest = full * group, numel - full * group
    main = lower[aten.view.default](lower[aten.slice.Tensor](flat, 0, 0, start), [full, group])
    last = lower[aten.constant_pad_nd.default](lower[aten.slice.Tensor](flat, 0, start, numel), [0, group - rest])
    packed = [_pack(main, words), _pack(lower[aten.view.default](last, [1, group]), words)]
    joined = lower[aten.slice.Tensor](_concatenate(packed), 0, 0, _torch.FloorDiv(numel + group - 1, group))
    return lower[aten.view.dtype](joined, float32)


def _pack(mask: Any, width: int) -> Any:
    load = mask.make_loader()

    def body(index: Sequence[Any]) -> Any:
        words = None
        for k in range(32):
            bit = Value(load([index[0], k * width + index[1]]), torch.bool).to(int32)
            words = bit if words is None else words | (bit << k)
        assert words is not None
        return words.value

    sizes = [mask.get_size()[0], width]
    return _torch.Pointwise.create(device=mask.get_device(), dtype=int32, inner_fn=body, ranges=sizes)


def register() -> None:
    """Registers both lowerings; on other devices than the CPU the ops stay calls of their kernels."""
    call_quantize = _torch.fallback_handler(torch.ops.actcompile.quantize.default)
    call_pack = _torch.fallback_handler(torch.ops.actcompile.pack_bits.default)

    @_torch.register_lowering(torch.ops.actcompile.quantize.default, type_promotion_kind=None)
    def _quantize(x, seed, salt, bits, block, levels, metadata, words):
        if x.get_device().type != "cpu":
            return call_quantize(x, seed, salt, bits, block, levels, metadata, words)
        fmt = BlockFormat(bits, block, levels, metadata, words)
        return quantize_loop(x, seed, salt, fmt, not _fills(x, fmt.group))

    @_torch.register_lowering(torch.ops.actcompile.pack_bits.default, type_promotion_kind=None)
    def _pack_bits(mask, words):
        if mask.get_device().type != "cpu":
            return call_pack(mask, words)
        return pack_bits_loop(mask, words, not _fills(mask, 32 * words))


def _fills(x: Any, group: int) -> bool:
    """Whether a tensor box fills its groups exactly, for all values of its symbolic sizes."""
    rest = _torch.ModularIndexing(_torch.sympy.prod(x.get_size()), 1, group)
    return _torch.V.graph.sizevars.statically_known_equals(rest, 0)
