"""`find`: every saved activation, where it comes from, what it weighs, and who uses it in backward."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from actcompile.kernels.edges.program import parse

from . import _torch
from .origin import module_path, op_name, source_line
from .split import Split, is_input, is_size, is_tensor, is_view, root

aten, ops = torch.ops.aten, torch.ops.actcompile

INDEX_ARGUMENT = {  # op -> (position of the index, position of the indexed tensor, position of the dimension)
    aten.gather.default: (2, 0, 1),
    aten.index_select.default: (2, 0, 1),
    aten.scatter_add.default: (2, 0, 1),
    aten.scatter.src: (2, 0, 1),
    aten.scatter.value: (2, 0, 1),
    aten.scatter_reduce.two: (2, 0, 1),
    aten.index_add.default: (2, 0, 1),
}
WHOLE = (aten.view.default, aten.expand.default, aten.unsqueeze.default, aten.reshape.default, aten.permute.default)
PARTS = (aten.select.int, aten.slice.Tensor)
CASTS = (torch.ops.prims.convert_element_type.default, aten._to_copy.default, aten.clone.default)


@dataclass(frozen=True)
class SavedActivation:
    """One value that forward hands to backward.

    Attributes:
        node: the forward node; its identity.
        placeholder: the backward input that receives it.
        module: path of the submodule that made it, such as `convs.0`.
        source: user source line, such as `model.py:12 x = conv(x, edge_index)`.
        op: what made it, such as `aten.add.Tensor`.
        uses: names of the backward ops that use it.
        nbytes: bytes of memory that saving it costs: all of the memory that it is a view of, or its share of that
            where other saved values are views of it, too; zero where the memory is alive anyway.
        refusal: why it can't be compressed, or None.
        bound: for an integer index, a size that its absolute value never exceeds (may be symbolic), else None.
        key: what names it in configs and saved plans, in every process and at all sizes, such as `convs.0/add`.
    """

    node: fx.Node
    placeholder: fx.Node
    module: str
    source: str
    op: str
    uses: tuple[str, ...]
    nbytes: int
    refusal: str | None
    bound: object = None
    key: str = ""

    @property
    def value(self) -> torch.Tensor:
        return self.node.meta["val"]

    @property
    def sizes(self) -> tuple[Any, ...]:
        """Its sizes in the order of its memory."""
        return tuple(self.value.shape[d] for d in memory_order(self.value))

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes in the order of its memory, those of the trace where they are symbolic."""
        return tuple(map(_torch.size_hint, self.sizes))

    @property
    def numel(self) -> int:
        """Number of elements, at the sizes of the trace."""
        return numel_hint(self.value)


def numel_hint(value: torch.Tensor) -> int:
    return math.prod(_torch.size_hint(size) for size in value.shape)


def own_nbytes(value: torch.Tensor) -> int:
    """Bytes of its elements, at the sizes of the trace, whatever memory they are a view of."""
    return numel_hint(value) * value.dtype.itemsize


def find(split: Split) -> list[SavedActivation]:
    """Lists the saved values of `split` that are tensors, in the order of the forward's outputs."""
    shares = _shares(split)
    found: list[SavedActivation] = []
    taken: set[str] = set()
    for node, placeholder in split.pairs:
        if not is_tensor(node):
            continue
        base = root(node)
        refusal = _refusal(node, base, split.returned)
        if refusal is None and not all(split.knows(size) for size in node.meta["val"].shape):
            refusal = "its size depends on data and can't be handed on"
        if refusal is None and _uncast(node) in split.parameters:
            refusal = "a parameter or buffer, copied or in another dtype: noise in it would reach every row"
        bound = _bound(placeholder)
        key = split.keys.of(node)
        if key in taken:  # of a clone and what it is a clone of
            key = f"{key}, cloned"
        taken.add(key)
        found.append(
            SavedActivation(
                node=node,
                placeholder=placeholder,
                module=module_path(node),
                source=source_line(node),
                op=maker(node),
                uses=tuple(dict.fromkeys(op_name(u) for u in placeholder.users)),
                nbytes=shares[node],
                refusal=refusal,
                bound=bound if bound is None or split.knows(bound) else None,
                key=key,
            )
        )
    return found


def _shares(split: Split) -> dict[fx.Node, int]:
    """Bytes of memory that every saved tensor keeps alive, in proportion to its own where several keep the same."""
    holders: dict[fx.Node, list[fx.Node]] = {}
    for node, _ in split.pairs:
        if is_tensor(node):
            holders.setdefault(root(node), []).append(node)
    shares = {}
    for base, nodes in holders.items():
        left = 0 if split.is_free(base) else own_nbytes(base.meta["val"])
        weights = [own_nbytes(n.meta["val"]) for n in nodes]
        for position, node in enumerate(nodes):
            shares[node] = left * weights[position] // max(sum(weights[position:]), 1)
            left -= shares[node]
    return shares


