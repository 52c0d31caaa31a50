"""Random small graphs, and random stacks of graph layers to train on them."""

from dataclasses import dataclass

import torch
from hypothesis import Phase, assume, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric import nn as gnn


class Gated(nn.Module):
    """A sum over neighbours of the product of two linear maps: its gradient multiplies two saved activations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        messages = self.value(x)[edges[0]] * self.gate(x)[edges[1]]
        return torch.zeros_like(x).index_add(0, edges[1], messages)


class FixedDropout(nn.Module):
    """Dropout of half of the elements, the same ones in every call: compressed models draw other random numbers."""

    def __init__(self, spec: "Spec") -> None:
        super().__init__()
        self.register_buffer("noise", torch.rand(spec.nodes, spec.width).repeat(spec.copies, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.noise > 0.5) * 2.0


def _mlp(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(i, o), nn.ReLU(), nn.Linear(o, o))


LAYERS = {
    "sage": lambda w: gnn.SAGEConv(w, w),
    "gcn": lambda w: gnn.GCNConv(w, w),  # adds self-loops in forward: sizes that depend on data
    "gcn cached": lambda w: gnn.GCNConv(w, w, cached=True),
    "gcn plain": lambda w: gnn.GCNConv(w, w, normalize=False),
    "gin": lambda w: gnn.GINConv(_mlp(w, w), train_eps=True),
    "gat": lambda w: gnn.GATConv(w, w, heads=2, concat=False, add_self_loops=False),
    "gatv2": lambda w: gnn.GATv2Conv(w, w, heads=2, concat=False, add_self_loops=False),
    "max min": lambda w: gnn.SAGEConv(w, w, aggr=["mean", "max", "min"]),  # as in PNA
    "edge mlp": lambda w: gnn.EdgeConv(_mlp(2 * w, w), aggr="sum"),
    "gated": Gated,
}
ACTIVATIONS = {"relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU}
NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": lambda width: nn.Identity()}
DROPOUTS = ("none", "random", "fixed")


def examples(count: int) -> settings:
    """So many examples. A failing one is shown as it was drawn: to look for a smaller one would compile for minutes."""
    return settings(max_examples=count, phases=(Phase.explicit, Phase.generate))


@dataclass(frozen=True)
class Spec:
    """A stack on a graph: a linear layer, then `layers` with norm, activation and dropout between them.

    `copies` of the graph lie side by side, with the same features and gradients. They are rounded apart, so that one
    call gives as many independent samples of a gradient's error, summed.
    """

    layers: tuple[str, ...]
    activation: str = "relu"
    norm: str = "none"
    dropout: str = "none"
    copies: int = 1
    nodes: int = 30
    edges: int = 80
    width: int = 8
    seed: int = 0


class Stack(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        width = spec.width
        self.encoder = nn.Linear(width, width)
        self.convs = nn.ModuleList(LAYERS[layer](width) for layer in spec.layers)
        self.norms = nn.ModuleList(NORMS[spec.norm](width) for _ in spec.layers[1:])
        self.activation = ACTIVATIONS[spec.activation]()
        made = {"none": nn.Identity, "random": nn.Dropout, "fixed": lambda: FixedDropout(spec)}
        self.dropouts = nn.ModuleList(made[spec.dropout]() for _ in spec.layers[1:])

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.encoder(x)
        for conv, norm, dropout in zip(self.convs, self.norms, self.dropouts, strict=False):
            x = dropout(self.activation(norm(conv(x, edges))))
        return self.convs[-1](x, edges)


def graph(nodes: int, edges: int) -> Tensor:
    """Random edges [2, edges], with isolated nodes, nodes without neighbours, self-loops and repeated edges in them."""
    drawn = torch.randint(2, nodes - 2, (2, edges))  # the first two and the last two nodes are isolated,
    drawn[1] = drawn[1].clamp(max=nodes - 5)  # two more are nobody's target
    drawn[:, 0] = drawn[0, 0]
    drawn[:, edges // 2 : edges // 2 + 5] = drawn[:, :5]
    return drawn


def build(spec: Spec) -> tuple[Stack, Tensor, Tensor, Tensor]:
    """The stack in train mode, its input, the edges, and the gradient of its output; all from the seed."""
    torch.manual_seed(spec.seed)
    edges = graph(spec.nodes, spec.edges)
    edges = torch.cat([edges + i * spec.nodes for i in range(spec.copies)], dim=1)
    model = Stack(spec)
    for parameter in model.parameters():
        if parameter.dim() < 2:  # biases of zero and norm weights of one hide errors
            nn.init.normal_(parameter, mean=0.5)
    x, gradient = (torch.randn(spec.nodes, spec.width).repeat(spec.copies, 1) for _ in "xg")
    if "gcn cached" in spec.layers:
        model(x, edges)  # fills the cache
    return model, x, edges, gradient


@st.composite
def seeds(draw) -> int:
    """A seed, and a refusal of the simplest example of all, with which Hypothesis begins: ours are few."""
    seed = draw(st.integers(0, 2**31))
    assume(seed > 1000)
    return seed


@st.composite
def specs(
    draw, first=LAYERS, last=LAYERS, activations=ACTIVATIONS, norms=NORMS, dropouts=DROPOUTS, copies: int = 1
) -> Spec:
    """Stacks of two layers, each from a choice of its own."""
    return Spec(
        layers=(draw(st.sampled_from(list(first))), draw(st.sampled_from(list(last)))),
        activation=draw(st.sampled_from(list(activations))),
        norm=draw(st.sampled_from(list(norms))),
        dropout=draw(st.sampled_from(list(dropouts))),
        copies=copies,
        nodes=draw(st.integers(20, 50)),
        edges=draw(st.integers(40, 120)),
        width=draw(st.sampled_from((5, 8, 12, 16))),
        seed=draw(seeds()),
    )
