"""What drawn models are made of: blocks that map node features [nodes, WIDTH] to the same shape.

A block's forward takes `(x, g)`, where `g` is the `Graph`: edges, edge features, kinds of edges, and the graph of each
node. Each is small, and stands for code that people write. Messages that are drawn op by op are in `messages`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch_geometric import nn as gnn
from torch_geometric.utils import degree, scatter, softmax

from tests.explore.messages import EDGE, GRAPHS, KINDS, WIDTH, Graph
from tests.explore.rounds import ROUNDS
from tests.fidelity.stacks import LAYERS


class Conv(nn.Module):
    """A layer of PyG's: called with the edges, and with features or kinds of edges where `extra` names them."""

    def __init__(self, conv: nn.Module, extra: str = "") -> None:
        super().__init__()
        self.conv, self.extra = conv, extra

    def forward(self, x: Tensor, g: Graph) -> Tensor:
        return self.conv(x, g.edges, getattr(g, self.extra)) if self.extra else self.conv(x, g.edges)


class Op(nn.Module):
    """A function of `(parts, x, g)`; `parts` are modules of its own."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleDict(parts)

    def forward(self, x: Tensor, g: Graph) -> Tensor:
        return self.function(self.parts, x, g)


def _mlp(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(i, o), nn.ReLU(), nn.Linear(o, o))


def _pna(towers: int, edge_dim: int | None = None, layers: int = 1) -> nn.Module:
    histogram = torch.tensor([2, 5, 9, 7, 4, 2, 1])
    aggregators, scalers = ["mean", "max", "min", "std"], ["identity", "amplification", "attenuation"]
    return gnn.PNAConv(WIDTH, WIDTH, aggregators, scalers, histogram, edge_dim, towers, layers, layers)


W = WIDTH
CONVS: dict[str, Callable[[], nn.Module]] = {
    **{f"conv {name}": lambda make=make: Conv(make(W)) for name, make in LAYERS.items() if name != "gcn cached"},
    "sage max": lambda: Conv(gnn.SAGEConv(W, W, aggr="max", normalize=True)),
    "gcn no self-loops": lambda: Conv(gnn.GCNConv(W, W, add_self_loops=False)),
    "gat self-loops": lambda: Conv(gnn.GATConv(W, W // 2, heads=2)),
    "gat edges": lambda: Conv(gnn.GATConv(W, W, edge_dim=EDGE, add_self_loops=False), "features"),
    "gatv2 self-loops": lambda: Conv(gnn.GATv2Conv(W, W // 2, heads=2)),
    "transformer edges": lambda: Conv(gnn.TransformerConv(W, W // 2, heads=2, edge_dim=EDGE, beta=True), "features"),
    "gine": lambda: Conv(gnn.GINEConv(_mlp(W, W), edge_dim=EDGE, train_eps=True), "features"),
    "pna": lambda: Conv(_pna(1)),
    "pna towers": lambda: Conv(_pna(2)),
    "cg": lambda: Conv(gnn.CGConv(W, dim=EDGE), "features"),
    "cg batch norm": lambda: Conv(gnn.CGConv(W, dim=EDGE, batch_norm=True), "features"),
    "res gated": lambda: Conv(gnn.ResGatedGraphConv(W, W)),
    "graph max": lambda: Conv(gnn.GraphConv(W, W, aggr="max")),
    "rgcn": lambda: Conv(gnn.RGCNConv(W, W, KINDS), "kinds"),
    "fast rgcn": lambda: Conv(gnn.FastRGCNConv(W, W, KINDS), "kinds"),
    "nn": lambda: Conv(gnn.NNConv(W, W, nn.Linear(EDGE, W * W)), "features"),
    "gmm": lambda: Conv(gnn.GMMConv(W, W, EDGE, 2), "features"),
    "film": lambda: Conv(gnn.FiLMConv(W, W)),
    "gen softmax": lambda: Conv(gnn.GENConv(W, W, aggr="softmax", learn_t=True)),
    "gen power": lambda: Conv(gnn.GENConv(W, W, aggr="powermean", learn_p=True)),
    "tag": lambda: Conv(gnn.TAGConv(W, W, K=2)),
    "cheb": lambda: Conv(gnn.ChebConv(W, W, K=2)),
    "appnp": lambda: Conv(gnn.APPNP(2, 0.1)),
    "arma": lambda: Conv(gnn.ARMAConv(W, W)),
    "le": lambda: Conv(gnn.LEConv(W, W)),
    "agnn": lambda: Conv(gnn.AGNNConv()),
    "gated graph": lambda: Conv(gnn.GatedGraphConv(W, 2)),
    "feast": lambda: Conv(gnn.FeaStConv(W, W, heads=2)),
    "general attention": lambda: Conv(gnn.GeneralConv(W, W, attention=True, heads=2)),
    "super gat": lambda: Conv(gnn.SuperGATConv(W, W // 2, heads=2, attention_type="SD", add_self_loops=False)),
    "point": lambda: Op(_point, conv=gnn.PointNetConv(_mlp(W + 3, W), add_self_loops=False)),
    "edge conv": lambda: Conv(gnn.EdgeConv(_mlp(2 * W, W))),
    "edge conv max": lambda: Conv(gnn.EdgeConv(_mlp(2 * W, W), aggr="max")),
    "pna edges": lambda: Conv(_pna(2, EDGE), "features"),
    "pna deep": lambda: Conv(_pna(2, EDGE, 2), "features"),
    "gatv2 edges": lambda: Conv(gnn.GATv2Conv(W, W // 2, heads=2, edge_dim=EDGE, dropout=0.2), "features"),
    "nn mlp": lambda: Conv(gnn.NNConv(W, W, _mlp(EDGE, W * W), aggr="mean"), "features"),
    "res gated edges": lambda: Conv(gnn.ResGatedGraphConv(W, W, edge_dim=EDGE), "features"),
    "general edges": lambda: Conv(gnn.GeneralConv(W, W, EDGE, attention=True, heads=2), "features"),
    "rgat": lambda: Op(_relational, conv=gnn.RGATConv(W, W // 2, KINDS, heads=2, edge_dim=EDGE)),
    "fa": lambda: Op(lambda m, x, g: m["conv"](x, x.tanh(), g.edges), conv=gnn.FAConv(W)),
    "eg": lambda: Conv(gnn.EGConv(W, W, ["sum", "max", "std"], num_heads=4)),
    "directed": lambda: Conv(gnn.DirGNNConv(gnn.SAGEConv(W, W))),
    "pdn": lambda: Conv(gnn.PDNConv(W, W, EDGE, W), "features"),
    "point transformer": lambda: Op(_point_transformer, conv=gnn.PointTransformerConv(W, W, _mlp(3, W), _mlp(W, W))),
    "cfconv": lambda: Op(_continuous_filter, into=nn.Linear(W, W), filter=_mlp(EDGE, W), out=nn.Linear(W, W)),
}  # fmt: skip


def _point(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    return m["conv"](x, x[:, :3], g.edges)


def _relational(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    return m["conv"](x, g.edges, g.kinds, g.features)


def _point_transformer(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    return m["conv"](x, x[:, :3], g.edges)


def _continuous_filter(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    messages = m["into"](x)[g.edges[0]] * m["filter"](g.features)
    return m["out"](x.new_zeros(x.shape).index_add(0, g.edges[1], messages))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: Op(lambda m, x, g: m["n"](x), n=nn.BatchNorm1d(W)),
    "batch norm, no affine": lambda: Op(lambda m, x, g: m["n"](x), n=nn.BatchNorm1d(W, affine=False)),
    "layer norm": lambda: Op(lambda m, x, g: m["n"](x), n=nn.LayerNorm(W)),
    "group norm": lambda: Op(lambda m, x, g: m["n"](x), n=nn.GroupNorm(4, W)),
    "rms norm": lambda: Op(lambda m, x, g: m["n"](x), n=nn.RMSNorm(W)),
    "instance norm": lambda: Op(lambda m, x, g: m["n"](x, g.batch, GRAPHS), n=gnn.InstanceNorm(W, affine=True)),
    "graph norm": lambda: Op(lambda m, x, g: m["n"](x, g.batch, GRAPHS), n=gnn.GraphNorm(W)),
    "graph layer norm": lambda: Op(lambda m, x, g: m["n"](x, g.batch, GRAPHS), n=gnn.LayerNorm(W)),
    "pair norm": lambda: Op(lambda m, x, g: m["n"](x), n=gnn.PairNorm()),
    "mean subtraction": lambda: Op(lambda m, x, g: m["n"](x, g.batch, GRAPHS), n=gnn.MeanSubtractionNorm()),
}

POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "elu": F.elu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "softplus": F.softplus, "leaky relu": F.leaky_relu, "mish": F.mish, "hardswish": F.hardswish, "celu": F.celu,
    "log sigmoid": F.logsigmoid, "tanh gelu": lambda x: F.gelu(x, approximate="tanh"), "relu6": F.relu6,
    "softmax": lambda x: x.softmax(-1), "log softmax": lambda x: x.log_softmax(-1), "sin": torch.sin,
    "square": lambda x: 0.3 * x.square(), "cube": lambda x: 0.1 * x.clamp(-3, 3) ** 3, "abs": torch.abs,
    "exp": lambda x: x.clamp(max=2).exp(), "log": lambda x: x.abs().add(0.1).log(), "softsign": F.softsign,
    "sqrt": lambda x: x.abs().add(0.1).sqrt(), "reciprocal": lambda x: 1 / (1 + x.abs()),
    "normalize": lambda x: F.normalize(x, dim=-1), "clamp": lambda x: x.clamp(-1, 1),
    "atan2": lambda x: torch.atan2(x, 1 + x.square()), "hypot": lambda x: (x.square() + 1).sqrt(),
    "where": lambda x: torch.where(x > 0.2, x, x.square()), "squared relu": lambda x: F.relu(x).square(),
    "inplace": lambda x: x.clone().mul_(0.5).add_(x).relu_(), "bf16 round trip": lambda x: x.bfloat16().to(x.dtype),
}  # fmt: skip


def _op(function: Callable[..., Tensor], **sizes: tuple[int, int]) -> Callable[[], nn.Module]:
    return lambda: Op(function, **{name: nn.Linear(i, o) for name, (i, o) in sizes.items()})


def _gate(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    value, gate = m["both"](x).chunk(2, -1)
    return value * gate.sigmoid()


def _towers(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    heads = m["lin"](x).view(-1, 4, W // 4)
    return torch.cat([heads[:, i].tanh() * (i + 1) for i in range(4)], -1)


def _strided(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    h = m["lin"](x)
    return torch.cat([h[:, ::2] * h[:, 1::2], h[:, : W // 2].sin()], -1)


def _turned(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    return (m["lin"](x).t().contiguous() + 1).sin().t() * x


def _grouped(x: Tensor, size: int = 8) -> tuple[Tensor, Tensor]:
    """Rows in groups of `size` [groups, size, width], filled up, and what is filling [groups, size]."""
    missing = -x.shape[0] % size
    filled = F.pad(x, (0, 0, 0, missing)).view(-1, size, x.shape[-1])
    filling = torch.arange(filled.shape[0] * size, device=x.device).view(-1, size) >= x.shape[0]
    return filled, filling


def _attention(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    h, filling = _grouped(x)
    out = m["attention"](h, h, h, key_padding_mask=filling, need_weights=False)[0]
    return out.reshape(-1, W)[: x.shape[0]]


def _dot_product(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    h, filling = _grouped(x)
    q, k, v = (t.view(*t.shape[:2], 2, W // 2).transpose(1, 2) for t in m["qkv"](h).chunk(3, -1))
    mask = torch.zeros_like(filling, dtype=x.dtype).masked_fill(filling, float("-inf"))[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, 2, h.shape[1], -1))
    return m["out"](out.transpose(1, 2).reshape(h.shape)).reshape(-1, W)[: x.shape[0]]


def _scores(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    h, filling = _grouped(x)
    scores = (m["q"](h) @ m["k"](h).transpose(1, 2)) / 4
    weights = scores.masked_fill(filling[:, None], float("-inf")).softmax(-1)
    return (weights @ m["v"](h)).reshape(-1, W)[: x.shape[0]]


def _edge_softmax(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    h = m["lin"](x)
    score = (h[g.edges[0]] * x[g.edges[1]]).sum(-1)
    weight = softmax(score, g.edges[1], num_nodes=x.shape[0])
    return scatter(h[g.edges[0]] * weight[:, None], g.edges[1], dim=0, dim_size=x.shape[0])


def _empty_maximum(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    h = m["lin"](x)
    index = g.edges[1][:, None].expand(-1, W)
    most = torch.full_like(h, float("-inf")).scatter_reduce(0, index, h[g.edges[0]], "amax")
    return torch.where(most.isinf(), 0.0, most).sin()


def _mean_by_degree(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    count = degree(g.edges[1], x.shape[0], torch.long).clamp(min=1)
    return torch.zeros_like(x).index_add(0, g.edges[1], m["lin"](x).tanh()[g.edges[0]]) / count[:, None]


def _pool(reduce: str) -> Callable[..., Tensor]:
    def pooled(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
        return x + m["lin"](scatter(x, g.batch, dim=0, dim_size=GRAPHS, reduce=reduce)).tanh()[g.batch]

    return pooled


def _outer(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    return torch.einsum("ni,nj->nij", m["lin"](x), x.tanh()).sum(1) / W


def _order(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    return m["lin"](x).sort(dim=-1).values + x.roll(1, 0)


def _logsumexp(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    return m["lin"](x).masked_fill(x > 0.5, float("-inf")).logsumexp(-1, keepdim=True).clamp(min=-9) + x


def _distance(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    h = m["lin"](x)
    length = ((h[g.edges[0]] - h[g.edges[1]]).square().sum(-1) + 1e-3).sqrt()
    return torch.zeros_like(x).index_add(0, g.edges[1], h[g.edges[0]] * torch.exp(-length)[:, None])


def _wide(x: Tensor) -> Tensor:
    """In a dtype that has complex numbers."""
    return x.float() if x.dtype is torch.bfloat16 else x


def _filtered(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    """A global filter network, or FNet: products of frequencies."""
    frequencies = torch.fft.rfft(_wide(m["lin"](x)), norm="ortho") * torch.view_as_complex(_wide(m["filter"].weight))
    return torch.fft.irfft(frequencies, n=W, norm="ortho").to(x.dtype)


def _turned_by_relations(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    """RotatE: how far entities, turned by a relation, are from others."""
    real, imaginary, angle = _wide(m["lin"](x)).chunk(3, -1)
    entity = torch.complex(real, imaginary)
    turned = entity * torch.polar(torch.ones_like(angle), angle)
    away = (turned[g.edges[0]] - entity[g.edges[1]]).abs().clamp(min=1e-3).to(x.dtype)
    return x + scatter(away, g.edges[1], dim=0, dim_size=x.shape[0], reduce="mean")


def _over_layers(m: nn.ModuleDict, x: Tensor, g: Graph) -> Tensor:
    """JumpingKnowledge: attention over layers, scored by an LSTM in both directions."""
    layers = torch.stack([x, m["lin"](x).tanh(), x.sin()], 1)
    scores = m["score"](m["cell"](layers)[0]).squeeze(-1).softmax(-1)
    return (layers * scores[..., None]).sum(1)


OPS: dict[str, Callable[[], nn.Module]] = {
    "linear": _op(lambda m, x, g: m["lin"](x), lin=(W, W)),
    "two layers": _op(lambda m, x, g: m["b"](m["a"](x).relu()), a=(W, 2 * W), b=(2 * W, W)),
    "chunk gate": _op(_gate, both=(W, 2 * W)),
    "glu": _op(lambda m, x, g: F.glu(m["both"](x)), both=(W, 2 * W)),
    "select towers": _op(_towers, lin=(W, W)),
    "strided": _op(_strided, lin=(W, W)),
    "turned": _op(_turned, lin=(W, W)),
    "attention": lambda: Op(_attention, attention=nn.MultiheadAttention(W, 2, batch_first=True)),
    "dot product": _op(_dot_product, qkv=(W, 3 * W), out=(W, W)),
    "masked scores": _op(_scores, q=(W, W), k=(W, W), v=(W, W)),
    "edge softmax": _op(_edge_softmax, lin=(W, W)),
    "empty maximum": _op(_empty_maximum, lin=(W, W)),
    "mean by degree": _op(_mean_by_degree, lin=(W, W)),
    "mean pool": _op(_pool("mean"), lin=(W, W)),
    "max pool": _op(_pool("max"), lin=(W, W)),
    "sum pool": _op(_pool("sum"), lin=(W, W)),
    "outer product": _op(_outer, lin=(W, W)),
    "sort and roll": _op(_order, lin=(W, W)),
    "masked logsumexp": _op(_logsumexp, lin=(W, W)),
    "distances": _op(_distance, lin=(W, W)),
    "bilinear": lambda: Op(lambda m, x, g: m["b"](x, x.sigmoid()), b=nn.Bilinear(W, W, W)),
    "gru cell": lambda: Op(lambda m, x, g: m["c"](x.tanh(), x), c=nn.GRUCell(W, W)),
    "convolution": lambda: Op(lambda m, x, g: m["c"](x[:, None]).mean(1), c=nn.Conv1d(1, 4, 3, padding=1)),
    "embedding": lambda: Op(lambda m, x, g: x * m["e"](g.batch), e=nn.Embedding(GRAPHS, W)),
    "prelu": lambda: Op(lambda m, x, g: m["p"](x), p=nn.PReLU(W)),
    "dropout": lambda: Op(lambda m, x, g: m["d"](x), d=nn.Dropout(0.3)),
    "cumulative": _op(lambda m, x, g: m["lin"](x).tanh().cumsum(-1) / 4, lin=(W, W)),
    "max over features": _op(lambda m, x, g: x - m["lin"](x).max(-1, keepdim=True).values, lin=(W, W)),
    "variance": _op(lambda m, x, g: x / (m["lin"](x).var(-1, keepdim=True) + 0.5).sqrt(), lin=(W, W)),
    "jumping": _op(lambda m, x, g: torch.stack([x, m["lin"](x)], -1).max(-1).values, lin=(W, W)),
    "shift by mean": _op(lambda m, x, g: m["lin"](x) * (x - x.mean(0)), lin=(W, W)),
    "film by mean": _op(lambda m, x, g: x * m["lin"](x.mean(0)).sigmoid(), lin=(W, W)),
    "filter of frequencies": lambda: Op(_filtered, lin=nn.Linear(W, W), filter=nn.Embedding(W // 2 + 1, 2)),
    "relations that turn": _op(_turned_by_relations, lin=(W, 3 * W)),
    "lstm over layers": lambda: Op(
        _over_layers,
        lin=nn.Linear(W, W),
        cell=nn.LSTM(W, W // 2, batch_first=True, bidirectional=True),
        score=nn.Linear(W, 1),
    ),
    "gru over rows": lambda: Op(
        lambda m, x, g: m["c"](x.view(-1, 4, W // 4))[0].reshape(x.shape), c=nn.GRU(W // 4, W // 4, batch_first=True)
    ),
    "gram": _op(lambda m, x, g: x @ (m["lin"](x).t() @ x) / (x.shape[0] + 1), lin=(W, W)),
}  # fmt: skip

LEAVES: dict[str, Callable[[], nn.Module]] = {
    **CONVS,
    **NORMS,
    **{name: lambda f=f: Op(lambda m, x, g: f(x)) for name, f in POINTWISE.items()},
    **OPS,
    **{
        name: lambda f=f, parts=parts: Op(f, **{part: make() for part, make in parts.items()})
        for name, (f, parts) in ROUNDS.items()
    },
}


class Combined(nn.Module):
    """Blocks put together; `function` takes the blocks' forwards as functions, `x` and `g`."""

    def __init__(self, function: Callable[..., Tensor], blocks: list[nn.Module]) -> None:
        super().__init__()
        self.function, self.blocks = function, nn.ModuleList(blocks)

    def forward(self, x: Tensor, g: Graph) -> Tensor:
        return self.function(*self.blocks, x, g)


