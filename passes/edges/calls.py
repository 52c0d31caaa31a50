"""Calls that a rewriting of a graph inserts, each of them once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph import _torch
from ..graph.split import call

aten = torch.ops.aten


class Calls:
    """Inserts calls at a graph's insertion point.

    Attributes:
        made: what was inserted before, which stands for the same call again; to be cleared where what comes next is
            inserted before it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.made: dict[str, fx.Node] = {}

    def call(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call with the origin of `like`, or the same call that was made before."""
        key = repr((target, args, kwargs))
        if key not in self.made:
            self.made[key] = call(self.graph, target, *args, like=like, **kwargs)
        return self.made[key]

    def slice(self, like: fx.Node, matrix: Any, dim: int, start: int, end: int) -> fx.Node:
        """A part of a matrix along a dimension; the matrix itself where that is all of it."""
        if start == 0 and _torch.known_true(matrix.meta["val"].shape[dim] == end):
            return matrix  # type: ignore[no-any-return]
        return self.call(like, aten.slice.Tensor, matrix, dim, start, end)
