"""Networks that are more than a stack of layers, as people build them from PyG's parts, for the benchmarks.

All sum or average over graphs where `batch`, [nodes] int64, names each node's graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric import nn as gnn


def mlp(i: int, o: int) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, linear: what GIN and its kin apply to nodes."""
    return nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU(), nn.Linear(o, o))


class GatedGCN(nn.Module):
    """Residual gated layers on edge features, BatchNorm, ReLU and a sum with each layer's input (Bresson, Laurent 2017)."""

    def __init__(self, features: int, edge_features: int, classes: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.nodes, self.edges = nn.Linear(features, hidden), nn.Linear(edge_features, hidden)
        self.convs = nn.ModuleList(gnn.ResGatedGraphConv(hidden, hidden, edge_dim=hidden) for _ in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(layers))
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        x, edge_attr = self.nodes(x), self.edges(edge_attr)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + norm(conv(x, edge_index, edge_attr)).relu()
        return self.head(x)


class VirtualNodeGINE(nn.Module):
    """GINE over molecules, with one more node in each that all its atoms talk to (as OGB's graph property baseline).

    atoms [nodes] and bonds [edges] are int64 types; graphs [graphs] is only counted. One number per molecule comes out.
    """

    def __init__(self, atom_types: int, bond_types: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.atoms, self.virtual = nn.Embedding(atom_types, hidden), nn.Embedding(1, hidden)
        self.bonds = nn.ModuleList(nn.Embedding(bond_types, hidden) for _ in range(layers))
        self.convs = nn.ModuleList(gnn.GINEConv(mlp(hidden, hidden), train_eps=True) for _ in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(layers))
        self.talks = nn.ModuleList(mlp(hidden, hidden) for _ in range(layers - 1))
        self.head = nn.Linear(hidden, 1)

    def forward(self, atoms: Tensor, edge_index: Tensor, bonds: Tensor, batch: Tensor, graphs: Tensor) -> Tensor:
        x, virtual = self.atoms(atoms), self.virtual(torch.zeros_like(graphs))
        for i, (conv, norm, bond) in enumerate(zip(self.convs, self.norms, self.bonds, strict=True)):
            x = x + virtual[batch]
            h = norm(conv(x, edge_index, bond(bonds)))
            if i < len(self.talks):
                virtual = virtual + self.talks[i](gnn.global_add_pool(x, batch, graphs.shape[0]) + virtual).relu()
                h = h.relu()
            x = x + h
        return self.head(gnn.global_mean_pool(x, batch, graphs.shape[0])).squeeze(-1)


class GPS(nn.Module):
    """GPS layers: a local GINE and multi-head attention among the nodes of each graph, side by side."""

    def __init__(self, atom_types: int, bond_types: int, hidden: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.atoms, self.bonds = nn.Embedding(atom_types, hidden), nn.Embedding(bond_types, hidden)
        self.convs = nn.ModuleList(
            gnn.GPSConv(hidden, gnn.GINEConv(mlp(hidden, hidden)), heads=heads) for _ in range(layers)
        )
        self.head = nn.Linear(hidden, 1)

    def forward(self, atoms: Tensor, edge_index: Tensor, bonds: Tensor, batch: Tensor, graphs: Tensor) -> Tensor:
        x, edge_attr = self.atoms(atoms), self.bonds(bonds)
        for conv in self.convs:
            x = conv(x, edge_index, batch, edge_attr=edge_attr)
        return self.head(gnn.global_mean_pool(x, batch, graphs.shape[0])).squeeze(-1)


class PairsWithin(nn.Module):
    """SchNet's interaction graph without torch-cluster: which pairs are near is looked up, their distances computed.

    edge_index: [2, pairs], as a radius graph would give it for the one batch that is trained on.
    """

    def __init__(self, edge_index: Tensor) -> None:
        super().__init__()
        self.register_buffer("edge_index", edge_index, persistent=False)

    def forward(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        i, j = self.edge_index
        return self.edge_index, (pos[i] - pos[j]).norm(dim=-1)
