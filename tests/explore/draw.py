"""Draws a case, a model with its batch, from one integer; the same one whenever it is asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.explore.blocks import COMBINED, CONVS, LEAVES, NORMS, OPS, POINTWISE, Combined
from tests.explore.messages import EDGE, GRAPHS, KINDS, WIDTH, Graph, Message, Messages, draw_message
from tests.explore.rounds import ROUNDS

GRAPH_KINDS = ("random", "no edges", "hub", "duplicates", "isolated", "self-loops", "one node")


@dataclass(frozen=True)
class Block:
    """A leaf by its name, a message, or a combination of other blocks. `seed` draws its weights, whatever stands by."""

    name: str
    seed: int
    inside: tuple[Block, ...] = ()
    message: Message | None = None

    def __str__(self) -> str:
        if self.message is not None:
            return str(self.message)
        return f"{self.name}({', '.join(map(str, self.inside))})" if self.inside else self.name

    def make(self) -> nn.Module:
        if self.inside:
            return Combined(COMBINED[self.name][1], [block.make() for block in self.inside])
        torch.manual_seed(self.seed)
        module = LEAVES[self.name]() if self.message is None else Messages(self.message)
        for parameter in module.parameters():
            if parameter.dim() == 1 < parameter.numel():  # biases of zero and norm weights of one hide errors
                nn.init.normal_(parameter, mean=0.5, std=0.5)
        return module

    def smaller(self) -> Iterator[Block]:
        """What is left with one block less, or a smaller message."""
        if self.message is not None:
            yield from (replace(self, message=less) for less in self.message.smaller())
        yield from self.inside
        for i, block in enumerate(self.inside):
            for less in block.smaller():
                yield replace(self, inside=(*self.inside[:i], less, *self.inside[i + 1 :]))


@dataclass(frozen=True)
class Case:
    """A model, a batch, and how it is compressed.

    Attributes:
        blocks: applied one after another to the encoder's result.
        head: "nodes" for an output per node, "graphs" for one per graph, "both" for two outputs, one of them a hidden
            layer that the model returns as it is.
        loss: "squares", "classes" or "projection".
        training: train or eval mode.
        frozen: parameters without gradient, one in three.
        input_gradient: whether the features require a gradient.
        way: "compress", "backend" (`torch.compile(model, backend=...)`) or "function".
        dynamic: as in `torch.compile`.
        changing: whether a batch of other sizes runs first.
        dtype: of the model and of its features: "float32", "float64" or "bfloat16".
        kernels: whether fused message passing runs compiled, which takes seconds, or by its reference.
        options: fields of `Config`.
    """

    seed: int
    blocks: tuple[Block, ...]
    nodes: int
    edges: int
    graph: str
    head: str
    loss: str
    training: bool
    frozen: bool
    input_gradient: bool
    way: str
    dynamic: bool | None
    changing: bool
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    kernels: bool = True

    @property
    def rounds(self) -> bool:
        return self.options.get("bits", 2) is not None and self.dtype != "float64"

    @property
    def random(self) -> bool:
        """Whether the model draws random numbers."""
        return "dropout" in str(self)

    def __str__(self) -> str:
        blocks = " | ".join(map(str, self.blocks)) or "(nothing)"
        rest = {k: v for k, v in asdict(self).items() if k != "blocks"}
        return f"{blocks}\n    " + ", ".join(f"{k}={v!r}" for k, v in rest.items())

    def smaller(self) -> Iterator[Case]:
        for i in range(len(self.blocks)):
            yield replace(self, blocks=(*self.blocks[:i], *self.blocks[i + 1 :]))
        for i, block in enumerate(self.blocks):
            for less in block.smaller():
                yield replace(self, blocks=(*self.blocks[:i], less, *self.blocks[i + 1 :]))
        plain = {
            "dtype": "float32",
            "head": "nodes",
            "frozen": False,
            "input_gradient": False,
            "way": "compress",
            "dynamic": False,
        }
        for name, value in {**plain, "changing": False, "graph": "random", "loss": "squares", "training": True}.items():
            if getattr(self, name) != value:
                yield replace(self, **{name: value})


def draw(seed: int, inner: str = "aot_eager") -> Case:
    """The case of a seed."""
    r = random.Random(seed)
    many = r.random() < 0.25
    kind = r.choices(GRAPH_KINDS, (8, 1, 1, 1, 2, 2, 0.5))[0]
    nodes = 1 if kind == "one node" else r.randint(1500, 2500) if many else r.choice((2, 7, 16, 33, 64, 100, 250, 500))
    edges = 0 if kind == "no edges" else r.randint(1, 4 * nodes)
    lossless = r.random() < 0.35
    options: dict[str, Any] = {"inner": inner, "min_bytes": r.choice((0, 0, 256))}
    if lossless:
        options |= {"bits": None, "nonlinear_bits": None}
    elif r.random() < 0.3:
        options |= r.choice(
            (
                {"bits": 4},
                {"bits": 8, "block": 256},
                {"block": 16},
                {"metadata": "float32"},
                {"standardise": False},
                {"projection": 4, "rows_per_block": 1},
                {"levels": "uniform"},
                {"bits": 1},
            )  # fmt: skip
        )
    options |= r.choice(({}, {}, {"replay": 0}, {"replay": 1.0}, {"rebuild": False, "replay": 0}))
    options |= r.choices(({}, {"fuse": False}), (9, 1))[0]
    return Case(
        seed=seed,
        blocks=tuple(_block(r) for _ in range(r.choices((1, 2, 3, 4), (8, 4, 1, 0.5))[0])),
        nodes=nodes,
        edges=edges,
        graph=kind,
        head=r.choices(("nodes", "graphs", "both"), (4, 1, 1))[0],
        loss=r.choice(("squares", "classes", "projection")),
        training=r.random() < 0.93,
        frozen=r.random() < 0.1,
        input_gradient=r.random() < 0.2,
        way=r.choices(("compress", "backend", "function"), (4, 1, 1))[0],
        dynamic=r.choices((None, False, True), (4, 1, 1))[0],
        changing=r.random() < 0.2,
        options=options,
        dtype=r.choices(("float32", "float64", "bfloat16"), (12, 7, 1))[0],
        kernels=r.random() < 0.4,
    )


def _block(r: random.Random, depth: int = 0) -> Block:
    if r.random() < (0.25, 0.15, 0.0)[depth]:
        name = r.choice(list(COMBINED))
        return Block(name, 0, tuple(_block(r, depth + 1) for _ in range(COMBINED[name][0])))
    leaves = r.choices((CONVS, NORMS, POINTWISE, OPS, ROUNDS, None), (5, 1, 1, 2, 4, 8))[0]
    if leaves is None:
        return Block("message", r.randrange(2**31), message=draw_message(r))
    return Block(r.choice(list(leaves)), r.randrange(2**31))


class Model(nn.Module):
    """Encoder, blocks, head."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(case.seed)
        self.encoder, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.kind = case.head
        self.blocks = nn.ModuleList(block.make() for block in case.blocks)
        if case.frozen:
            for parameter in list(self.parameters())[::3]:
                parameter.requires_grad_(False)
        self.train(case.training).to(getattr(torch, case.dtype))

    def forward(self, x: Tensor, *graph: Tensor) -> Any:
        g = Graph(*graph)
        hidden = x = self.encoder(x)
        for block in self.blocks:
            x = block(x, g)
        if self.kind == "graphs":
            x = x.new_zeros(GRAPHS, WIDTH).index_add(0, g.batch, x)
        return (self.head(x), hidden) if self.kind == "both" else self.head(x)


