"""Message passing as people write it: a message drawn as an expression of both ends and the edge, added up by node.

A `Message` is data: an expression, which edges it runs over, how it is added up, and by what functions that is
written. So it can be printed, drawn from an integer, and shrunk.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import degree, scatter, softmax

WIDTH, EDGE, KINDS, GRAPHS = 16, 5, 3, 4


class Graph(NamedTuple):
    """edges [2, E], features of edges [E, EDGE], kinds of edges [E] below KINDS, the graph of each node [N], sorted;
    other edges [2, E // 2], int32."""

    edges: Tensor
    features: Tensor
    kinds: Tensor
    batch: Tensor
    others: Tensor


Edges = tuple[Tensor, Tensor, Tensor]
"""Of the edges that a message runs over: source [E], target [E], and features [E, EDGE]."""


def _kept(g: Graph) -> Edges:
    kept = g.kinds == 0
    return *g.edges[:, kept], g.features[kept]


def _with_loops(g: Graph) -> Edges:
    loops = torch.arange(g.batch.shape[0])
    features = torch.cat([g.features, g.features.new_ones(loops.shape[0], EDGE)])
    return torch.cat([g.edges[0], loops]), torch.cat([g.edges[1], loops]), features


def _of_others(g: Graph) -> Edges:
    return *g.others, g.features[: g.others.shape[1]]


EDGES: dict[str, Callable[[Graph], Edges]] = {
    "edges": lambda g: (*g.edges, g.features),
    "reversed": lambda g: (*g.edges.flip(0), g.features),
    "every other": lambda g: (*g.edges[:, ::2], g.features[::2]),
    "of a kind": _kept,
    "with loops": _with_loops,
    "int32": _of_others,
    "int32 here": lambda g: (*g.edges.int(), g.features),
    "from graphs": lambda g: (g.batch, torch.arange(g.batch.shape[0]), g.batch[:, None] * torch.ones(EDGE) / GRAPHS),
}

LEAVES = ("source", "target", "same source", "edge", "weight", "score", "attention", "degree", "row", "heads", "graph")
LEAVES += ("largest", "number", "distance", "kind")
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "leaky relu": lambda x: F.leaky_relu(x, 0.2), "elu": F.elu, "gelu": F.gelu, "silu": F.silu,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "softplus": F.softplus, "abs": torch.abs, "neg": torch.neg,
    "exp": lambda x: x.clamp(max=1).exp(), "square": lambda x: 0.3 * x.square(), "clamp": lambda x: x.clamp(-1, 1),
    "sqrt": lambda x: (x.abs() + 0.1).sqrt(), "log": lambda x: (x.abs() + 0.5).log(), "sin": torch.sin,
    "reciprocal": lambda x: 1 / (1 + x.abs()), "where": lambda x: torch.where(x > 0.2, x, x.square()),
    "normalize": lambda x: F.normalize(x + 0.5, dim=-1), "softmax": lambda x: x.softmax(-1),
    "mean of columns": lambda x: x.mean(-1, keepdim=True), "sum of columns": lambda x: x.sum(-1, keepdim=True) / 4,
    "flat": lambda x: x.reshape(-1).tanh().reshape(x.shape), "bfloat16": lambda x: x.bfloat16().to(x.dtype),
    "dropout": lambda x: F.dropout(x, 0.3), "turned": lambda x: torch.cat([x[..., 1:], x[..., :1]], -1),
    "columns": lambda x: F.pad(x[..., x.shape[-1] // 4 :][..., : x.shape[-1] // 2], (0, (x.shape[-1] + 1) // 2)),
}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "maximum": torch.maximum, "minimum": torch.minimum,
    "divided": lambda a, b: a / (1 + b.abs()), "gated": lambda a, b: a * b.sigmoid(),
    "greater": lambda a, b: torch.where(a > b, a, 0.5 * b), "distance": lambda a, b: (a - b).square(),
}  # fmt: skip


class Gates(nn.Module):
    """Two halves of what a layer makes, one of them the gate of the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both = nn.Linear(width, 2 * WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        value, gate = self.both(rows).chunk(2, -1)
        return value * gate.sigmoid()


def _mlp(width: int, hidden: int, out: int, activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), activation, nn.Linear(hidden, out))


PRODUCTS: dict[str, tuple[int, Callable[[], nn.Module]]] = {  # -> how many rows stand side by side, of all columns
    "linear": (1, lambda: nn.Linear(WIDTH, WIDTH)),
    "unbiased": (1, lambda: nn.Linear(WIDTH, WIDTH, bias=False)),
    "joined": (2, lambda: nn.Linear(2 * WIDTH, WIDTH)),
    "joined, unbiased": (2, lambda: nn.Linear(2 * WIDTH, WIDTH, bias=False)),
    "three": (3, lambda: nn.Linear(3 * WIDTH, WIDTH)),
    "mlp": (2, lambda: _mlp(2 * WIDTH, 20, WIDTH, nn.ReLU())),
    "smooth mlp": (1, lambda: _mlp(WIDTH, 2 * WIDTH, WIDTH, nn.SiLU())),
    "score of rows": (2, lambda: _mlp(2 * WIDTH, 7, 1, nn.LeakyReLU(0.2))),
    "gates": (2, lambda: Gates(2 * WIDTH)),
    "wide": (1, lambda: nn.Sequential(nn.Linear(WIDTH, 1100), nn.Tanh(), nn.Linear(1100, WIDTH))),
    "layer norm": (1, lambda: nn.LayerNorm(WIDTH)),
    "batch norm": (1, lambda: nn.BatchNorm1d(WIDTH)),
    "mlp, layer norm": (3, lambda: nn.Sequential(_mlp(3 * WIDTH, WIDTH, WIDTH, nn.ReLU()), nn.LayerNorm(WIDTH))),
}


def _add(message: Tensor, by: Tensor, nodes: int) -> Tensor:
    return message.new_zeros(nodes, *message.shape[1:]).index_add(0, by, message)


def _put(message: Tensor, by: Tensor, nodes: int) -> Tensor:
    return message.new_zeros(nodes, *message.shape[1:]).index_put((by,), message, accumulate=True)


def _extremum(name: str, included: bool) -> Callable[[Tensor, Tensor, int], Tensor]:
    def reduced(message: Tensor, by: Tensor, nodes: int) -> Tensor:
        index = by.long().view(-1, *[1] * (message.dim() - 1)).expand_as(message)
        start = message.new_full((nodes, *message.shape[1:]), 0.1)
        return start.scatter_reduce(0, index, message, name, include_self=included)

    return reduced


def _scattered(reduce: str) -> Callable[[Tensor, Tensor, int], Tensor]:
    return lambda message, by, nodes: scatter(message, by.long(), 0, nodes, reduce=reduce)


def _deviation(message: Tensor, by: Tensor, nodes: int) -> Tensor:
    mean, squares = (scatter(m, by.long(), 0, nodes, reduce="mean") for m in (message, message * message))
    return ((squares - mean * mean).clamp(min=1e-2)).sqrt()


def _weighed(message: Tensor, by: Tensor, nodes: int) -> Tensor:
    return _add(softmax(message, by.long(), num_nodes=nodes) * message, by, nodes)


def _propagated(reduce: str) -> Callable[[Tensor, Tensor, int], Tensor]:
    aggregation = MessagePassing(aggr=reduce).aggr_module
    return lambda message, by, nodes: aggregation(message, by.long(), dim_size=nodes, dim=0)


REDUCE: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "index_add": _add, "index_put": _put, "amax": _extremum("amax", False), "amin": _extremum("amin", False),
    "amax or 0.1": _extremum("amax", True), "deviation": _deviation, "softmax": _weighed,
    **{f"scatter {name}": _scattered(name) for name in ("sum", "mean", "max", "min", "mul")},
    **{f"pyg {name}": _propagated(name) for name in ("sum", "mean", "max", "min", "std", "median")},
}  # fmt: skip


@dataclass(frozen=True)
class Expression:
    """A leaf by its name, or an op of `UNARY`, `BINARY` or `PRODUCTS` with its arguments."""

    name: str
    arguments: tuple[Expression, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.arguments))})" if self.arguments else self.name

    def products(self) -> list[str]:
        """The names of the products in it, each once."""
        inside = [name for argument in self.arguments for name in argument.products()]
        return list(dict.fromkeys([*inside, *([self.name] if self.name in PRODUCTS else [])]))

    def smaller(self) -> Iterator[Expression]:
        yield from self.arguments
        for i, argument in enumerate(self.arguments):
            for less in argument.smaller():
                yield replace(self, arguments=(*self.arguments[:i], less, *self.arguments[i + 1 :]))


@dataclass(frozen=True)
class Message:
    """What is computed for each edge, [E, heads, WIDTH // heads], which edges, and how it is added up by target.

    heads: 0 for [E, WIDTH].
    """

    expression: Expression
    edges: str
    reduce: str
    heads: int

    def __str__(self) -> str:
        return f"{self.reduce}[{self.expression} over {self.edges}, {self.heads} heads]"

    def smaller(self) -> Iterator[Message]:
        for less in self.expression.smaller():
            yield replace(self, expression=less)
        for name, value in {"edges": "edges", "reduce": "index_add", "heads": 0}.items():
            if getattr(self, name) != value:
                yield replace(self, **{name: value})


def draw_message(r: random.Random) -> Message:
    edges = r.choices(list(EDGES), (8, 2, 1, 1, 2, 1, 1, 1))[0]
    return Message(_expression(r), edges, r.choice(list(REDUCE)), r.choice((0, 0, 1, 2, 4, WIDTH)))


def _expression(r: random.Random, depth: int = 0) -> Expression:
    kind = r.choices(("leaf", "unary", "binary"), ((1, 4, 8), (3, 3, 4), (4, 2, 2), (1, 0, 0))[depth])[0]
    if kind == "leaf":
        return Expression(r.choices(LEAVES, (5, 4, 1, *[1] * (len(LEAVES) - 3)))[0])
    if kind == "unary":
        name = _product(r, (1,)) if r.random() < 0.35 else r.choice(list(UNARY))
        return Expression(name, (_expression(r, depth + 1),))
    name = _product(r, (2, 3)) if r.random() < 0.35 else r.choice(list(BINARY))
    count = PRODUCTS[name][0] if name in PRODUCTS else 2
    return Expression(name, tuple(_expression(r, depth + 1) for _ in range(count)))


def _product(r: random.Random, counts: tuple[int, ...]) -> str:
    return r.choice([name for name, (count, _) in PRODUCTS.items() if count in counts])


class Messages(nn.Module):
    """The module of a message: a linear layer for either end, the message, its sum, and a linear layer.

    Products in the message share their weights.
    """

    def __init__(self, message: Message) -> None:
        super().__init__()
        self.made, self.heads = message, max(message.heads, 1)
        size = (message.heads, WIDTH // message.heads) if message.heads else (WIDTH,)
        self.size = size
        self.source, self.target, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.edge, self.row = nn.Linear(EDGE, WIDTH), nn.Parameter(torch.randn(1, *size))
        self.each = nn.Parameter(torch.randn(*size[:-1], 1))
        self.kind = nn.Embedding(KINDS, WIDTH)
        self.products = nn.ModuleDict({name: PRODUCTS[name][1]() for name in message.expression.products()})

    def forward(self, x: Tensor, g: Graph) -> Tensor:
        source, target, features = EDGES[self.made.edges](g)
        count = x.shape[0]
        ends = self.source(x).view(-1, *self.size), self.target(x).view(-1, *self.size)
        edge = self.edge(features.to(x.dtype)).view(-1, *self.size)

        def score() -> Tensor:
            return (ends[0][source] * ends[1][target]).sum(-1, keepdim=True) / 4

        def distance() -> Tensor:
            apart = (x[:, :3][source] - x[:, :3][target]).square().sum(-1, keepdim=True)
            centres = torch.linspace(0, 3, WIDTH, dtype=x.dtype)
            return (-((apart + 1e-2).sqrt() - centres).square()).exp().view(-1, *self.size)

        def column(t: Tensor) -> Tensor:
            return t.view(-1, *[1] * len(self.size))

        def largest() -> Tensor:
            index = target.long().view(-1, *[1] * len(self.size)).expand(-1, *self.size)
            start = torch.zeros_like(ends[0])
            return start.scatter_reduce(0, index, ends[0][source], "amax", include_self=False)[target]

        leaves: dict[str, Callable[[], Tensor]] = {
            "source": lambda: ends[0][source],
            "target": lambda: ends[1].index_select(0, target),
            "same source": lambda: ends[1][source],
            "edge": lambda: edge,
            "weight": lambda: column(features[:, 0].to(x.dtype)),
            "score": score,
            "attention": lambda: softmax(F.leaky_relu(score()), target.long(), num_nodes=count),
            "degree": lambda: column((degree(target.long(), count, x.dtype) + 1).rsqrt()[source]),
            "row": lambda: self.row,
            "heads": lambda: self.each,
            "graph": lambda: _add(ends[1], g.batch, GRAPHS)[g.batch[source]] / 8,
            "largest": largest,
            "number": lambda: x.new_full((), 0.7),
            "distance": distance,
            "kind": lambda: self.kind((features[:, 1] * KINDS).long().clamp(max=KINDS - 1)).view(-1, *self.size),
        }

        def value(e: Expression) -> Tensor:
            if not e.arguments:
                return leaves[e.name]()
            arguments = list(map(value, e.arguments))
            if e.name in PRODUCTS:
                rows = [a.expand(source.shape[0], *self.size).reshape(-1, WIDTH) for a in arguments]
                made: Tensor = self.products[e.name](torch.cat(rows, -1) if len(rows) > 1 else rows[0])
                return made.view(-1, *self.size) if made.shape[1] == WIDTH else column(made)
            function: Callable[..., Tensor] = UNARY.get(e.name) or BINARY[e.name]
            return function(*arguments)

        message = value(self.made.expression).expand(source.shape[0], *self.size)
        summed = REDUCE[self.made.reduce](message, target, count)
        return self.out(summed.reshape(-1, WIDTH)) + x
