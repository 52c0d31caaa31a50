"""The models that people bring: layers of PyG as their scripts use them, each with data of a size to choose.

training = Brought("gat", size="small").training(prepare)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import nn as gnn
from torch_geometric.data import Data

from actcompile import datasets
from bench import models, networks
from bench.sampling import neighbor_loader
from bench.workload import Batch, Prepare, Training


@dataclass(frozen=True)
class Size:
    """A graph's shape and a network's width; molecules: how many small graphs are in a batch.

    uniform: edges between any nodes alike: communities with hubs take long to draw.
    """

    nodes: int
    edges: int
    features: int
    classes: int
    hidden: int
    molecules: int
    uniform: bool = False


SHARES = {"products/64": 64, "products/16": 16, "products/4": 4, "products": 1}  # of ogbn-products' shape
SIZES = {
    "tiny": Size(300, 1_500, 16, 4, 32, 8),
    "small": Size(30_000, 200_000, 128, 40, 256, 128),
    "arxiv": Size(169_343, 1_166_243, 128, 40, 256, 512),
    **{name: Size(2_449_029 // part, 123_718_280 // part, 100, 47, 128, 1024, True) for name, part in SHARES.items()},
}

BATCHES = 6  # where their sizes change
ATOM_TYPES, BOND_TYPES, EDGE_FEATURES, RELATIONS, HEADS = 20, 4, 16, 6, 4


@dataclass(frozen=True)
class Problem:
    model: nn.Module
    batches: list[Batch]


Make = Callable[[Size, float, bool], Problem]


@dataclass(frozen=True)
class Entry:
    """note: what the model is; dropout: of its layers, 0 where it has none; make(size, dropout, checkpointed)."""

    note: str
    dropout: float
    make: Make


ZOO: dict[str, Entry] = {}


def _model(name: str, note: str, dropout: float = 0.0) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        ZOO[name] = Entry(note, dropout, make)
        return make

    return register


@dataclass(frozen=True)
class Brought:
    """A model of the zoo by name, with parameters and data drawn from a seed: the same in every process.

    dropout: False leaves dropout out, which makes gradients comparable. A step is a forward and a backward pass.
    """

    model: str
    size: str = "small"
    dropout: bool = True
    seed: int = 0
    device: str = "cpu"
    threads: int = 2

    def training(self, prepare: Prepare, checkpointed: bool = False) -> Training:
        entry = ZOO[self.model]
        torch.manual_seed(self.seed)
        problem = entry.make(SIZES[self.size], entry.dropout if self.dropout else 0.0, checkpointed)
        batches = [batch.to(self.device) for batch in problem.batches]
        return Training(problem.model.to(self.device), batches, prepare, self.device)


@functools.lru_cache(maxsize=1)
def _graph(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """x [nodes, features], edge_index [2, edges], y [nodes]; communities with hubs, or uniform."""
    if not size.uniform:
        task = datasets.generated(size.nodes, size.edges, size.features, size.classes)
        return task.x, task.edge_index, task.y
    own = torch.Generator().manual_seed(0)
    y = torch.randint(size.classes, (size.nodes,), generator=own)
    x = torch.randn(size.nodes, size.features, generator=own)
    return x, torch.randint(size.nodes, (2, size.edges), generator=own), y


def _stack(
    size: Size, layer: models.Layer, hidden: int, dropout: float, checkpointed: bool, *edges: Tensor, layers: int = 3
) -> Problem:
    x, edge_index, y = _graph(size)
    model = models.Stack(
        layer, size.features, size.classes, hidden, layers, dropout, encoder=False, checkpointed=checkpointed
    )
    return Problem(model, [Batch((x, edge_index, *edges), y, F.cross_entropy)])


def _attention(conv: Callable[..., nn.Module], size: Size, **options: int) -> models.Layer:
    """Heads that add up to the width, and one head for the classes."""

    def layer(i: int, o: int) -> nn.Module:
        heads = HEADS if o == size.hidden else 1
        return conv(i, o // heads, heads=heads, **options)

    return layer


@_model("sage", "SAGEConv, mean, 3 layers, BatchNorm, dropout 0.5", dropout=0.5)
def _sage(size: Size, dropout: float, checkpointed: bool) -> Problem:
    return _stack(size, lambda i, o: gnn.SAGEConv(i, o), size.hidden, dropout, checkpointed)


@_model("sage-max", "SAGEConv, max, 3 layers of 256, BatchNorm")
def _sage_max(size: Size, dropout: float, checkpointed: bool) -> Problem:
    return _stack(size, lambda i, o: gnn.SAGEConv(i, o, aggr="max"), size.hidden, dropout, checkpointed)


@_model("gcn", "GCNConv, self-loops added in the model, 3 layers of 256, BatchNorm")
def _gcn(size: Size, dropout: float, checkpointed: bool) -> Problem:
    return _stack(size, lambda i, o: gnn.GCNConv(i, o), size.hidden, dropout, checkpointed)


@_model("gat", "GATConv, self-loops added in the model, 3 layers of 4 heads of 64, BatchNorm")
def _gat(size: Size, dropout: float, checkpointed: bool) -> Problem:
    return _stack(size, _attention(gnn.GATConv, size), size.hidden, dropout, checkpointed)


@_model("gatv2", "GATv2Conv, self-loops added in the model, 3 layers of 4 heads of 64, BatchNorm")
def _gatv2(size: Size, dropout: float, checkpointed: bool) -> Problem:
    return _stack(size, _attention(gnn.GATv2Conv, size), size.hidden, dropout, checkpointed)


@_model("transformer", "TransformerConv, 16 edge features, 3 layers of 4 heads, half as wide, BatchNorm")
def _transformer(size: Size, dropout: float, checkpointed: bool) -> Problem:
    narrow = replace(size, hidden=size.hidden // 2)
    layer = _attention(gnn.TransformerConv, narrow, edge_dim=EDGE_FEATURES)
    return _stack(size, layer, narrow.hidden, dropout, checkpointed, torch.randn(size.edges, EDGE_FEATURES))


@_model("gin", "GINConv, 3 layers of 256, BatchNorm")
def _gin(size: Size, dropout: float, checkpointed: bool) -> Problem:
    return _stack(size, lambda i, o: gnn.GINConv(networks.mlp(i, o)), size.hidden, dropout, checkpointed)


@_model("edge-conv", "EdgeConv, an MLP on every edge, max, 2 layers, a quarter as wide, BatchNorm")
def _edge_conv(size: Size, dropout: float, checkpointed: bool) -> Problem:
    def layer(i: int, o: int) -> nn.Module:
        return gnn.EdgeConv(nn.Sequential(nn.Linear(2 * i, o), nn.ReLU(), nn.Linear(o, o)))

    return _stack(size, layer, size.hidden // 4, dropout, checkpointed, layers=2)


@_model("pna", "PNAConv, 4 aggregators, 3 scalers, 2 layers, a quarter as wide, BatchNorm")
def _pna(size: Size, dropout: float, checkpointed: bool) -> Problem:
    histogram = models.degree_histogram(_graph(size)[1], size.nodes)

    def layer(i: int, o: int) -> nn.Module:
        scalers = ["identity", "amplification", "attenuation"]
        return gnn.PNAConv(i, o, ["mean", "min", "max", "std"], scalers, deg=histogram)

    return _stack(size, layer, size.hidden // 4, dropout, checkpointed, layers=2)


@_model("gated-gcn", "ResGatedGraphConv, edge features, BatchNorm, residuals, 4 layers, a quarter as wide")
def _gated_gcn(size: Size, dropout: float, checkpointed: bool) -> Problem:
    x, edge_index, y = _graph(size)
    model = networks.GatedGCN(size.features, EDGE_FEATURES, size.classes, size.hidden // 4, layers=4)
    return Problem(model, [Batch((x, edge_index, torch.randn(size.edges, EDGE_FEATURES)), y, F.cross_entropy)])


@_model("rgcn", "RGCNConv, 6 relations, 2 layers, half as wide, BatchNorm")
def _rgcn(size: Size, dropout: float, checkpointed: bool) -> Problem:
    kinds = torch.randint(RELATIONS, (size.edges,))
    return _stack(
        size, lambda i, o: gnn.RGCNConv(i, o, RELATIONS), size.hidden // 2, dropout, checkpointed, kinds, layers=2
    )


@_model(
    "sampled",
    "SAGEConv, 3 layers of 256, BatchNorm, dropout 0.5, batches of NeighborLoader of changing sizes: 15, 10, 5",
    dropout=0.5,
)
def _sampled(size: Size, dropout: float, checkpointed: bool) -> Problem:
    x, edge_index, y = _graph(size)
    model = models.build(
        "sage",
        size.features,
        size.classes,
        hidden=size.hidden,
        layers=3,
        dropout=dropout,
        encoder=False,
        checkpointed=checkpointed,
    )
    data = Data(x=x, edge_index=edge_index, y=y)
    loader = neighbor_loader(data, [15, 10, 5], batch_size=min(1024, size.nodes // 10), shuffle=True)
    sampled = [batch for batch, _ in zip(loader, range(BATCHES), strict=False)]
    return Problem(model, [Batch((b.x, b.edge_index), b.y[: b.batch_size], _loss_of_seeds) for b in sampled])


def _loss_of_seeds(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits[: y.shape[0]], y)


@_model(
    "molecules",
    "GINEConv and a virtual node, 4 layers, half as wide, BatchNorm, batches of molecules of changing sizes",
)
def _molecules(size: Size, dropout: float, checkpointed: bool) -> Problem:
    model = networks.VirtualNodeGINE(ATOM_TYPES, BOND_TYPES, size.hidden // 2, layers=4)
    return Problem(model, [_molecule_batch(size.molecules) for _ in range(BATCHES)])


@_model("gps", "GPSConv: GINEConv beside attention in each molecule, 3 layers, a quarter as wide")
def _gps(size: Size, dropout: float, checkpointed: bool) -> Problem:
    model = networks.GPS(ATOM_TYPES, BOND_TYPES, size.hidden // 4, layers=3)
    return Problem(model, [_molecule_batch(size.molecules)])


@_model("schnet", "SchNet, 6 interactions of 128, pairs of atoms up to 10 Angstrom")
def _schnet(size: Size, dropout: float, checkpointed: bool) -> Problem:
    atoms, _, _, batch, graphs = _molecule_batch(size.molecules).inputs
    pos = 2.5 * torch.randn(atoms.shape[0], 3)  # about as dense as atoms lie
    i, j = _pairs(batch)
    near = (pos[i] - pos[j]).norm(dim=-1) < 10.0
    pairs = torch.stack([i[near], j[near]])
    model = gnn.SchNet(128, 128, 6, interaction_graph=networks.PairsWithin(pairs))
    target = torch.randn(graphs.shape[0], 1)
    return Problem(model, [Batch((atoms, pos, batch), target, F.mse_loss)])


def _molecule_batch(molecules: int) -> Batch:
    """Small graphs of 12 to 32 atoms side by side: a chain of bonds in each, and a few that close rings."""
    sizes = torch.randint(12, 33, (molecules,))
    batch = torch.repeat_interleave(torch.arange(molecules), sizes)
    nodes = batch.shape[0]
    i = torch.arange(nodes)
    first = (sizes.cumsum(0) - sizes)[batch]
    chain = i[1:][batch[1:] == batch[:-1]]
    rings = i[(i - first >= 5) & (torch.rand(nodes) < 0.15)]
    source, target = torch.cat([chain, rings]), torch.cat([chain - 1, rings - 5])
    edge_index = torch.stack([torch.cat([source, target]), torch.cat([target, source])])
    bonds = torch.randint(BOND_TYPES, source.shape).repeat(2)
    atoms = torch.randint(1, ATOM_TYPES, (nodes,))
    inputs = (atoms, edge_index, bonds, batch, torch.zeros(molecules, dtype=torch.long))
    return Batch(inputs, torch.randn(molecules), F.mse_loss)


def _pairs(batch: Tensor) -> tuple[Tensor, Tensor]:
    """All ordered pairs of different nodes in the same graph; `batch` is sorted."""
    counts = torch.bincount(batch)[batch]
    start = torch.searchsorted(batch, batch)
    i = torch.repeat_interleave(torch.arange(batch.shape[0]), counts)
    within = torch.arange(i.shape[0]) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    j = start[i] + within
    return i[i != j], j[i != j]