def batch(case: Case, again: int = 0) -> tuple[Tensor, ...]:
    """The inputs of the case's model; `again` draws others of other sizes."""
    generator = torch.Generator().manual_seed(case.seed + 7 * again)
    nodes = case.nodes if not again or case.graph == "one node" else max(2, case.nodes - again - case.nodes // 8)
    count = case.edges if not again else max(case.edges - again, 0)
    edges = torch.randint(0, nodes, (2, count), generator=generator)
    if case.graph == "hub":
        edges[1] = 0
    if case.graph == "duplicates" and count:
        edges = edges[:, torch.randint(0, max(count // 4, 1), (count,), generator=generator)]
    if case.graph == "isolated":
        edges = edges % max(nodes // 2, 1)
    if case.graph == "self-loops":
        edges[1, ::3] = edges[0, ::3]
    dtype = getattr(torch, case.dtype)
    return (
        torch.randn(nodes, WIDTH, generator=generator).to(dtype),
        edges,
        torch.rand(count, EDGE, generator=generator).to(dtype),
        torch.randint(0, KINDS, (count,), generator=generator),
        torch.arange(nodes) * GRAPHS // max(nodes, 1),
        torch.randint(0, nodes, (2, count // 2), generator=generator, dtype=torch.int32),
    )


def loss(case: Case, outputs: Any) -> Tensor:
    """The number that is differentiated; a function of all outputs."""
    total = None
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        generator = torch.Generator().manual_seed(case.seed)
        if case.loss == "classes":
            target = torch.randint(0, output.shape[1], (output.shape[0],), generator=generator)
            one = nn.functional.cross_entropy(output, target)
        elif case.loss == "squares":
            one = output.square().mean()
        else:
            weights = torch.randn(output.shape, generator=generator).to(output.dtype)
            one = (output * weights).mean()
        total = one if total is None else total + one
    return total
