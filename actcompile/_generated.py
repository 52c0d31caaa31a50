"""Planted-community graphs and random splits: tensors in, tensors out, all drawn from a seed, all vectorised."""

from __future__ import annotations

import torch
from torch import Tensor

DEGREE_EXPONENT = 2.5  # of the power law of node weights; citation graphs lie between 2 and 3


def community_graph(
    nodes: int, edges: int, features: int, classes: int, seed: int, homophily: float, signal: float
) -> tuple[Tensor, Tensor, Tensor]:
    """edge_index [2, edges] int64 sorted by source, x [nodes, features] float32, y [nodes] int64: see
    `datasets.generated`."""
    if edges > nodes * (nodes - 1):
        raise ValueError(f"{edges} edges do not fit between {nodes} nodes without loops and double edges")
    if not 1 <= classes <= max(nodes, 1):
        raise ValueError(f"classes must lie between 1 and the {nodes} nodes, not {classes}")
    generator = torch.Generator().manual_seed(seed)
    y = _labels(nodes, classes, generator)
    x = torch.randn(nodes, features, generator=generator)
    centres = torch.randn(classes, features, generator=generator) * (signal / (2 * features) ** 0.5)
    x += centres[y]
    keys = _edge_keys(nodes, edges, y, homophily, generator)
    return torch.stack([keys // nodes, keys % nodes]), x, y


def _labels(nodes: int, classes: int, generator: torch.Generator) -> Tensor:
    """Classes of unequal size (proportional to 1 / (rank + 3)), every one with at least one node."""
    proportions = 1.0 / (torch.arange(classes, dtype=torch.float64) + 3)
    y = torch.multinomial(proportions, nodes, replacement=True, generator=generator)
    y[torch.randperm(nodes, generator=generator)[:classes]] = torch.arange(classes)
    return y


def _edge_keys(nodes: int, edges: int, y: Tensor, homophily: float, generator: torch.Generator) -> Tensor:
    """`edges` distinct keys source * nodes + target, ascending, without loops."""
    by_class = torch.argsort(y, stable=True)
    weight = torch.rand(nodes, dtype=torch.float64, generator=generator).clamp_min(1.0 / max(nodes, 1))
    weight = weight.pow(-1 / (DEGREE_EXPONENT - 1))
    ends = weight[by_class].cumsum(0)  # ends[k]: the weight of the first k + 1 nodes in class order
    last = torch.bincount(y).cumsum(0) - 1
    class_end = ends[last]
    class_start = torch.cat([class_end.new_zeros(1), class_end[:-1]])

    def pick(at: Tensor) -> Tensor:
        return by_class[torch.searchsorted(ends, at, right=True).clamp_max(nodes - 1)]

    keys = torch.empty(0, dtype=torch.int64)
    for _ in range(8):  # the heaviest nodes' edges collide; a few rounds make up for those
        missing = edges - keys.numel()
        if missing <= 0:
            break
        n = missing + missing // 4 + 16
        draws = torch.rand(3, n, dtype=torch.float64, generator=generator)
        source = pick(draws[0] * ends[-1])
        own = draws[1] < homophily
        start = torch.where(own, class_start[y[source]], 0.0)
        end = torch.where(own, class_end[y[source]], ends[-1])
        target = pick(start + draws[2] * (end - start))
        keys = torch.cat([keys, (source * nodes + target)[source != target]]).unique()
    if keys.numel() < edges:  # nearly complete graphs, where weighted draws find nothing new
        every = torch.arange(nodes * nodes)
        every = every[every // nodes != every % nodes]
        free = every[~torch.isin(every, keys)]
        keys = torch.cat([keys, free[torch.randperm(free.numel(), generator=generator)[: edges - keys.numel()]]])
    chosen = torch.randperm(keys.numel(), generator=generator)[:edges]
    return keys[chosen].sort().values


def random_splits(nodes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks [nodes] bool of 60 % training, 20 % validation and 20 % test nodes."""
    order = torch.randperm(nodes, generator=torch.Generator().manual_seed(seed))
    first, second = int(0.6 * nodes), int(0.8 * nodes)
    return _mask(nodes, order[:first]), _mask(nodes, order[first:second]), _mask(nodes, order[second:])


def split_per_class(y: Tensor, train: int, val: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks [nodes] bool: `train` nodes of each class, `val` others of each class, and the rest; y < 0 is in none."""
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for label in y[y >= 0].unique():
        members = (y == label).nonzero().flatten()
        members = members[torch.randperm(members.numel(), generator=generator)]
        pieces = (members[:train], members[train : train + val], members[train + val :])
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    masks = [_mask(y.numel(), torch.cat(part)) for part in parts]
    return masks[0], masks[1], masks[2]


def _mask(nodes: int, chosen: Tensor) -> Tensor:
    mask = torch.zeros(nodes, dtype=torch.bool)
    mask[chosen] = True
    return mask
