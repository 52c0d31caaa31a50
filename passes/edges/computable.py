"""What a program over rows can compute: ops, dtypes, products."""

from __future__ import annotations

import torch
from torch import fx

from actcompile.kernels.edges.program import COMPARING

from ..graph.split import is_tensor
from .takes import PRODUCTS, SAME

aten, prims = torch.ops.aten, torch.ops.prims

POINTWISE = {
    aten.add.Tensor: "add", aten.add.Scalar: "add", aten.sub.Tensor: "sub", aten.sub.Scalar: "sub",
    aten.mul.Tensor: "mul", aten.mul.Scalar: "mul", aten.div.Tensor: "div", aten.div.Scalar: "div",
    aten.neg.default: "neg", aten.abs.default: "abs", aten.exp.default: "exp", aten.log.default: "log",
    aten.log1p.default: "log1p", aten.expm1.default: "expm1", aten.sqrt.default: "sqrt", aten.rsqrt.default: "rsqrt",
    aten.reciprocal.default: "reciprocal", aten.sin.default: "sin", aten.cos.default: "cos", aten.erf.default: "erf",
    aten.pow.Tensor_Scalar: "pow", aten.sigmoid.default: "sigmoid", aten.tanh.default: "tanh",
    aten.relu.default: "relu", aten.maximum.default: "maximum", aten.minimum.default: "minimum",
    aten.where.self: "where",
    aten.gt.Tensor: "gt", aten.gt.Scalar: "gt", aten.ge.Tensor: "ge", aten.ge.Scalar: "ge",
    aten.lt.Tensor: "lt", aten.lt.Scalar: "lt", aten.le.Tensor: "le", aten.le.Scalar: "le",
    aten.eq.Tensor: "eq", aten.eq.Scalar: "eq", aten.ne.Tensor: "ne", aten.ne.Scalar: "ne",
    aten.logical_and.default: "and", aten.bitwise_and.Tensor: "and", aten.logical_or.default: "or",
    aten.bitwise_or.Tensor: "or", aten.logical_not.default: "not", aten.bitwise_not.default: "not",
    prims.convert_element_type.default: "float", aten._to_copy.default: "float",
}  # fmt: skip
SHAPES = (aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.reshape.default)
LARGEST = 1 << 14  # elements of a matrix that rows of edges are multiplied with: it stays in a core's cache
FLOATS = (torch.float32, torch.float64, torch.bfloat16)  # on any device


def is_float(node: fx.Node) -> bool:
    """Whether a program can work with a node's floats: with those of float16 on CUDA only."""
    value = node.meta["val"]
    return value.dtype in FLOATS or (value.dtype is torch.float16 and value.device.type == "cuda")


def is_computable(node: fx.Node) -> bool:
    """Whether a program can do what a node does to its arguments."""
    if node.target in SHAPES or node.target is aten.expand.default or node.target in SAME:
        return isinstance(node.args[0], fx.Node)
    if node.target not in POINTWISE or not is_tensor(node):
        return False
    op = POINTWISE[node.target]
    if op == "float":
        return is_float(node) and is_tensor(node.args[0]) and is_handled(node.args[0])  # type: ignore[arg-type]
    arguments = [a for a in node.args if isinstance(a, fx.Node) and is_tensor(a)]
    if node.kwargs or not all(map(is_handled, arguments)):
        return False
    if op in ("and", "or", "not"):
        return all(a.meta["val"].dtype is torch.bool for a in arguments)
    return is_float(node) or op in COMPARING


def product_of(node: fx.Node) -> fx.Node | None:
    """The rows that a node multiplies with a matrix, as a program can do it; None where it does something else."""
    if node.target not in PRODUCTS or node.kwargs:
        return None
    *bias, rows, weights = node.args
    if not all(isinstance(n, fx.Node) and is_tensor(n) for n in node.args):
        return None
    values = [n.meta["val"] for n in (node, rows, weights, *bias)]  # type: ignore[union-attr]
    if len({v.dtype for v in values}) > 1 or not is_float(node) or any(v.device.type != "cpu" for v in values):
        return None
    sizes = values[2].shape
    if not all(isinstance(size, int) for size in sizes) or not 0 < sizes[0] * sizes[1] <= LARGEST:
        return None
    return None if bias and values[3].dim() != 1 else rows  # type: ignore[return-value]


def is_handled(node: fx.Node) -> bool:
    """Whether a program can read a node."""
    return is_float(node) or node.meta["val"].dtype is torch.bool


def constant_of(node: fx.Node) -> float | None:
    """The number that a node fills a tensor with."""
    while node.target is aten.expand.default or node.target in SHAPES:
        node = node.args[0]  # type: ignore[assignment]
    match node:
        case fx.Node(target=aten.full.default, args=(_, bool() | int() | float() as number)):
            return float(number)
        case fx.Node(target=aten.scalar_tensor.default, args=(bool() | int() | float() as number,)):
            return float(number)
    return None


def is_scaled_mask(node: fx.Node) -> bool:
    """Whether a node is a mask as numbers, perhaps times a number, as dropout makes it: the mask is read instead."""
    match node:
        case fx.Node(target=prims.convert_element_type.default, args=(fx.Node() as mask, _)):
            return is_tensor(mask) and mask.meta["val"].dtype is torch.bool and is_computable(node)
        case fx.Node(target=aten.mul.Tensor, args=(fx.Node() as mask, int() | float())):
            return is_scaled_mask(mask)
    return False
