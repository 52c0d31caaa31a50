"""`lifetimes`: what is alive when, over a step's forward and backward, keyed by memory rather than by value.

A step's positions are those of the forward graph's nodes and then those of the backward graph's. A value's memory lives
from the op that makes it to the last one that reads it, or one of its views; what is saved lives on into backward. The
user's outputs live on for the loss, and gradients from where they are made. Inputs, parameters and buffers are alive
anyway and count nothing, as nothing outside of the two graphs does.

A compiler that fuses makes no tensor of a pointwise result that only loops read; what such a loop reads has to live
until then instead. It writes a loop's result into an input that dies there and is as large. It also changes the order.
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
from .order import least_first

aten, ops = torch.ops.aten, torch.ops.actcompile

OTHER_LOOPS = (  # beside pointwise ops: moves, constants, and ours that Inductor makes loops of: `codecs.lowerings`
    *(aten.cat.default, aten.index.Tensor, aten.gather.default, aten.constant_pad_nd.default, aten.embedding.default),
    *(aten.full.default, aten.arange.start_step, aten.scalar_tensor.default),
    *(ops.narrow.default, ops.widen.default, ops.mask_to_bytes.default, ops.bytes_to_mask.default),
    ops.random_mask.default,
)
SUMS = (
    *(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.amax.default, aten.amin.default),
    *(aten.var_mean.correction, aten.var.correction, aten.any.default, aten.any.dim, aten.prod.default),
    *(aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim, aten._softmax.default),
    aten.index_put.default,
)


HEAVY = (
    aten.exp.default,
    aten.log.default,
    aten.log1p.default,
    aten.log2.default,
    aten.sigmoid.default,
    aten.tanh.default,
)
MOST_READS, MOST_READS_ON_CUDA, MOST_READS_AGAIN = 12, 8, 4  # Inductor's defaults
ENCODERS = (ops.quantize.default, ops.pack_bits.default)


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
    forward, _ = _memory(split.forward.graph, 0, fuses, saved.keys() | outputs, inputs)
    gradients = {root(n) for n in split.backward.graph.output_node().all_input_nodes}
    free = [p for n, p in split.pairs if root(n) not in forward]
    backward, reads = _memory(split.backward.graph, start, fuses, gradients, free)
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
        and (torch.Tag.pointwise in target.tags or target.namespace == "prims" or target in OTHER_LOOPS)
        and not is_view(node)
        and not _torch.makes_sizes(node)  # a selection by a mask is a call
        and product_added(node) is None
    )


def product_added(node: fx.Node) -> fx.Node | None:
    """The product that Inductor, on the CPU, adds to another tensor in one call (`addmm`), where `node` is the sum."""
    if node.target is not aten.add.Tensor or not all(isinstance(a, fx.Node) and is_tensor(a) for a in node.args):
        return None
    for product in node.args:
        same = product.meta["val"].shape == node.meta["val"].shape  # type: ignore[union-attr]
        if same and product.target is aten.mm.default and len(product.users) == 1 and not node.meta["val"].is_cuda:  # type: ignore[union-attr]
            return product  # type: ignore[return-value]
    return None


class Reads:
    """What reads the values of a graph, and where, by positions in the step."""

    def __init__(self, graph: fx.Graph, offset: int, fuses: bool) -> None:
        self.fuses, self.offset = fuses, offset
        self.returned = {root(n) for n in graph.output_node().all_input_nodes}
        self._readers: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._inlined: set[fx.Node] = _inlined(graph, self.returned) if fuses else set()
        self.follow(graph.nodes)

    def follow(self, order: Iterable[fx.Node]) -> None:
        """Takes the nodes as run in this order, instead of the graph's."""
        self.position = {node: self.offset + i for i, node in enumerate(order)}

    def of(self, node: fx.Node) -> list[int]:
        """The positions at which a value is read, itself or a view of it; its own where it is not."""
        return sorted(self.position[n] for n in self.readers(node) or (node,))

    def readers(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The ops that read a value, itself or a view of it, or that loops read it for."""
        if node not in self._readers:
            found: dict[fx.Node, None] = {}
            for user in node.users:
                if is_view(user) or self.inlined(user):
                    found |= dict.fromkeys(self.readers(user))
                elif user.op != "output":
                    found[user] = None
            self._readers[node] = tuple(found)
        return self._readers[node]

    def inlined(self, node: fx.Node) -> bool:
        """Whether no tensor is made of a value: it is computed where loops read it."""
        return node in self._inlined


def _inlined(graph: fx.Graph, returned: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes that are computed where loops read them.

    Inductor makes a tensor of what reads many others, or is used again and reads some, or costs much to compute again
    (`StorageBox.has_exceeded_max_reads`, `should_realize_on_reuse`).
    """
    found: set[fx.Node] = set()
    heavy: set[fx.Node] = set()
    read: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        read[node] = frozenset((node,) if is_tensor(node) else ())
        if node.target is aten.mm.default and any(product_added(user) is node for user in node.users):
            found.add(node)
            read[node] = frozenset[fx.Node]().union(*(read[n] for n in node.all_input_nodes))
        elif is_view(node):
            read[node] = read[node.args[0]]
            heavy.update((node,) if node.args[0] in heavy else ())
        elif is_loop(node) and node not in returned and node.users and _in_loops(node):
            through = frozenset[fx.Node]().union(*(read[n] for n in node.all_input_nodes))
            costly = node.target in HEAVY or any(n in heavy for n in node.all_input_nodes)
            most = MOST_READS_ON_CUDA if node.meta["val"].is_cuda else MOST_READS
            whole = sum(n.meta["val"].dim() == node.meta["val"].dim() for n in through)  # not numbers of columns
            again = len(node.users) > 1 and (costly or whole > MOST_READS_AGAIN)
            if len(through) <= most and not again:
                found.add(node)
                read[node] = through
                heavy.update((node,) if costly else ())
    return found


def _in_loops(node: fx.Node) -> bool:
    return all(_in_loops(u) if is_view(u) else is_loop(u) or u.target in SUMS for u in node.users)


def _memory(
    graph: fx.Graph, offset: int, fuses: bool, kept: Collection[fx.Node], free: Collection[fx.Node]
) -> tuple[dict[fx.Node, Lifetime], Reads]:
    """The memory of what a graph makes or is given, without what is `free`; until it is read last, whatever is kept.

    A compiler that fuses also orders: of the graph's order and the one of `least_first` it takes the lower one. It
    fuses afterwards, so that loops come together again: what it can move are encoders.
    """
    reads = Reads(graph, offset, fuses)
    made = _ordered(reads, kept, free)
    if not fuses or not any(node.target in ENCODERS for node in graph.nodes):
        return made, reads
    order = least_first(graph, {n: m.nbytes for n, m in made.items()}, kept, reads.readers, reads.inlined)
    other = Reads(graph, offset, fuses)
    other.follow(order)
    again = _ordered(other, kept, free)
    return min((made, reads), (again, other), key=lambda found: _peak(found[0], kept, offset, len(order)))


def _peak(made: dict[fx.Node, Lifetime], kept: Collection[fx.Node], offset: int, positions: int) -> int:
    end = offset + positions - 1
    alive = (replace(m, first=m.first - offset, last=(end if n in kept else m.last) - offset) for n, m in made.items())
    return max(live_bytes(alive, positions), default=0)


def _ordered(reads: Reads, kept: Collection[fx.Node], free: Collection[fx.Node]) -> dict[fx.Node, Lifetime]:
    """The same, in the order of `reads`."""
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
