"""`lifetimes`: what is alive when, over a step's forward and backward, keyed by memory rather than by value.

A step's positions are those of the forward graph's nodes and then those of the backward graph's. A value's memory lives
from the op that makes it to the last one that reads it, or one of its views; what is saved lives on into backward. The
user's outputs live on for the loss, and gradients from where they are made. Inputs, parameters and buffers are alive
anyway and count nothing, as nothing outside of the two graphs does.

A compiler that fuses makes no tensor of a pointwise result that only loops read; what such a loop reads has to live
until then instead. It writes a loop's result into an input that dies there and is as large.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..graph import _torch
from ..graph.find import own_nbytes
from ..graph.origin import module_path
from ..graph.split import Split, is_input, is_tensor, is_view, root, writes

aten, ops = torch.ops.aten, torch.ops.actcompile

LOOPS = (  # ours that Inductor makes loops of: see `codecs.lowerings`
    *(ops.narrow.default, ops.widen.default, ops.mask_to_bytes.default, ops.bytes_to_mask.default),
    ops.random_mask.default,
)
MOVES = (aten.cat.default, aten.index.Tensor, aten.gather.default, aten.constant_pad_nd.default, aten.embedding.default)
SUMS = (
    *(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.amax.default, aten.amin.default),
    *(aten.var_mean.correction, aten.var.correction, aten.any.default, aten.any.dim, aten.prod.default),
    *(aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim, aten._softmax.default),
    aten.index_put.default,
)


@dataclass(frozen=True)
class Lifetime:
    """The memory of one value, and of its views.

    Attributes:
        node: whose memory it is: a node of the forward graph, or of the backward graph where it is made there.
        nbytes: at the sizes of the trace.
        first, last: positions of the step between which it is alive, both included.
        forward_last, backward_first: of what is saved, where forward reads it last, and backward first; else None.
    """

    node: fx.Node
    nbytes: int
    first: int
    last: int
    forward_last: int | None = None
    backward_first: int | None = None

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def module(self) -> str:
        return module_path(self.node)

    @property
    def shape(self) -> tuple[str, ...]:
        return tuple(str(size) for size in self.node.meta["val"].shape)


def live_bytes(lifetimes: Iterable[Lifetime], positions: int) -> tuple[int, ...]:
    """Their sum at each position."""
    changes = [0] * (positions + 1)
    for memory in lifetimes:
        changes[memory.first] += memory.nbytes
        changes[memory.last + 1] -= memory.nbytes
    live, total = [], 0
    for change in changes[:-1]:
        total += change
        live.append(total)
    return tuple(live)


def lifetimes(split: Split, fuses: bool) -> list[Lifetime]:
    """The memory of everything that the two graphs make.

    Args:
        fuses: whether the graphs are compiled by Inductor, which fuses, or run op by op.
    """
    start = len(split.forward.graph.nodes)
    end = start + len(split.backward.graph.nodes) - 1
    outputs = {root(n) for n in split.user_outputs if isinstance(n, fx.Node)}
    saved: dict[fx.Node, list[fx.Node]] = {}
    for node, placeholder in split.pairs:
        if is_tensor(node):
            saved.setdefault(root(node), []).append(placeholder)
    inputs = [n for n in split.forward.graph.find_nodes(op="placeholder") if is_input(n)]
    forward = _memory(_Reads(split.forward.graph, 0, fuses), saved.keys() | outputs, inputs)
    reads = _Reads(split.backward.graph, start, fuses)
    gradients = {root(n) for n in split.backward.graph.output_node().all_input_nodes}
    backward = _memory(reads, gradients, [p for n, p in split.pairs if root(n) not in forward])
    for node, memory in forward.items():
        if node in saved:
            read = [reads.of(p)[0] for p in saved[node]]
            last = max(backward.pop(p).last for p in saved[node])
            forward[node] = replace(memory, forward_last=memory.last, backward_first=min(read), last=last)
    for made, kept in ((forward, outputs), (backward, gradients)):
        made |= {node: replace(made[node], last=end) for node in kept if node in made}
    theirs = {p for placeholders in saved.values() for p in placeholders}
    return [*forward.values(), *(m for n, m in backward.items() if n not in theirs)]


def is_loop(node: fx.Node) -> bool:
    """Whether Inductor makes a loop over elements of it, which it may fuse with others."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and (torch.Tag.pointwise in target.tags or target.namespace == "prims" or target in (*LOOPS, *MOVES))
        and not is_view(node)
        and not _torch.makes_sizes(node)  # a selection by a mask is a call
    )


class _Reads:
    """Where the values of a graph are read, by positions in the step."""

    def __init__(self, graph: fx.Graph, offset: int, fuses: bool) -> None:
        self.graph, self.fuses = graph, fuses
        self.position = {node: offset + i for i, node in enumerate(graph.nodes)}
        self.returned = {root(n) for n in graph.output_node().all_input_nodes}
        self._of: dict[fx.Node, list[int]] = {}

    def of(self, node: fx.Node) -> list[int]:
        """The positions at which a value is read, itself or a view of it; its own where it is not."""
        if node not in self._of:
            found: set[int] = set()
            for user in node.users:
                if is_view(user) or self.inlined(user):
                    found.update(self.of(user))
                elif user.op != "output":
                    found.add(self.position[user])
            self._of[node] = sorted(found or {self.position[node]})
        return self._of[node]

    def inlined(self, node: fx.Node) -> bool:
        """Whether no tensor is made of a value: it is computed where loops read it."""
        return self.fuses and is_loop(node) and node not in self.returned and bool(node.users) and self._in_loops(node)

    def _in_loops(self, node: fx.Node) -> bool:
        return all(self._in_loops(u) if is_view(u) else is_loop(u) or u.target in SUMS for u in node.users)


def _memory(reads: _Reads, kept: Collection[fx.Node], free: Collection[fx.Node]) -> dict[fx.Node, Lifetime]:
    """The memory of what a graph makes or is given, without what is `free`; until it is read last, whatever is kept."""
    made: dict[fx.Node, Lifetime] = {}
    for node, position in reads.position.items():
        if not is_tensor(node) or is_view(node) or node.op == "get_attr" or node in free or writes(node):
            continue
        if not reads.inlined(node):
            first = reads.position[node.args[0]] if node.target is operator.getitem else position  # type: ignore[index]
            made[node] = Lifetime(node, own_nbytes(node.meta["val"]), first, max(first, reads.of(node)[-1]))
    if reads.fuses:
        _write_in_place(made, kept)
    return made


def _write_in_place(made: dict[fx.Node, Lifetime], kept: Collection[fx.Node]) -> None:
    """Ends one input of every loop before the loop's result begins, if it dies there and is as large."""
    dying: dict[tuple[int, int], list[fx.Node]] = {}
    for node, memory in made.items():
        if node not in kept:
            dying.setdefault((memory.last, memory.nbytes), []).append(node)
    for node, memory in made.items():
        others = [n for n in dying.get((memory.first, memory.nbytes), ()) if made[n].first < memory.first]
        if (operand := _written_over(node)) is not None:
            others = [n for n in others if n is operand]
        elif not is_loop(node):
            continue
        if others:
            made[others[0]] = replace(made[others[0]], last=memory.first - 1)
            dying[memory.first, memory.nbytes].remove(others[0])


def _written_over(node: fx.Node) -> fx.Node | None:
    """The operand that `accumulate` has a sum of products written over."""
    call = node.args[0] if node.target is operator.getitem else None
    if isinstance(call, fx.Node) and call.args[:1] == (ops.products_.default,):
        return call.kwargs["into"]  # type: ignore[return-value]
    return None
