"""Sums, maxima and products over neighbours by the ops of fused graphs, beside torch.compile's own: do they agree, what
do they take?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from actcompile.kernels import aggregate, edges, group_edges
from actcompile.kernels.edges.program import Operand, Output, Program, Step

HEADS = 4
WITHIN = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest element, against float64


@dataclass(frozen=True)
class Work:
    """One way of message passing. `plain` is what a model writes, in any dtype; `fused` is what it becomes."""

    name: str
    fused: Callable[[Tensor, Tensor, Tensor], Tensor]
    plain: Callable[[Tensor, Tensor, Tensor], Tensor]


def random_graph(nodes: int, count: int, device: str, hub: float = 0.0) -> Tensor:
    """Edges whose targets have degrees as a power law; a share of them all at one node."""
    generator = torch.Generator().manual_seed(0)
    source, target = torch.rand(2, count, generator=generator, dtype=torch.float64)
    target = (target**2 * nodes).long()
    target[: int(hub * count)] = nodes // 2
    return torch.stack([(source * nodes).long(), target[torch.randperm(count, generator=generator)]]).to(device)


def works(nodes: int) -> Iterator[Work]:
    """Sums of neighbours, plain and weighted, maxima, attention's sum, and the product that its gradient takes."""

    def by_target(x: Tensor, index: Tensor) -> Tensor:
        return index[1].view(-1, *(1,) * (x.dim() - 1)).expand_as(x)

    def add(messages: Tensor, index: Tensor) -> Tensor:
        zero = messages.new_zeros(nodes, *messages.shape[1:])
        return zero.scatter_add(0, by_target(messages, index), messages)

    def heads(x: Tensor) -> Tensor:
        return x.view(x.shape[0], HEADS, -1)

    def largest(x: Tensor, index: Tensor, _: Tensor) -> Tensor:
        messages = x[index[0]]
        zero = messages.new_zeros(nodes, x.shape[1])
        return zero.scatter_reduce(0, by_target(messages, index), messages, "amax", include_self=False)

    yield Work("sum", lambda x, e, _: aggregate(x, None, e, 0, e, 1, nodes, []), lambda x, e, _: add(x[e[0]], e))
    yield Work(
        "weighted sum",
        lambda x, e, w: aggregate(x, w[:, :1], e, 0, e, 1, nodes, []),
        lambda x, e, w: add(x[e[0]] * w[:, :1], e),
    )
    yield Work("max", lambda x, e, _: _run("max", "c", x, e, nodes), largest)
    yield Work(
        "attention",
        lambda x, e, w: _run("sum", "hc", x, e, nodes, w),
        lambda x, e, w: add(heads(x)[e[0]] * w.unsqueeze(2), e).flatten(1),
    )
    yield Work(
        "product",
        lambda x, e, _: _run("dot", "hc", x, e, nodes),
        lambda x, e, _: (heads(x)[e[0]] * heads(x)[e[1]]).sum(2),
    )


def _run(kind: str, level: str, x: Tensor, index: Tensor, nodes: int, weight: Tensor | None = None) -> Tensor:
    other = weight if weight is not None else x if kind == "dot" else None
    text = _program(kind, level, str(x.dtype)[6:], weight is not None)
    tensors = [x] if other is None else [x, other]
    heads = HEADS if "h" in level else 1
    return edges(text, index, 1, nodes, heads, x.shape[1] // heads, [index], [0], tensors, [])[0]


@lru_cache
def _program(kind: str, level: str, dtype: str, weighted: bool) -> str:
    operands: list[Operand] = [Operand("take", 0, level, dtype)]
    steps: tuple[Step, ...] = ()
    if weighted:
        operands.append(Operand("edge", -1, "h", dtype))
    elif kind == "dot":
        operands.append(Operand("take", -1, level, dtype))
    if len(operands) > 1:
        steps = (Step("mul", ("o0", "o1"), level),)
    output = Output(kind, "v0" if steps else "o0", "h" if kind == "dot" else level, dtype)
    return Program(tuple(operands), steps, (output,)).dump()


def compared(
    work: Work, given: tuple[Tensor, Tensor, Tensor], milliseconds: Callable[[Callable[[], object]], float]
) -> dict[str, Any]:
    """Times of both, and errors against the same in float64, relative to the largest element.

    Args:
        given: rows of nodes, edge_index, and `HEADS` numbers for each edge.
    """
    x, index, weight = given
    compiled = torch.compile(work.plain)
    ours, theirs = work.fused(x, index, weight), compiled(x, index, weight)
    exact = work.plain(x.double(), index, weight.double())
    errors = [float((y.double() - exact).abs().max() / exact.abs().max()) for y in (ours, theirs)]
    del exact
    again = torch.equal(ours, work.fused(x, index, weight))
    fused = milliseconds(lambda: work.fused(x, index, weight))
    plain = milliseconds(lambda: compiled(x, index, weight))
    return {
        "fused_ms": fused,
        "inductor_ms": plain,
        "speed": plain / fused,
        "error": errors[0],
        "inductor_error": errors[1],
        "correct": errors[0] <= WITHIN[x.dtype] and again,
    }


def grouping_time(index: Tensor, nodes: int, milliseconds: Callable[[Callable[[], object]], float]) -> float:
    """What grouping takes, once for each direction."""
    return milliseconds(lambda: group_edges(index, 1, nodes))
