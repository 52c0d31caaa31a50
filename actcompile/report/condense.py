"""Folds a graph's nodes into few boxes, so that a drawing of it can be read.

An op that moves no data of its own (a view) or works element by element joins the box of the op that feeds it, where
that makes no cycle. What has no tensor to wait for (parameters, their views, constants, sizes) has no box.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from .data import GraphNode, GraphReport, Row

VIEWS = {
    *("view", "expand", "permute", "alias", "select", "slice", "squeeze", "unsqueeze", "t", "transpose", "as_strided"),
    *("detach", "reshape", "_unsafe_view", "clone", "getitem", "convert_element_type", "_to_copy", "split"),
    *("split_with_sizes", "unbind", "broadcast_in_dim", "inductor_lookup_seed"),
}
MAKERS = {
    *("full", "scalar_tensor", "arange", "iota", "empty", "zeros", "ones", "full_like", "zeros_like", "ones_like"),
    *("empty_like", "inductor_seeds"),
}


@dataclass
class Box:
    """Nodes drawn as one. `sources` are the saved values and encoders' outputs that its nodes read directly."""

    nodes: list[GraphNode]
    inputs: set[int] = field(default_factory=set)  # boxes, all of them earlier in the list of boxes
    sources: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The names of its ops, views left out unless there is nothing else."""
        names = [n.name if n.op == "placeholder" else short(n.op) for n in self.nodes]
        real = [n for n in names if n not in VIEWS and n not in MAKERS] or names
        return " ".join(dict.fromkeys(real))

    @property
    def shape(self) -> str:
        """The shape of its last result that is not a mere view."""
        return next((n.shape for n in reversed(self.nodes) if short(n.op) not in VIEWS), self.nodes[-1].shape)

    @property
    def inserted(self) -> bool:
        return any(n.inserted for n in self.nodes)

    @property
    def quiet(self) -> bool:
        return all(is_quiet(n.op) for n in self.nodes)


@dataclass(frozen=True)
class Crossing:
    """One saved activation on its way from forward to backward.

    Attributes:
        node: the forward node whose value backward gets.
        encoder, decoders: the inserted ops at both ends; "" and none where it is kept as it is. There are several
            decoders where backward also rebuilds another activation from it.
        placeholders: backward's inputs that carry it; none where it is not saved any more.
    """

    node: str
    encoder: str
    decoders: tuple[str, ...]
    placeholders: tuple[str, ...]
    row: Row | None


def short(op: str) -> str:
    """`aten.add.Tensor` -> `add`, `<built-in function getitem>` -> `getitem`."""
    if op.startswith("<built-in function "):
        return op.removeprefix("<built-in function ").removesuffix(">")
    parts = op.split(".")
    return parts[1] if len(parts) == 3 else op


def is_quiet(op: str) -> bool:
    """Whether an op is a view, makes a constant, or works element by element."""
    if short(op) in VIEWS or short(op) in MAKERS:
        return True
    found: object = torch.ops
    for part in op.split("."):
        found = getattr(found, part, None) if part.isidentifier() else None
        if found is None:
            return False
    return torch.Tag.pointwise in getattr(found, "tags", ())


def _is_size(node: GraphNode) -> bool:
    arithmetic = node.op.startswith("<") and short(node.op) != "getitem"
    return arithmetic or short(node.op) in ("sym_size", "sym_numel", "sym_stride", "_assert_scalar")


def crossings(graph: GraphReport) -> list[Crossing]:
    """Every saved activation that costs memory, before or after, in the order of the forward's outputs.

    Encoded ones are matched by order, which the rewrite keeps on both sides: the inserted ops' results among the
    forward's outputs, and backward's inputs that inserted ops read. The others have the same name on both sides.
    """
    rows = {r.name: r for r in graph.rows if r.bytes_before or r.bytes_after}
    forward = {n.name: n for n in graph.forward_nodes}
    users = _users(graph.backward_nodes)
    backward = {n.name: n for n in graph.backward_nodes}
    placeholders = [n.name for n in graph.backward_nodes if n.op == "placeholder"]
    outputs = [name for n in graph.forward_nodes if n.op == "output" for name in n.inputs]
    renamed = [p for p in placeholders if p not in outputs]  # not sizes, which decoders read as well
    readers = {p: tuple(u for u in users[p] if backward[u].inserted and p in _parts(backward[u])) for p in renamed}
    decoders = {p: read for p, read in readers.items() if read}
    encoded = list(zip((o for o in outputs if _encoder(o, forward)), decoders, strict=False))
    by_encoder: dict[str, list[str]] = defaultdict(list)
    for output, placeholder in encoded:
        by_encoder[_encoder(output, forward)].append(placeholder)
    taken = {p for _, p in encoded}
    rest = iter([p for p in renamed if p not in taken])  # hoisted masks that are kept come first
    made, done = [], set()
    for output in outputs:
        encoder = _encoder(output, forward)
        if encoder in by_encoder:
            node = forward[encoder].inputs[0]
            while node not in rows and short(forward[node].op) in ("permute", "mask_to_bytes") and forward[node].inputs:
                node = forward[node].inputs[0]  # brought into memory order, and to bytes, first
            carried = by_encoder.pop(encoder)
            if node not in rows:  # standardised first: the activation is what the placeholders are named after
                node = carried[0].rpartition("_words")[0]
            made.append(Crossing(node, encoder, decoders[carried[0]], tuple(carried), rows.get(node)))
            done.add(node)
        elif output in rows and output not in done:
            placeholder = output if output in backward else next(rest, "")
            made.append(Crossing(output, "", (), (placeholder,) if placeholder else (), rows[output]))
            done.add(output)
    dropped = [Crossing(name, "", (), (), row) for name, row in rows.items() if name not in done]
    return made + [c for c in dropped if c.node in forward]


def _encoder(name: str, nodes: dict[str, GraphNode]) -> str:
    """The inserted op whose result, or part of whose result, a node is; "" if it is none."""
    node = nodes.get(name)
    if node is not None and not node.inserted and short(node.op) == "getitem" and node.inputs:
        node = nodes.get(node.inputs[0])
    return node.name if node is not None and node.inserted and node.inputs else ""


def _parts(decoder: GraphNode) -> tuple[str, ...]:
    """What a decoder reads of the encoded tensor; `dequantize` takes sizes and columns' statistics behind that."""
    return decoder.inputs[:3] if short(decoder.op) == "dequantize" else decoder.inputs


