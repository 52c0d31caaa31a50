"""Which saved activations a BatchNorm standardises, so that they can be rounded in its units.

The columns of a norm's input differ in mean and deviation. A block goes across columns, so the widest of them sets the
step for all, and the norm then magnifies the noise of the narrow ones by their own small deviation. What the norm
itself computes, `(x - mean) / deviation`, has columns alike. It is there in forward, and backward has the mean and the
deviation of each column, exact: so that is encoded, and `x` made from it again. An affine map: what is unbiased for the
one is so for the other.
"""

from dataclasses import dataclass

import torch
from torch import fx

from . import _torch
from .split import is_tensor, root

aten = torch.ops.aten
CAST = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class Standard:
    """`x = result / scale + sum(plus) - sum(minus)`, all nodes of forward.

    Scale, and each of plus and minus, has one element for each column of `x`.
    """

    result: fx.Node
    scale: fx.Node
    plus: tuple[fx.Node, ...] = ()
    minus: tuple[fx.Node, ...] = ()


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
        form = _normed(node.args[0])
        if form is not None and isinstance(node.args[1], fx.Node) and root(node.args[1]) is root(form.plus[0]):
            return Standard(form.result, form.scale)
    return _normed(node)


def _normed(x: fx.Node) -> Standard | None:
    """That of `x`, from `(x - mean) * rsqrt(...)`."""
    for centred in x.users:
        if centred.target is not aten.sub.Tensor or centred.args[0] is not x:
            continue
        shift = centred.args[1]
        for result in centred.users:
            if result.target is aten.mul.Tensor and result.args[0] is centred:
                scale = result.args[1]
                if _by_column(shift, x) and _by_column(scale, x) and scale.target is aten.rsqrt.default:  # type: ignore[union-attr]
                    return Standard(result, scale, (shift,))  # type: ignore[arg-type]
    return None


def _by_column(value: object, x: fx.Node) -> bool:
    """Whether a value has one float32 for each element of the last of several dimensions of `x`."""
    if not isinstance(value, fx.Node) or not is_tensor(value):
        return False
    shape, given = x.meta["val"].shape, value.meta["val"]
    if len(shape) < 2 or given.dim() < 1 or given.dtype is not torch.float32 or given.dim() > len(shape):
        return False
    alone = all(_torch.known_true(size == 1) for size in given.shape[:-1])
    return alone and _torch.known_true(given.shape[-1] == shape[-1])
