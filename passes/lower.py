"""`lower`: prepares our ops on CPU tensors for Inductor, which then fuses them into vectorised C++.

Decoding ops are expanded into plain aten ops here; encoding ops stay, and are lowered by `loops` to one loop body each.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from actcompile.kernels import BlockFormat
from actcompile.kernels.lossless import unpack_bits_aten
from actcompile.kernels.quantize import dequantize_aten

from . import _torch, loops
from .split import Split, is_tensor

ops = torch.ops.actcompile


def _fills(sizes: Any, group: int) -> bool:
    """Whether a tensor of this shape fills its groups exactly, for all values of its symbolic sizes."""
    numel = 1
    for s in sizes:
        numel = numel * s
    return _torch.known_true(numel % group == 0)


def _dequantize(words, low, high, size, dtype, bits, block, levels):
    fmt = BlockFormat(bits, block, levels, low.dtype, words.shape[1])
    return dequantize_aten(words, low, high, size, dtype, fmt, tail=not _fills(size, fmt.group))


def _unpack_bits(packed, size):
    return unpack_bits_aten(packed, size, tail=not _fills(size, 32 * packed.shape[1]))


EXPANSIONS: dict[Any, Callable[..., Any]] = {
    ops.dequantize.default: _dequantize,
    ops.unpack_bits.default: _unpack_bits,
    ops.narrow.default: lambda x, dtype: x.to(dtype),
    ops.widen.default: lambda x, dtype: x.to(dtype),
}


loops.register()


def lower(split: Split) -> Split:
    """Replaces every decoding op on the CPU by its expansion, in both graphs."""
    for module in (split.forward, split.backward):
        for node in list(module.graph.nodes):
            expansion = EXPANSIONS.get(node.target) if node.op == "call_function" else None
            if expansion and next(n for n in node.all_input_nodes if is_tensor(n)).meta["val"].device.type == "cpu":
                _expand(module.graph, node, expansion)
        module.graph.lint()
        module.recompile()
    return split


def _expand(graph: fx.Graph, node: fx.Node, expansion: Callable[..., Any]) -> None:
    """Traces the expansion on the node's fake inputs and splices its nodes in the node's place."""
    inputs = node.all_input_nodes

    def run(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        return expansion(*fx.map_arg(node.args, given.__getitem__))

    traced = _torch.decompose(run, [n.meta["val"] for n in inputs])
    traced.graph.eliminate_dead_code()
    copies: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "get_attr":
                raise RuntimeError(f"the expansion of {node} holds a constant tensor: {inner.target}")
            if inner.op not in ("placeholder", "output"):
                copies[inner] = graph.node_copy(inner, copies.__getitem__)
    result = _torch.pytree.tree_map_only(fx.Node, copies.__getitem__, traced.graph.output_node().args[0])
    if isinstance(result, (tuple, list)):
        for getitem in list(node.users):
            getitem.replace_all_uses_with(result[getitem.args[1]])  # type: ignore[index]
            graph.erase_node(getitem)
    else:
        node.replace_all_uses_with(result)
    graph.erase_node(node)