def _users(nodes: Sequence[GraphNode]) -> dict[str, list[str]]:
    users: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        for name in node.inputs:
            users[name].append(node.name)
    return users


def condense(
    nodes: Sequence[GraphNode], apart: Collection[str], saved: Collection[str], pinned: Collection[str]
) -> tuple[list[Box], dict[str, int]]:
    """Folds the nodes of one graph into boxes, in topological order.

    Args:
        apart: encoders and decoders, which are drawn beside the boxes and are in none.
        saved: inputs that carry saved activations.
        pinned: nodes that must be in a box.

    Returns:
        the boxes, and the box of every node that is in one.
    """
    users = _users(nodes)
    final = {n.name for n in nodes if n.op == "output"}
    boxes: list[Box] = []
    home: dict[str, int] = {}
    above: list[int] = []  # per box, its ancestors as a bit set
    waiting: dict[str, list[GraphNode]] = {}  # element-wise ops without inputs in a box, to go where they are used
    sources: dict[str, list[str]] = {name: [name] for name in (*apart, *saved)}  # through views

    def place(members: list[GraphNode], reads: list[str], inputs: set[int], target: int | None) -> None:
        if target is None:
            target = len(boxes)
            boxes.append(Box([], set(inputs)))
            above.append(0)
            for i in inputs:
                above[target] |= above[i] | 1 << i
        boxes[target].nodes += members
        boxes[target].inputs |= inputs - {target}
        boxes[target].sources += [r for r in reads if r not in boxes[target].sources]
        home.update((m.name, target) for m in members)

    for node in nodes:
        if node.op in ("output", "get_attr") or node.name in apart or node.name in saved or _is_size(node):
            continue
        if node.op == "placeholder":
            if node.name in pinned:
                place([node], [], set(), None)
            continue
        inputs = {home[i] for i in node.inputs if i in home}
        carried = [m for i in node.inputs for m in waiting.get(i, ())]
        reads = list(dict.fromkeys(s for i in node.inputs for s in sources.get(i, ())))
        quiet, view = is_quiet(node.op), short(node.op) in VIEWS
        if quiet and not inputs and node.name not in pinned:
            following = users[node.name]
            if not carried and (view or short(node.op) in MAKERS):
                sources[node.name] = reads
                continue
            if not reads and not carried and not node.shape:
                continue  # a counter
            if len(following) == 1 and following[0] not in final and following[0] not in apart:
                waiting[node.name] = [*carried, node]
                sources[node.name] = reads
                continue
        target = None
        if quiet:  # into the latest input, if all the others come before that one anyway: so there is no cycle
            latest = max(inputs, default=None)
            if latest is not None and all(i == latest or above[latest] >> i & 1 for i in inputs):
                target = latest
        place([*carried, node], reads, inputs, target)
    return boxes, home
