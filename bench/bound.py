"""The least that a step can take on this machine, as if nothing but products and message passing took any time.

All matrix products of an eager step at the rate of a large one, and for each sum over edges, forward and backward, the
rows that are added up, moved at the speed of a copy. A step may take less where products for edges are made by node.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import seconds

aten = torch.ops.aten
SUMS = {  # by op, which argument has a row for each edge
    **dict.fromkeys((aten.index_add.default, aten.index_add_.default, aten.scatter_add.default), 3),
    **dict.fromkeys((aten.scatter_add_.default, aten.scatter_reduce.two, aten.scatter_reduce_.two), 3),
    **dict.fromkeys((aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default), 2),
}
ROWS, WIDTH, TIMES = 1 << 17, 256, 5


class _Rows(TorchDispatchMode):
    """Counts the bytes of what is summed up by an index."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SUMS:
            rows: Tensor = args[SUMS[func]]
            self.nbytes += rows.numel() * rows.element_size()
        return func(*args, **(kwargs or {}))


def bound(step: Callable[[], object]) -> dict[str, float]:
    """What an eager step multiplies and moves, and the seconds that these take at least, on the CPU.

    Returns:
        flops; row_bytes, of the rows that are summed up over edges; seconds.
    """
    with FlopCounterMode(display=False) as products, _Rows() as rows:
        step()
    flops = products.get_total_flops()
    per_flop, per_byte = _rates()
    return {"flops": flops, "row_bytes": rows.nbytes, "seconds": flops * per_flop + rows.nbytes * per_byte}


def _rates() -> tuple[float, float]:
    """Seconds for each operation of a large product, and for each byte that is copied."""
    x, weights = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH)
    out = torch.empty_like(x)

    def median(work: Callable[[], object]) -> float:
        return statistics.median([seconds(work) for _ in range(TIMES + 1)][1:])

    product, copy = median(lambda: torch.mm(x, weights, out=out)), median(lambda: out.copy_(x))
    return product / (2 * ROWS * WIDTH * WIDTH), copy / (x.numel() * x.element_size())
