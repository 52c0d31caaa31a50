"""`prepare`: the C++ of ours is compiled beside what Inductor does, so that the first step finds it."""

import math
from collections.abc import Iterator

import torch
from torch import fx

from actcompile.kernels.blocks.format import BlockFormat
from actcompile.kernels.cpu import prepare_bits, prepare_format
from actcompile.kernels.edges.ops import aggregation, prepare_edges
from actcompile.kernels.rows.tiles import prepare_loops

from ..graph import _torch

ops = torch.ops.actcompile


def prepare(*graphs: fx.Graph) -> None:
    """Begins to compile what ops on CPU tensors call; whatever is not ready when it is called, is waited for."""
    for fmt, dtype in dict.fromkeys(formats(*graphs)):
        prepare_format(fmt, dtype)
    if any(True for graph in graphs for _ in _on_cpu(graph, ops.pack_bits.default)):
        prepare_bits()
    for graph in graphs:
        for node in graph.find_nodes(op="call_function", target=ops.row_sums.default):
            prepare_loops(node.args[0])  # type: ignore[arg-type]
        for node in graph.find_nodes(op="call_function", target=ops.edges.default):
            program, by, _, _, heads, columns, *_ = node.args
            prepare_edges(program, by.meta["val"].device, heads, columns)  # type: ignore[arg-type, union-attr]
        for node in graph.find_nodes(op="call_function", target=ops.aggregate.default):
            matrix, weight, *_ = (n and n.meta["val"] for n in node.args[:2])  # type: ignore[union-attr]
            program = aggregation(*(str(v.dtype)[6:] for v in (matrix, weight) if v is not None))
            prepare_edges(program, matrix.device, 1, math.prod(map(_torch.size_hint, matrix.shape[1:])))


def formats(*graphs: fx.Graph) -> Iterator[tuple[BlockFormat, torch.dtype]]:
    """The formats that graphs encode to on the CPU, each with the dtype of what is encoded."""
    for graph in graphs:
        for node in _on_cpu(graph, ops.quantize.default):
            x, _, _, *fields = node.args
            yield BlockFormat(*fields[:5]), x.meta["val"].dtype  # type: ignore[arg-type, union-attr]


def _on_cpu(graph: fx.Graph, op: torch._ops.OpOverload) -> Iterator[fx.Node]:
    for node in graph.find_nodes(op="call_function", target=op):
        if node.args[0].meta["val"].device.type == "cpu":
            yield node
