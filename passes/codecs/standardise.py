"""Rounding in the units of columns: which saved activations can be brought to mean 0 and deviation 1 first.

The columns of a norm's input differ in mean and deviation. A block goes across columns, so the widest of them sets the
step for all, and the norm then magnifies the noise of the narrow ones by their own small deviation. What the norm
itself computes, `(x - mean) / deviation`, has columns alike. It is there in forward, and backward has the mean and the
deviation of each column, exact: so that is encoded, and `x` made from it again. An affine map: what is unbiased for the
one is so for the other.

What a linear layer returns has such columns, too. Where no norm reads it, `offer` computes the statistics.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from ..graph import _torch
from ..graph.find import SavedActivation, memory_order
from ..graph.split import Split, call, is_tensor, is_view, root

aten = torch.ops.aten
CAST = torch.ops.prims.convert_element_type.default
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
EPSILON = 1e-12
FEWEST_ROWS = 64  # below, a column's statistics weigh too much beside the column


@dataclass(frozen=True)
class Standard:
    """`x = result / scale + sum(plus) - sum(minus)`, all nodes of forward.

    Scale, and each of plus and minus, has one element for each column of `x`. Where `x` is the norm's input less its
    mean, `uncentred` are these two: encoding takes off the mean as it reads the input, so that `x` need not be made.
    """

    result: fx.Node
    scale: fx.Node
    plus: tuple[fx.Node, ...] = ()
    minus: tuple[fx.Node, ...] = ()
    uncentred: tuple[fx.Node, fx.Node] | None = None


def standard(node: fx.Node) -> Standard | None:
    """The standardised form of a node that forward computes anyway, or None.

    The node may be the norm's input; or that before a bias is added, as where a layer aggregates last; or the input
    less its mean, which torch prefers to save where it saves what ReLU has passed, too.
    """
    for user in node.users:
        if user.target is CAST and user.meta["val"].dtype is torch.float32 and (form := _normed(user)) is not None:
            return form
        if (
            user.target is aten.add.Tensor
            and not user.kwargs
            and user.args[0] is node
            and _by_column(user.args[1], node)
        ):
            form = _normed(user)
            if form is not None:
                return Standard(form.result, form.scale, form.plus, (user.args[1],))  # type: ignore[arg-type]
    if node.target is aten.sub.Tensor and isinstance(node.args[0], fx.Node):
        whole, mean = node.args
        form = _normed(whole)  # type: ignore[arg-type]
        if form is not None and isinstance(mean, fx.Node) and root(mean) is root(form.plus[0]):
            return Standard(form.result, form.scale, uncentred=(whole, mean) if _alike(whole, node) else None)  # type: ignore[arg-type]
    return _normed(node)


def offer(split: Split, activations: Iterable[SavedActivation]) -> None:
    """Adds to forward the standardised form of what linear layers return, where it has none.

    It is removed again, as dead code, where the plan does not take it.
    """
    graph = split.forward.graph
    for activation in activations:
        x, value = activation.node, activation.value
        if not _from_linear_layer(x) or standard(x) is not None:
            continue
        width = value.shape[-1]
        if memory_order(value) != list(range(value.dim())) or not isinstance(width, int):
            continue
        if activation.numel < FEWEST_ROWS * width:
            continue
        with graph.inserting_before(max(x, *graph.find_nodes(op="placeholder")).next):
            if value.dtype is not torch.float32:
                x = call(graph, CAST, x, torch.float32, like=x)
            rows = list(range(value.dim() - 1))
            mean = call(graph, aten.mean.dim, x, rows, True, like=x)
            centred = call(graph, aten.sub.Tensor, x, mean, like=x)
            squares = call(graph, aten.mul.Tensor, centred, centred, like=x)
            variance = call(graph, aten.mean.dim, squares, rows, True, like=x)
            not_zero = call(graph, aten.add.Tensor, variance, EPSILON, like=x)
            scale = call(graph, aten.rsqrt.default, not_zero, like=x)
            call(graph, aten.mul.Tensor, centred, scale, like=x)


def columns_alike(x: torch.Tensor) -> torch.Tensor:
    """What `offer` adds to the graph, of a tensor."""
    x = x.float()
    rows = list(range(x.dim() - 1))
    centred = x - x.mean(rows, True)
    return centred * torch.rsqrt((centred * centred).mean(rows, True) + EPSILON)


def _from_linear_layer(node: fx.Node) -> bool:
    """Whether a node is a matrix product, viewed, cast or copied, perhaps with a bias."""
    while isinstance(node.args[0] if node.args else None, fx.Node):
        added = node.target is aten.add.Tensor and _by_column(node.args[1], node)
        if not (added or is_view(node) or node.target in (CAST, aten.clone.default)):
            break
        node = node.args[0]  # type: ignore[assignment]
    return node.target in PRODUCTS


def _normed(x: fx.Node) -> Standard | None:
    """That of `x`, from `(x - mean) * rsqrt(...)`."""
    for centred in x.users:
        if centred.target is not aten.sub.Tensor or centred.args[0] is not x:
            continue
        shift = centred.args[1]
        for result in centred.users:
            if result.target is aten.mul.Tensor and result.args[0] is centred:
                scale = result.args[1]
                by_column = _by_column(shift, x) and _by_column(scale, x) and scale.target is aten.rsqrt.default  # type: ignore[union-attr]
                if by_column and _made_of(x, shift) and _made_of(x, scale):  # type: ignore[arg-type]
                    return Standard(result, scale, (shift,))  # type: ignore[arg-type]
    return None


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors have the same dtype, shape and order of memory."""
    a, b = one.meta["val"], other.meta["val"]
    same = a.dtype is b.dtype and a.dim() == b.dim() and all(map(_torch.known_true, map(operator.eq, a.shape, b.shape)))
    return same and memory_order(a) == memory_order(b)


def _made_of(x: fx.Node, value: fx.Node) -> bool:
    """Whether a value is computed from `x`; other statistics, such as running ones, need not fit its columns."""
    seen, todo = {value}, [value]
    while todo:
        node = todo.pop()
        if node is x:
            return True
        later = [n for n in node.all_input_nodes if n not in seen and not n < x]
        seen.update(later)
        todo += later
    return False


def _by_column(value: object, x: fx.Node) -> bool:
    """Whether a value has one float32 for each element of the last of several dimensions of `x`."""
    if not isinstance(value, fx.Node) or not is_tensor(value):
        return False
    shape, given = x.meta["val"].shape, value.meta["val"]
    if len(shape) < 2 or given.dim() < 1 or given.dtype is not torch.float32 or given.dim() > len(shape):
        return False
    alone = all(_torch.known_true(size == 1) for size in given.shape[:-1])
    return alone and _torch.known_true(given.shape[-1] == shape[-1])