def _uncast(node: fx.Node) -> fx.Node:
    """The node that `node` is a view or a cast of."""
    while (is_view(node) or node.target in CASTS) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _refusal(node: fx.Node, base: fx.Node, returned: set[fx.Node]) -> str | None:
    value = node.meta["val"]
    if is_input(base):
        kind = "an input, parameter or buffer" if base is node else "a view of an input, parameter or buffer"
        return f"{kind}: alive anyway"
    if base.op == "get_attr":
        return "a constant of the graph: alive anyway"
    if base in returned:
        return "the model returns it, or a view of it"
    if value.layout is not torch.strided:
        return f"layout {value.layout} is not handled"
    handled = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)
    if (value.is_floating_point() or value.is_complex()) and value.dtype not in handled:
        return f"dtype {value.dtype} is not handled"
    if own_nbytes(value) > own_nbytes(base.meta["val"]):
        return "its strides overlap"
    return None


def memory_order(value: torch.Tensor) -> list[int]:
    """The permutation of dimensions that brings them into the order of memory, also where that has gaps."""
    return dense_order(value) or sorted(range(value.dim()), key=lambda d: -_torch.size_hint(value.stride(d)))


def dense_order(value: torch.Tensor) -> list[int] | None:
    """The permutation of dimensions that makes a dense tensor contiguous; None where strides overlap or leave gaps.

    Decided without guards: what can't be shown for all sizes counts as not dense.
    """
    remaining = list(range(value.dim()))
    order: list[int] = []
    expected: object = 1
    while remaining:
        units = [d for d in remaining if _torch.known_true(value.shape[d] == 1)]
        match = units or [d for d in reversed(remaining) if _torch.known_true(value.stride(d) == expected)]
        if not match:
            return None
        order.append(match[0])
        remaining.remove(match[0])
        expected = expected * value.shape[match[0]]  # type: ignore[operator]
    order.reverse()
    return order


def _bound(index: fx.Node) -> object:
    """A size that bounds what backward reads of an integer tensor, from the ops there that index with it.

    One op bounds the whole tensor if all of it goes there; where only parts of it are read, each has to be bounded.
    """
    value = index.meta["val"]
    if value.dtype not in (torch.int64, torch.int32) or value.dim() == 0:
        return None
    bounds = []
    for user in (u for u in index.users if not is_size(u)):
        whole = _indexed_size(user, index)
        if whole is None and user.target in WHOLE:
            whole = _bound(user)
        if whole is not None:
            return whole
        bounds.append(_bound(user) if user.target in PARTS else None)
    return None if not bounds or any(b is None for b in bounds) else _torch.largest(bounds)


def _indexed_size(user: fx.Node, index: fx.Node) -> object:
    if user.target in INDEX_ARGUMENT:
        where, indexed, dim = INDEX_ARGUMENT[user.target]
        if len(user.args) > where and user.args[where] is index:
            return cast(fx.Node, user.args[indexed]).meta["val"].shape[cast(int, user.args[dim])]
    if user.target in (aten.index.Tensor, aten.index_put.default, aten._unsafe_index.Tensor):
        tensor, indices = user.args[:2]
        for dim, given in enumerate(cast(list[object], indices)):
            if given is index:
                return cast(fx.Node, tensor).meta["val"].shape[dim]
    if user.target in (ops.aggregate.default, ops.edges.default, ops.group_edges.default, ops.degree.default):
        return _indexed_by_edges(user, index)
    if user.target is ops.spmm_transposed.default:  # the product has a row for each column
        pointer, columns = user.args[:2]
        bounds = {pointer: cast(fx.Node, columns).meta["val"].shape[0], columns: user.meta["val"].shape[0]}
        return bounds.get(index)
    return None


def _indexed_by_edges(user: fx.Node, index: fx.Node) -> object:
    """The number of nodes that edges name; of several, the largest. Also of an index of places of edges."""
    args = cast(Any, user.args)
    if user.target in (ops.group_edges.default, ops.degree.default):
        return _size(args[2]) if args[0] is index else args[0].meta["val"].shape[-1]
    found = []
    if user.target is ops.aggregate.default:
        matrix, _, take, _, by, _, nodes, grouped = args
        found = [(take, matrix.meta["val"].shape[0]), (by, _size(nodes))]
    else:
        _, by, _, nodes, _, _, indices, _, operands, grouped = args
        program = parse(args[0]).operands
        found = [(by, _size(nodes))] + [
            (indices[o.index], tensor.meta["val"].shape[0])
            for o, tensor in zip(program, operands, strict=True)
            if o.where == "take" and o.index >= 0
        ]
    edges = by.meta["val"].shape[-1]
    sizes = [size for tensor, size in [*found, *((g, edges) for g in grouped)] if tensor is index]
    return _torch.largest(sizes) if sizes else None


def _size(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, fx.Node) else size


def maker(node: fx.Node) -> str:
    """What makes a value: an op, or who gives it to the graph."""
    return str(node.target) if node.op != "placeholder" else "input" if is_input(node) else "an earlier graph"
