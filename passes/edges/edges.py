"""`edges`: message passing on the joint graph becomes ops that hold nothing of [edges, features].

PyG's layers take rows of nodes for every edge, compute on them, and add them up. Autograd does the same in the other
direction. In the graph of both, before torch cuts it, every such region becomes one op that goes over the edges grouped
by node (`actcompile.kernels.edges`). It reads node rows and leaves node rows, so those are what the cut can choose
from: what is saved for backward has a row for each node, and where backward needs a message or an attention weight, its
region computes it again.

A comparison of forward's values in backward (which neighbour was the largest, where a ReLU was at work) is taken in
forward, where the values are exact, and handed on as a mask.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from ..graph import _torch
from ..graph.split import Split
from .find import Count, Finder, Sums
from .rows import width
from .write import Writer

ops = torch.ops.actcompile
BY = {ops.edges.default: 1, ops.aggregate.default: 4, ops.degree.default: 0}  # where the index is that groups edges


@dataclass(frozen=True)
class Fused:
    """A region that became one op, or the reason why it did not.

    end: name of the node that it ended with; the op's result has it now.
    inside: names of the nodes that it computes.
    nbytes: bytes of the largest tensor of a row for each edge that is not made any more, or still is.
    """

    end: str
    inside: tuple[str, ...]
    nbytes: int
    reason: str = ""


def edges(joint: fx.Graph, num_fwd_outputs: int, parameters: Collection[str]) -> list[Fused]:
    """Fuses the message passing of a joint graph, on the CPU and on CUDA, in place.

    Args:
        num_fwd_outputs: number of the graph's outputs that forward returns.
        parameters: names of the inputs that live from step to step.
    """
    finder = Finder(joint, num_fwd_outputs, parameters)
    found = finder.find()
    fused = [Fused(node.name, (), _nbytes(node), reason) for node, reason in finder.refused]
    for node, made in found.items():
        if isinstance(made, Count):
            continue
        inside = [made.reduction.value] if isinstance(made, Sums) else made.inside
        fused.append(Fused(node.name, tuple(n.name for n in inside), max(map(_nbytes, inside), default=0)))
    Writer(finder).write(found)
    return fused


def inputs_grouped(split: Split) -> list[fx.Node]:
    """The inputs of forward whose edges are grouped by node at the first step, which is remembered for the next."""
    origin = split.origin()
    calls = (n for n in (*split.forward.graph.nodes, *split.backward.graph.nodes) if n.target in BY and not n.args[-1])
    edges = [call.args[BY[call.target]] for call in calls]
    return [n for n in dict.fromkeys(origin.get(by, by) for by in edges) if n.op == "placeholder"]


def _nbytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return _torch.size_hint(value.shape[0]) * width(node) * value.dtype.itemsize if value.dim() else 0
