"""Which values of a forward graph are never negative, by the ops that made them.

What ReLU has passed lies at and above its block's minimum, mostly zero: half a normal, and not the whole one that the
papers' levels are made for.
"""

from functools import lru_cache

import torch
from torch import fx

from .split import is_tensor, is_view, root

aten = torch.ops.aten
prims = torch.ops.prims

ALWAYS = {aten.relu, aten.abs, aten.exp, aten.sigmoid, aten.sqrt, aten.rsqrt, aten._softmax, aten.rand, aten.square}
ALWAYS |= {prims.inductor_random}
LIKE_ALL_INPUTS = {  # never negative if no float among their tensors is
    aten.add, aten.mul, aten.div, aten.cat, aten.maximum, aten.minimum, aten.where, aten.scatter_add, aten.index_add,
    aten.index_put, aten.sum, aten.mean, aten.amax, aten.amin, aten.clone, aten.index, aten.index_select, aten.gather,
    aten._to_copy, prims.convert_element_type,
}  # fmt: skip


@lru_cache(maxsize=4096)
def never_negative(node: fx.Node) -> bool:
    """Whether no element of a tensor of the graph can be below zero. "No" may be caution."""
    if not is_tensor(node):
        return False
    if node.meta["val"].dtype in (torch.bool, torch.uint8):
        return True
    if is_view(node):
        return root(node).meta["val"].dtype is node.meta["val"].dtype and never_negative(root(node))
    packet = getattr(node.target, "overloadpacket", None)
    numbers = [a for a in node.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
    if packet in ALWAYS:
        return True
    if packet in (aten.full, aten.scalar_tensor):
        value = node.args[1] if packet is aten.full else node.args[0]
        return isinstance(value, (int, float)) and value >= 0
    if packet is aten.clamp_min:
        return bool(numbers) and numbers[0] >= 0
    if packet not in LIKE_ALL_INPUTS or (packet in (aten.add, aten.mul, aten.div) and any(n < 0 for n in numbers)):
        return False
    if node.kwargs.get("alpha", 1) != 1:
        return False
    floats = [n for n in node.all_input_nodes if is_tensor(n) and not _is_index(n)]
    return bool(floats) and all(never_negative(n) for n in floats)


def _is_index(node: fx.Node) -> bool:
    return node.meta["val"].dtype in (torch.int64, torch.int32)