def _autocast(a: nn.Module, x: Tensor, g: Graph) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return a(x, g).to(x.dtype)


COMBINED: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "residual": (1, lambda a, x, g: x + a(x, g)),
    "twice": (1, lambda a, x, g: a(a(x, g).tanh(), g)),
    "checkpoint": (1, lambda a, x, g: checkpoint(a, x, g, use_reentrant=False)),
    "autocast": (1, _autocast),
    "then": (2, lambda a, b, x, g: b(a(x, g), g)),
    "product": (2, lambda a, b, x, g: a(x, g) * b(x, g)),
    "gate": (2, lambda a, b, x, g: a(x, g) * b(x, g).sigmoid()),
    "quotient": (2, lambda a, b, x, g: a(x, g) / (F.softplus(b(x, g)) + 0.3)),
    "sum": (2, lambda a, b, x, g: a(x, g) + b(x, g)),
    "larger": (2, lambda a, b, x, g: torch.maximum(a(x, g), b(x, g))),
    "mixture": (2, lambda a, b, x, g: torch.lerp(a(x, g), b(x, g), x.mean(-1, keepdim=True).sigmoid())),
    "halves": (2, lambda a, b, x, g: torch.cat([a(x, g)[:, : W // 2], b(x, g)[:, W // 2 :]], -1)),
}
