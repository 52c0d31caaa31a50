"""How ops are defined: as `torch.library.custom_op` does, without what they have no use for.

They run within compiled graphs: nothing differentiates through them, and no result aliases an argument. A call takes
5 us where one of `custom_op` takes 15, in Python that looks after both; on a GPU, a step of a small graph takes as long
as Python does to launch it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
KEYS = {"cpu": "CPU", "cuda": "CUDA"}
LIBRARY = torch.library.Library("actcompile", "FRAGMENT")  # ops live as long as it does


class Op(Generic[P, R]):
    """An op `actcompile::name`, called like the function that it was made of; `overload` is what torch knows it as."""

    def __init__(self, name: str, function: Callable[P, R], tags: Sequence[torch.Tag]) -> None:
        self.name, self.__doc__ = name, function.__doc__
        schema = torch.library.infer_schema(function, mutates_args=())
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.actcompile, name).default

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.overload(*args, **kwargs)  # type: ignore[no-any-return]

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Registers what tells shapes and dtypes of results."""
        torch.library.register_fake(f"actcompile::{self.name}", function, lib=LIBRARY)
        return function

    def register_kernel(self, device: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
        """Registers what runs on a type of device, instead of the function itself."""

        def register(function: Callable[..., R]) -> Callable[..., R]:
            LIBRARY.impl(self.name, function, KEYS[device])
            return function

        return register


def op(name: str, tags: Sequence[torch.Tag] = ()) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Makes an op of a function that mutates none of its arguments, for all devices."""
    return lambda function: Op(name, function, tags)
