"""Tiles of rows on several threads: each takes a run of them, and works on them alone.

torch's own ops would share every tile among its threads, and wait for all of them behind each op: thousands of times a
step, each a pause of milliseconds where other processes want the same cores.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from .._torch import work_alone

T = TypeVar("T")


def in_threads(rows: int, tile: int, work: Callable[[range], T]) -> list[T]:
    """Calls `work` for runs of tiles, one for each of torch's threads; returns its results in the order of rows.

    Args:
        rows: how many there are in all.
        tile: how many of them a tile has.
        work: takes the first rows of its tiles.
    """
    tiles = -(-rows // tile)
    threads = max(1, min(torch.get_num_threads(), tiles))
    if threads == 1:
        return [work(range(0, rows, tile))]
    ends = [tiles * i // threads * tile for i in range(threads)] + [rows]
    with ThreadPoolExecutor(threads, "actcompile-tiles", work_alone) as pool:
        return list(pool.map(lambda i: _without_gradients(work, range(ends[i], ends[i + 1], tile)), range(threads)))


@torch.no_grad()
def _without_gradients(work: Callable[[range], T], tiles: range) -> T:
    return work(tiles)
