"""`encode`: the nodes that each lossy or lossless codec means, in forward and in backward."""

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..graph.find import SavedActivation
from ..graph.split import Split, call
from .codecs import Cast, Codec, Copy, LowRank, Narrow, PackBits, Prune, Quantize, SampleRows

ops = torch.ops.actcompile
aten = torch.ops.aten
Sizes = Callable[[], list[Any]]
"""Makes the decoded tensor's sizes in backward: ints or nodes."""
Decode = Callable[[Sequence[fx.Node], Sizes], fx.Node]
"""From the backward inputs that hold the encoded parts to the decoded tensor, at backward's insertion point."""


Units = Callable[[fx.Graph], tuple[fx.Node | None, ...]]
"""Makes the shift and the scale of each column at the insertion point of either graph."""


def part_names(activation: SavedActivation) -> list[str]:
    """The names of backward's inputs that hold the parts of an encoded activation, as many as it has at most."""
    name = activation.node.name.replace("primals_", "crossing_")  # torch reads "primals"
    return [f"{name}_{part}" for part in ("words", "low", "high")]


class Seeds:
    """The random bits of one forward call: a tensor of seeds on each device, drawn once; a row for each user."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.nodes: dict[torch.device, fx.Node] = {}
        self.placeholders: dict[torch.device, fx.Node] = {}
        self.rows: Counter[torch.device] = Counter()

    def draw(self, device: torch.device) -> tuple[fx.Node, int]:
        """The seeds of a device, drawn at the top of forward, and the next unused row."""
        graph = self.split.forward.graph
        if device not in self.nodes:
            with graph.inserting_after(self.top()):
                self.nodes[device] = call(graph, ops.draw_seed.default, 1, device)
        self.rows[device] += 1
        return self.nodes[device], self.rows[device] - 1

    def top(self) -> fx.Node:
        """The last of forward's inputs and seeds, also of those of dropout, which are drawn first: so it drops the same
        however many activations are rounded."""
        graph = self.split.forward.graph
        drawn = graph.find_nodes(op="call_function", target=ops.draw_seed.default)
        return max([*graph.find_nodes(op="placeholder"), *drawn])

    def in_backward(self, device: torch.device) -> fx.Node:
        """The seeds as an input of backward, for what is made anew there."""
        if device not in self.placeholders:
            self.placeholders[device] = self.split.save(self.nodes[device], "actcompile_seeds")
        return self.placeholders[device]

    def finish(self) -> None:
        """Sets the number of rows, now that it is known."""
        for device, node in self.nodes.items():
            node.update_arg(0, self.rows[device])
            node.meta["val"] = node.meta["val"].new_empty(self.rows[device], 2)
            if device in self.placeholders:
                self.placeholders[device].meta["val"] = node.meta["val"]


def encode(
    split: Split, codec: Codec, x: fx.Node, seeds: Seeds, by: Units | None = None
) -> tuple[list[fx.Node], Decode]:
    """Encodes a tensor `x` at the forward graph's insertion point; returns what is to be saved.

    Args:
        x: its dimensions are in the order of memory. Decoded it is contiguous.
        by: makes the shift and the scale of the columns of `x` at the insertion point of either graph, for `Quantize`.

    Raises:
        TypeError: the codec keeps nothing, or keeps it as it is.
    """
    graph, back = split.forward.graph, split.backward.graph
    value = x.meta["val"]
    match codec:
        case Quantize(fmt, columns):
            if columns:
                return _projected(split, codec, x, seeds)
            seed, salt = seeds.draw(value.device)
            fields = (fmt.bits, fmt.block, fmt.levels)
            units: Units = by or (lambda graph: ())
            whole = (*fields, fmt.metadata, fmt.words, *units(graph))
            encoded = _parts(graph, call(graph, ops.quantize.default, x, seed, salt, *whole, like=x))
            return encoded, lambda parts, sizes: call(
                back, ops.dequantize.default, *parts, sizes(), value.dtype, *fields, *units(back)
            )
        case Copy():
            return [call(graph, ops.copy.default, x, like=x)], lambda parts, sizes: parts[0]
        case PackBits(words):
            if value.device.type != "cpu":
                packed = call(graph, ops.pack_bits.default, x, words, like=x)
                return [packed], lambda parts, sizes: call(back, ops.unpack_bits.default, *parts, sizes())
            packed = call(
                graph, ops.pack_bits.default, call(graph, ops.mask_to_bytes.default, x, like=x), words, like=x
            )
            return [packed], lambda parts, sizes: call(
                back, ops.bytes_to_mask.default, call(back, ops.unpack_bits.default, *parts, sizes(), torch.uint8)
            )
        case Narrow(dtype):
            small = call(graph, ops.narrow.default, x, dtype, like=x)
            return [small], lambda parts, sizes: call(back, ops.widen.default, *parts, value.dtype)
        case Prune(kept):
            encoded = _parts(graph, call(graph, ops.prune.default, x, kept, like=x))
            return encoded, lambda parts, sizes: call(back, ops.restore_pruned.default, *parts, sizes())
        case LowRank(rank):
            encoded = _parts(graph, call(graph, ops.low_rank.default, x, rank, like=x))
            return encoded, lambda parts, sizes: call(back, ops.restore_low_rank.default, *parts, sizes())
        case SampleRows(ratio):
            seed, salt = seeds.draw(value.device)
            encoded = _parts(graph, call(graph, ops.sample_rows.default, x, seed, salt, ratio, like=x))
            return encoded, lambda parts, sizes: call(back, ops.restore_rows.default, *parts, sizes())
        case Cast(dtype) if dtype.itemsize == 1:
            encoded = _parts(graph, call(graph, ops.cast_fp8.default, x, dtype, like=x))
            return encoded, lambda parts, sizes: call(back, ops.restore_fp8.default, *parts, value.dtype)
        case Cast(dtype):
            cast = call(graph, ops.narrow.default, x, dtype, like=x)
            return [cast], lambda parts, sizes: call(back, ops.widen.default, *parts, value.dtype)
    raise TypeError(f"{codec} has no encoded form")


def _projected(split: Split, codec: Quantize, x: fx.Node, seeds: Seeds) -> tuple[list[fx.Node], Decode]:
    """Projects the last dimension with random signs, `x @ P`, and rounds; backward makes `P` anew: `y @ P.T`.

    Unbiased, since E[P P.T] is the identity (EXACT, ICLR 2022, sec. 3.2). All in float32.
    """
    graph, back = split.forward.graph, split.backward.graph
    value, width = x.meta["val"], x.meta["val"].shape[-1]
    f32, cast = torch.float32, torch.ops.prims.convert_element_type.default
    seed, salt = seeds.draw(value.device)
    rows = x if value.dim() == 2 else call(graph, aten.reshape.default, x, [-1, width], like=x)
    if value.dtype is not f32:
        rows = call(graph, cast, rows, f32, like=x)
    signs = call(graph, ops.rademacher.default, seed, salt, width, codec.columns, f32, like=x)
    narrow = call(graph, aten.mm.default, rows, signs, like=x)
    encoded, decode = encode(split, Quantize(codec.format), narrow, seeds)
    number = narrow.meta["val"].shape[0]

    def restore(parts: Sequence[fx.Node], sizes: Sizes) -> fx.Node:
        again = call(back, ops.rademacher.default, seeds.in_backward(value.device), salt, width, codec.columns, f32)
        rounded = decode(parts, lambda: [split.size_in_backward(number), codec.columns])
        wide = call(back, aten.mm.default, rounded, call(back, aten.permute.default, again, [1, 0]))
        if value.dtype is not f32:
            wide = call(back, cast, wide, value.dtype)
        return wide if value.dim() == 2 else call(back, aten.view.default, wide, sizes())

    return encoded, restore


def _parts(graph: fx.Graph, encoded: fx.Node) -> list[fx.Node]:
    parts = []
    for i, value in enumerate(encoded.meta["val"]):
        part = graph.call_function(operator.getitem, (encoded, i))
        part.meta["val"] = value
        parts.append(part)
    return parts
