"""Pointwise ops on rows in one loop: a program over edges without a graph, whose edges are the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._cpp import I32
from ..edges.ops import addresses, compiled
from ..edges.program import dtype_of, parse, run_reference


def loop(program: str, heads: int, columns: int, size: Sequence[int], *operands: Tensor) -> Tensor:
    """Runs a program that reads rows, and nothing by an index, and writes down one row for each of them.

    On the thread that calls: a tile is small.

    Args:
        program: as `Program.dump` writes it; its one result is of the kind "edge".
        heads, columns: the sizes of its axes.
        size: of the result.
    """
    parsed, library = parse(program), compiled(program, heads, columns)
    if library is None:
        by = torch.zeros(size[0], dtype=torch.int64)
        return run_reference(parsed, operands, by, [], 1, heads, columns)[0].view(size)
    dense = [o.contiguous() for o in operands]
    result = torch.empty(size, dtype=dtype_of(parsed.outputs[0]))
    pointer = (I32 * 2)(0, size[0])  # one node has all edges
    library.run(addresses(dense), addresses([result]), pointer, None, addresses([]), 1, columns, 1)
    return result
