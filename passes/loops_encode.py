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
from actcompile.kernels.random_bits import random_words, signed32

from . import _torch
from ._torch import loop_ops as ops
from .loops import Seed, Value, bitcast, fills, float32, int32, pointwise

aten = torch.ops.aten
MOST_APART = 8  # blocks of a group whose ranges get a buffer each


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


def _concatenate(parts: Sequence[Any], dim: int = 0) -> Any:
    for part in parts:
        part.realize()
    return _torch.TensorBox(_torch.ConcatKernel.create(list(parts), dim)) if len(parts) > 1 else parts[0]


def _encode(x: Any, rest: Any, first: Any, seed: Any, salt: int, fmt: BlockFormat) -> tuple[Any, Any, Any]:
    """Encodes whole groups (groups, group); with `rest` only the first `rest` elements of the one group exist."""
    lower = _torch.lowerings
    groups, (blocks, width) = x.get_size()[0], (fmt.blocks_per_group, fmt.words)
    x_dtype = x.get_dtype()

    def exists(position: Any) -> Value:
        return Value(ops.index_expr(position, torch.int64), torch.int64) < Value(
            ops.index_expr(rest, torch.int64), torch.int64
        )

    load_x = x.make_loader()

    def bounded(fill: float) -> Any:
        if rest is None:
            return lower[aten.view.default](x, [groups, blocks, fmt.block])

        def body(index: Sequence[Any]) -> Value:
            position = index[1] * fmt.block + index[2]
            value = Value(load_x([index[0], position]), x_dtype).to(float32)
            other = ops.constant(fill, float32)
            return Value(ops.where(exists(position).value, value.value, other), float32)

        return pointwise(x, float32, [groups, blocks, fmt.block], body)

    # Each block's range is a buffer of its own: loops over groups alone fuse with the loop over words.
    apart = blocks <= MOST_APART

    def reduced(reduce: Any, fill: float) -> list[Any]:
        whole = bounded(fill)
        parts = [lower[aten.slice.Tensor](whole, 1, b, b + 1) for b in range(blocks)] if apart else [whole]
        results = [lower[reduce](part, [2]) for part in parts]
        if x_dtype is not float32:
            results = [lower[torch.ops.prims.convert_element_type.default](r, float32) for r in results]
        for result in results:
            result.realize()
        return results

    ends = [reduced(aten.amin.default, float("inf")), reduced(aten.amax.default, -float("inf"))]
    loaders = [[part.make_loader() for part in end] for end in ends]

    def end_of(end: int, group: Any, b: Any) -> Value:
        """A block's minimum or maximum, rounded outward."""
        load = loaders[end][int(b) if apart else 0]
        value = Value(load([group, _torch.sympy.Integer(0) if apart else b]), float32)
        if rest is not None:
            value = value.or_zero(exists(b * fmt.block))
        if fmt.metadata is float32:
            return value
        return _truncate(value, Value(ops.constant(0.0, float32), float32) < value if end else value < 0.0)

    def metadata(end: int) -> Any:
        if rest is None and fmt.metadata is float32:
            return _concatenate(ends[end], 1)

        def piece(b: int) -> Any:
            def body(index: Sequence[Any]) -> Value:
                return end_of(end, index[0], _torch.sympy.Integer(b) if apart else index[1]).to(fmt.metadata)

            return pointwise(x, fmt.metadata, [groups, 1 if apart else blocks], body)

        return _concatenate([piece(b) for b in range(blocks if apart else 1)], 1)

    load_seed = Seed(seed.make_loader())

    def words_of(index: Sequence[Any]) -> Value:
        group, j = index
        position = Value(ops.index_expr((group + first) * width + j, int32), int32)
        noise: list[Any] = list(random_words(position, load_seed, salt, -(-fmt.planes // 4)))  # type: ignore[arg-type]
        words = None
        scales: dict[int, tuple[Value, Value, Value]] = {}
        for k in range(fmt.planes):
            if k * width >= fmt.group:
                break
            b = k * width // fmt.block
            if b not in scales:
                half_low = end_of(0, group, _torch.sympy.Integer(b)) * 0.5
                half = (end_of(1, group, _torch.sympy.Integer(b)) * 0.5 - half_low).at_least(SMALLEST_HALF_RANGE)
                scales[b] = half_low, (fmt.top * 256.0) / half, half < float("inf")  # type: ignore[operator]
            half_low, inverse, finite = scales[b]
            inside = None  # the last plane of a group with unused slots is cut short
            if (k + 1) * width > fmt.group:
                inside = Value(ops.index_expr(j, torch.int64), torch.int64) < fmt.group - k * width
            plane = Value(_load(load_x, [group, k * width + j], inside), x_dtype).to(float32)
            place = apply_map(plane.times_plus(0.5, half_low * -1.0) * inverse, encode_map(fmt))
            fixed = (place + 0.5).to(int32) + ((noise[k // 4] >> (8 * (k % 4))) & 0xFF)
            shift = fmt.bits * k  # the code is `fixed >> 8`: one shift and one mask put it into its place
            code = (fixed << (shift - 8) if shift >= 8 else fixed >> (8 - shift)) & signed32(fmt.top << shift)
            if rest is not None:
                code = code.or_zero(exists(k * width + j))
            if inside is not None:
                code = code.or_zero(inside)
            if blocks > 1:
                code = code.or_zero(finite)
            words = code if words is None else words | code
        assert words is not None
        return words.or_zero(scales[0][2]) if blocks == 1 else words

    words = pointwise(x, int32, [groups, width], words_of)
    words = lower[aten.view.dtype](words, float32)
    return words, metadata(0), metadata(1)


def _load(load: Callable[[Sequence[Any]], Any], index: Sequence[Any], inside: Value | None) -> Any:
    return load(index) if inside is None else ops.masked(inside.value, lambda: load(index), 0.0)


def _truncate(x: Value, away: Value) -> Value:
    """Cuts float32 to bfloat16's bits, away from zero where `away`; NaN and infinity stay. See `round_outward`."""
    bits = bitcast(x, int32)
    finite = Value(ops.abs(x.value), float32) < float("inf")
    up = Value(ops.where(ops.logical_and(away.value, finite.value), (bits + 0xFFFF).value, bits.value), int32)
    cut = bitcast(up & -65536, float32)
    return Value(ops.where(finite.value, cut.value, x.value), float32)


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

    def body(index: Sequence[Any]) -> Value:
        words = Value(load([index[0], index[1]]), torch.bool).to(int32)
        for k in range(1, 32):
            words = words | (Value(load([index[0], k * width + index[1]]), torch.bool).to(int32) << k)
        return words

    return pointwise(mask, int32, [mask.get_size()[0], width], body)


def register() -> None:
    """Registers the lowerings; on other devices than the CPU the ops stay calls of their kernels."""
    call_quantize = _torch.fallback_handler(torch.ops.actcompile.quantize.default)
    call_pack = _torch.fallback_handler(torch.ops.actcompile.pack_bits.default)

    @_torch.register_lowering(torch.ops.actcompile.quantize.default, type_promotion_kind=None)
    def _quantize(x, seed, salt, bits, block, levels, metadata, words):
        if x.get_device().type != "cpu":
            return call_quantize(x, seed, salt, bits, block, levels, metadata, words)
        fmt = BlockFormat(bits, block, levels, metadata, words)
        return quantize_loop(x, seed, salt, fmt, not fills(_torch.sympy.prod(x.get_size()), fmt.group))

    @_torch.register_lowering(torch.ops.actcompile.pack_bits.default, type_promotion_kind=None)
    def _pack_bits(mask, words):
        if mask.get_device().type != "cpu":
            return call_pack(mask, words)
        return pack_bits_loop(mask, words, not fills(_torch.sympy.prod(mask.get_size()), 32 * words))

    _torch.register_lowering(torch.ops.actcompile.copy.default, type_promotion_kind=None)(
        _torch.lowerings[aten.clone.default]
    )
    for cast in (torch.ops.actcompile.narrow.default, torch.ops.actcompile.widen.default):
        _torch.register_lowering(cast, type_promotion_kind=None)(
            _torch.lowerings[torch.ops.prims.convert_element_type.default]
        )


register()
