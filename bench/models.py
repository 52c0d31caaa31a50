"""Graph networks made of PyG's own layers, built by name: what the benchmarks train and the tests compress.

model = build("sage", in_channels=128, out_channels=40, hidden=256, layers=3)
logits = model(x, edge_index)          # [nodes, out_channels]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric import nn as gnn
from torch_geometric.utils import degree

Layer = Callable[[int, int], nn.Module]
_LAYERS: dict[str, Callable[..., Layer]] = {}


def names() -> list[str]:
    """Every model that `build` knows."""
    return list(_LAYERS)


def _layer(name: str) -> Callable[[Callable[..., Layer]], Callable[..., Layer]]:
    def register(factory: Callable[..., Layer]) -> Callable[..., Layer]:
        _LAYERS[name] = factory
        return factory

    return register


def _mlp(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(i, o), nn.ReLU(), nn.Linear(o, o))


@_layer("sage")
def _sage(**_: object) -> Layer:
    return lambda i, o: gnn.SAGEConv(i, o)


@_layer("sage_max")
def _sage_max(**_: object) -> Layer:
    return lambda i, o: gnn.SAGEConv(i, o, aggr="max")


@_layer("gcn")
def _gcn(**_: object) -> Layer:
    return lambda i, o: gnn.GCNConv(i, o)  # adds self-loops and norms inside forward: unbacked sizes when traced


@_layer("gin")
def _gin(**_: object) -> Layer:
    return lambda i, o: gnn.GINConv(_mlp(i, o), train_eps=True)


@_layer("gat")
def _gat(heads: int = 4, **_: object) -> Layer:
    return lambda i, o: gnn.GATConv(i, o, heads=heads, concat=False)


@_layer("gatv2")
def _gatv2(heads: int = 4, **_: object) -> Layer:
    return lambda i, o: gnn.GATv2Conv(i, o, heads=heads, concat=False)


@_layer("pna")
def _pna(degrees: Tensor | None = None, **_: object) -> Layer:
    histogram = torch.ones(8, dtype=torch.long) if degrees is None else degrees
    return lambda i, o: gnn.PNAConv(
        i, o, aggregators=["mean", "min", "max", "std"], scalers=["identity", "amplification"], deg=histogram
    )


@_layer("max_min")
def _max_min(**_: object) -> Layer:
    return lambda i, o: gnn.SAGEConv(i, o, aggr=["max", "min"])


@_layer("edge_mlp")
def _edge_mlp(**_: object) -> Layer:
    return lambda i, o: gnn.EdgeConv(_mlp(2 * i, o), aggr="mean")


class Stack(nn.Module):
    """Layers with BatchNorm, ReLU and dropout between them; logits [nodes, out_channels] come out.

    encoder: a linear layer first, so that messages have `hidden` columns where the input is much wider.
    checkpointed: each layer with its norm is recomputed in backward (torch.utils.checkpoint).
    """

    def __init__(
        self,
        layer: Layer,
        in_channels: int,
        out_channels: int,
        hidden: int = 256,
        layers: int = 3,
        dropout: float = 0.5,
        norm: bool = True,
        encoder: bool = False,
        checkpointed: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = nn.Linear(in_channels, hidden) if encoder else None
        sizes = [hidden if encoder else in_channels] + [hidden] * (layers - 1) + [out_channels]
        self.convs = nn.ModuleList(layer(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) if norm else nn.Identity() for _ in range(layers - 1))
        self.dropout = nn.Dropout(dropout)
        self.checkpointed = checkpointed

    def _hidden(self, index: int, x: Tensor, edge_index: Tensor, *edges: Tensor) -> Tensor:
        return self.dropout(self.norms[index](self.convs[index](x, edge_index, *edges)).relu())

    def forward(self, x: Tensor, edge_index: Tensor, *edges: Tensor) -> Tensor:
        """edges: what the layers take beside `edge_index`, such as features or types of edges."""
        if self.encoder is not None:
            x = self.encoder(x)
        for i in range(len(self.norms)):
            if self.checkpointed and self.training:
                x = checkpoint(self._hidden, i, x, edge_index, *edges, use_reentrant=False)
            else:
                x = self._hidden(i, x, edge_index, *edges)
        return self.convs[-1](x, edge_index, *edges)

    def reset_parameters(self) -> None:
        """Draws new parameters in place, with the default generator; a compiled graph of the model stays valid."""
        for module in self.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()


def build(name: str, in_channels: int, out_channels: int, **options: object) -> Stack:
    """A `Stack` of the named layer (see `names`).

    Options are those of `Stack`, `heads` for attention layers, and `degrees`, the histogram of in-degrees that PNA
    scales by. Raises ValueError for an unknown name.
    """
    if name not in _LAYERS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(_LAYERS)}")
    layer = _LAYERS[name](**{k: options.pop(k) for k in ("heads", "degrees") if k in options})
    return Stack(layer, in_channels, out_channels, **options)  # type: ignore[arg-type]


def degree_histogram(edge_index: Tensor, nodes: int) -> Tensor:
    """How many nodes have in-degree 0, 1, 2, ...: [largest in-degree + 1] int64, what PNA needs."""
    return torch.bincount(degree(edge_index[1], nodes, dtype=torch.long))
