"""Blocks of several rounds of messages, as models of physics and molecules have them: edges with a state of their own,
positions, triplets, kinds of nodes, pooled graphs. Each maps node features [nodes, WIDTH] to the same shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import nn as gnn
from torch_geometric.utils import scatter, softmax

from tests.explore.messages import EDGE, GRAPHS, WIDTH, Graph

W = WIDTH
Rounds = Callable[[nn.ModuleDict, Tensor, Graph], Tensor]


def _mlp(i: int, hidden: int, o: int, *after: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(i, hidden), nn.SiLU(), nn.Linear(hidden, o), *after)


def _sum(rows: Tensor, by: Tensor, like: Tensor) -> Tensor:
    return rows.new_zeros(like.shape[0], *rows.shape[1:]).index_add(0, by, rows)


def _mesh(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    """MeshGraphNets: edges are updated by both ends, nodes by the sum of their edges, twice."""
    source, target = g.edges
    e = m["edge"](g.features)
    for i in "01":
        e = e + m["edges" + i](torch.cat([x[source], x[target], e], -1))
        x = x + m["nodes" + i](torch.cat([x, scatter(e, target, 0, x.shape[0], reduce="sum")], -1))
    return x


def _gated(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    """GatedGCN: gates of edges, divided by their sum, with norms over edges and nodes."""
    source, target = g.edges
    e = m["edge"](g.features)
    for i in "01":
        new = m["a" + i](x)[target] + m["b" + i](x)[source] + m["c" + i](e)
        gate = new.sigmoid()
        top, gates = (_sum(t, target, x) for t in (gate * m["v" + i](x)[source], gate))
        x = x + F.relu(m["n" + i](m["u" + i](x) + top / (gates + 1e-3)))
        e = e + F.relu(m["m" + i](new))
    return x


def _equivariant(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    """EGNN: messages of distances, which also move positions."""
    source, target = g.edges
    at = x[:, :3]
    for i in "01":
        apart = at[target] - at[source]
        square = apart.square().sum(-1, keepdim=True)
        made = m["e" + i](torch.cat([x[target], x[source], square, g.features], -1))
        weight = m["x" + i](made)
        at = at + scatter(apart / (square + 1).sqrt() * weight, target, 0, x.shape[0], reduce="mean")
        x = x + m["n" + i](torch.cat([x, scatter(made, target, 0, x.shape[0], reduce="sum")], -1))
    return x + F.pad(at, (0, W - 3))


def _triplets(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    """DimeNet: messages between edges, by the other edges of the graph, and then to nodes."""
    source, target = g.edges
    e = m["in"](torch.cat([x[source], x[target], g.features], -1)).tanh()
    count = e.shape[0]
    first, second = g.others[0].long() % max(count, 1), g.others[1].long() % max(count, 1)
    angle = (e[first, :4] * e[second, :4]).sum(-1, keepdim=True).sin()
    e = e + _sum(m["mid"](e)[first] * m["angle"](angle), second, e)
    return x + m["out"](_sum(e, target, x))


def _filters(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    """SchNet: filters of distances in Gaussians, cut off smoothly."""
    source, target = g.edges
    apart = ((x[source, :3] - x[target, :3]).square().sum(-1) + 1e-2).sqrt()
    basis = (-2 * (apart[:, None] - torch.linspace(0, 4, 50, dtype=x.dtype)).square()).exp()
    cut = 0.5 * ((apart.clamp(max=6) * (torch.pi / 6)).cos() + 1)
    for i in "01":
        messages = m["in" + i](x)[source] * (m["filter" + i](basis) * cut[:, None])
        x = x + m["out" + i](_sum(messages, target, x))
    return x


def _virtual(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    """Graphs that read their nodes by attention, and are read by them: two kinds of nodes."""
    weight = softmax(m["gate"](x), g.batch, num_nodes=GRAPHS)
    graphs = scatter(weight * m["value"](x), g.batch, 0, GRAPHS, reduce="sum")
    pair = torch.cat([x, graphs[g.batch]], -1)
    return x + m["back"](pair) * m["last"](graphs).sigmoid()[g.batch]


def _kinds(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    """Two kinds of nodes, one behind the other, and edges from one kind to the other, of an MLP of both."""
    half = x.shape[0] // 2
    if half == 0:
        return m["value"](x)
    a, b = x[:half], x[half:]
    source, target = g.edges[0] % half, g.edges[1] % half
    made = m["there"](torch.cat([a[source], b[target]], -1))
    b = b + scatter(made, target, 0, b.shape[0], reduce="sum")
    back = m["back"](torch.cat([a[source], b[target] - a[source], made], -1))
    a = a + scatter(back, source, 0, a.shape[0], reduce="max")
    return torch.cat([a, b])


def _both_ways(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    """Messages that are added up at both of their ends, and also read as they are."""
    source, target = g.edges
    made = m["pair"](torch.cat([x[source], x[target] - x[source]], -1)).relu()
    there, back = (scatter(made, at, 0, x.shape[0], reduce="sum") for at in (target, source))
    return m["out"](torch.cat([there, back], -1)) + made.mean(0) + x


def _heads(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    """Attention whose scores are an MLP of both ends, with a matrix of its own for each head."""
    source, target = g.edges
    scores = m["b"](F.leaky_relu(m["a"](torch.cat([x[source], x[target]], -1)), 0.2))
    weight = F.dropout(softmax(scores, target, num_nodes=x.shape[0]), 0.2)
    matrices = m["a"].weight[:, : W // 4].reshape(4, W // 4, W // 4)
    values = torch.einsum("ehc,hcd->ehd", m["v"](x)[source].view(-1, 4, W // 4), matrices)
    return x + scatter(weight[..., None] * values, target, 0, x.shape[0], reduce="sum").flatten(1)


def _gru(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    """Edges that remember: a GRU on them, whose input is of both ends."""
    source, target = g.edges
    state = m["edge"](g.features).tanh()
    state = m["cell"](torch.cat([x[source], x[target]], -1), state)
    return x + scatter(state, target, 0, x.shape[0], reduce="mean")


def _kept_nodes(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    """TopKPooling, a layer on what is left, and back to all nodes."""
    left, edges, _, _, kept, _ = m["pool"](x, g.edges, None, g.batch)
    return x + _sum(m["conv"](left, edges), kept, x)


def _clustered(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    """SAGPooling's scores, and a graph's attention over what is left."""
    left, edges, _, batch, kept, _ = m["pool"](x, g.edges, None, g.batch)
    return x + m["read"](m["conv"](left, edges), batch, dim_size=GRAPHS)[g.batch]


Made = tuple[Rounds, dict[str, Callable[[], nn.Module]]]
"""A function, and what makes its parts."""


def _made(function: Rounds, **parts: Callable[[], nn.Module]) -> Made:
    return function, parts


def _lin(i: int, o: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(i, o)


ROUNDS: dict[str, Made] = {
    "mesh graph nets": _made(
        _mesh,
        edge=_lin(EDGE, W),
        **{f"edges{i}": lambda: _mlp(3 * W, W, W, nn.LayerNorm(W)) for i in "01"},
        **{f"nodes{i}": lambda: _mlp(2 * W, W, W, nn.LayerNorm(W)) for i in "01"},
    ),
    "gated gcn": _made(
        _gated,
        edge=_lin(EDGE, W),
        **{f"{name}{i}": _lin(W, W) for name in "abcuv" for i in "01"},
        **{f"{name}{i}": lambda: nn.BatchNorm1d(W) for name in "nm" for i in "01"},
    ),
    "equivariant": _made(
        _equivariant,
        **{f"e{i}": lambda: _mlp(2 * W + 1 + EDGE, W, W, nn.SiLU()) for i in "01"},
        **{f"x{i}": lambda: _mlp(W, W, 1, nn.Tanh()) for i in "01"},
        **{f"n{i}": lambda: _mlp(2 * W, W, W) for i in "01"},
    ),
    "triplets": _made(
        _triplets, **{"in": _lin(2 * W + EDGE, W)}, mid=_lin(W, W), angle=lambda: _mlp(1, W, W), out=_lin(W, W)
    ),
    "filters of distances": _made(
        _filters,
        **{f"in{i}": lambda: nn.Linear(W, W, bias=False) for i in "01"},
        **{f"filter{i}": lambda: _mlp(50, W, W) for i in "01"},
        **{f"out{i}": lambda: _mlp(W, W, W) for i in "01"},
    ),
    "graphs as nodes": _made(
        _virtual, gate=lambda: _mlp(W, W, 1), value=_lin(W, W), back=lambda: _mlp(2 * W, W, W), last=_lin(W, W)
    ),
    "kinds of nodes": _made(_kinds, there=lambda: _mlp(2 * W, W, W), back=lambda: _mlp(3 * W, W, W), value=_lin(W, W)),
    "both ways": _made(_both_ways, pair=lambda: _mlp(2 * W, 24, W), out=lambda: nn.Linear(2 * W, W, bias=False)),
    "mlp attention": _made(_heads, a=_lin(2 * W, W), b=_lin(W, 4), v=_lin(W, W)),
    "gru on edges": _made(_gru, edge=_lin(EDGE, W), cell=lambda: nn.GRUCell(2 * W, W)),
    "top k": _made(_kept_nodes, pool=lambda: gnn.TopKPooling(W, 0.6), conv=lambda: gnn.SAGEConv(W, W)),
    "self-attention pool": _made(
        _clustered,
        pool=lambda: gnn.SAGPooling(W, 0.6),
        conv=lambda: gnn.EdgeConv(_mlp(2 * W, W, W)),
        read=lambda: gnn.AttentionalAggregation(_mlp(W, W, 1), _mlp(W, W, W)),
    ),
}
