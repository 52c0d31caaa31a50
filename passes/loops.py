"""Loop bodies for Inductor that read like tensor code: scalars with arithmetic, and what both kinds share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import _torch
from ._torch import loop_ops as ops

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

    def times_plus(self, factor: float, summand: "Value") -> "Value":
        """`self * factor + summand` in one instruction: the same bits where the product is exact."""
        return Value(ops.fma(self.value, ops.constant(factor, self.dtype), summand.value), self.dtype)

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

    def __gt__(self, other: Any) -> "Value":
        return self._binary("gt", other, torch.bool)

    def __lt__(self, other: Any) -> "Value":
        return self._binary("lt", other, torch.bool)

    def clamp(self, lower: float, upper: float) -> "Value":
        return self.at_least(lower)._binary("minimum", upper)

    def at_least(self, lower: float) -> "Value":
        return self._binary("maximum", lower)

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


def pointwise(like: Any, dtype: torch.dtype, sizes: list[Any], body: Callable[[Sequence[Any]], Value]) -> Any:
    """A tensor box computed element by element, on the device of another one."""
    return _torch.Pointwise.create(
        device=like.get_device(), dtype=dtype, inner_fn=lambda index: body(index).value, ranges=sizes
    )


def bitcast(x: Value, dtype: torch.dtype) -> Value:
    return Value(ops.to_dtype_bitcast(x.value, dtype, x.dtype), dtype)


def select(condition: Value, if_true: float, if_false: float) -> Value:
    """One of two float32 constants."""
    return Value(ops.where(condition.value, ops.constant(if_true, float32), ops.constant(if_false, float32)), float32)


def fills(numel: Any, group: int) -> bool:
    """Whether so many elements fill groups exactly, for all values of their symbolic sizes."""
    return _torch.V.graph.sizevars.statically_known_equals(_torch.ModularIndexing(numel, 1, group), 0)
