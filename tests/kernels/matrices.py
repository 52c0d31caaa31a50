"""What the tests of ops on matrices share: tensors of any shape and strides, and what a fake must tell."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tests.strategies import FLOATS, kinds, seeds, values

ODD = (float("nan"), float("inf"), -float("inf"))


@st.composite
def restrided(draw, x: Tensor) -> Tensor:
    """The elements of `x`, of at least 2 dimensions, in other strides; not written to later."""
    how = draw(st.sampled_from(("dense", "permuted", "sliced", "offset", "expanded")))
    if how == "permuted":
        order = draw(st.permutations(range(x.dim())))
        return x.permute(order).contiguous().permute(np.argsort(order).tolist())
    if how == "sliced":
        return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]
    if how == "offset":
        return torch.cat([x.new_full((3,), float("inf")), x.reshape(-1)])[3:].view(x.shape)
    if how == "expanded":
        return x[:1].expand(x.shape) if len(x) else x
    return x


@st.composite
def matrices(draw, kind=None, most_columns: int = 24, odd: bool = False) -> Tensor:
    """A tensor of 2 to 4 dimensions, empty ones among them, of any strides and float dtype; `odd` adds NaN and Inf."""
    rows = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    shape = (*rows, draw(st.integers(0, most_columns)))
    numel = int(np.prod(shape))
    x = values(draw(kinds() if kind is None else kind), numel, draw(seeds)).to(draw(st.sampled_from(FLOATS)))
    if odd and numel:
        for place in draw(st.lists(st.integers(0, numel - 1), max_size=4)):
            x[place] = draw(st.sampled_from(ODD))
    return draw(restrided(x.view(shape)))


def as_rows(x: Tensor) -> Tensor:
    """(rows, columns) of `x`, also where it is empty."""
    return x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])


def nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def check_fakes(function: Callable[..., Sequence[Tensor]], x: Tensor, *others: Tensor) -> None:
    """The fakes of what `function` calls tell shapes, dtypes and strides of the real results."""
    real = function(x, *others)
    with FakeTensorMode() as mode:
        fake = function(*(mode.from_tensor(t) for t in (x, *others)))
    for ours, truth in zip(fake, real, strict=True):
        assert (ours.shape, ours.dtype) == (truth.shape, truth.dtype)
        assert ours.stride() == truth.stride() or not truth.numel()


def check_symbolic_rows(function: Callable[..., Sequence[Tensor]], columns: int, *others: Tensor) -> list[Any]:
    """Runs the fakes on a number of rows of which nothing is known, so that any guard on it is an error."""
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes) as mode:
        rows = shapes.create_unbacked_symint()
        torch._check(rows >= 0)
        fakes = function(torch.empty(rows, 3, columns), *(mode.from_tensor(t) for t in others))
    assert fakes[-1].shape == (rows, 3, columns), "the last is the restored tensor"
    return list(fakes)
