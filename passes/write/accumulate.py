"""`accumulate`: sums of matrix products are added up in one tensor, which takes an operand's place where that is free.

A layer's output, or the gradient of its input, is `a W + b V`. torch makes `a W`, then copies it to add `b V`; and `a`,
often as large as the result, is dead behind it. Of four tensors of all nodes' features two are enough.
"""

import operator
from dataclasses import dataclass

import torch
from torch import fx

from ..graph import _torch
from ..graph.find import numel_hint
from ..graph.split import call, inherit_origin, is_tensor, is_view, reached_from, readers_of, root

aten, ops = torch.ops.aten, torch.ops.actcompile
LEAST = 1 << 21  # elements of a result that it is worth it for


@dataclass(frozen=True)
class _Products:
    """`bias + left[0] @ right[0] + ...`, whose last node is `node`."""

    node: fx.Node
    bias: fx.Node | None
    left: list[fx.Node]
    right: list[fx.Node]


def accumulate(graph: fx.Graph) -> None:
    """Replaces sums of products of large matrices on the CPU, and products whose operand may be written over."""
    graph.eliminate_dead_code()
    for node in reversed(list(graph.nodes)):
        made = _products(node) if node.users and _is_large(node) else None
        if made is None:
            continue
        into = next((i for i, n in enumerate(made.left) if _is_free(n, made)), None)
        if into is not None:
            _write_over(graph, made, into)
        elif len(made.left) > 1:
            with graph.inserting_before(node):
                node.replace_all_uses_with(
                    call(graph, ops.products.default, made.bias, made.left, made.right, like=node)
                )
    graph.eliminate_dead_code()


def _is_large(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and numel_hint(value) >= LEAST


def _products(node: fx.Node) -> _Products | None:
    """A node as a sum of products, each made for it alone."""
    match node:
        case fx.Node(target=aten.mm.default, args=(fx.Node() as left, fx.Node() as right)):
            return _Products(node, None, [left], [right])
        case fx.Node(target=aten.addmm.default, args=(fx.Node() as bias, fx.Node() as left, fx.Node() as right)):
            if node.kwargs:
                return None
            more = _products(bias) if len(bias.users) == 1 and _alike(bias, node) else None
            if more is None:
                return _Products(node, bias, [left], [right]) if bias.meta["val"].dim() == 1 else None
            return _Products(node, more.bias, [*more.left, left], [*more.right, right])
        case fx.Node(target=aten.add.Tensor, args=(fx.Node() as one, fx.Node() as other)):
            if node.kwargs or not all(_alike(n, node) and len(n.users) == 1 for n in (one, other)):
                return None
            first, second = _products(one), _products(other)
            if first is None or second is None or (first.bias and second.bias):
                return None
            return _Products(node, first.bias or second.bias, first.left + second.left, first.right + second.right)
    return None


def _alike(node: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes are matrices of the same sizes and dtype."""
    if not is_tensor(node) or not is_tensor(other):
        return False
    one, two = node.meta["val"], other.meta["val"]
    sizes = zip(one.shape, two.shape, strict=False)
    return one.dim() == two.dim() == 2 and one.dtype == two.dtype and all(_torch.known_true(a == b) for a, b in sizes)


def _is_free(node: fx.Node, made: _Products) -> bool:
    """Whether a result may be written over one of its operands: nothing that depends on it reads what was there."""
    if node.op != "call_function" or is_view(node) or not _alike(node, made.node):
        return False
    operands = [root(n) for n in (*made.left, *made.right, *([made.bias] if made.bias else ()))]
    reached = reached_from(made.node)
    return operands.count(node) == 1 and not any(r.op == "output" or r in reached for r in readers_of(node))


def _write_over(graph: fx.Graph, made: _Products, into: int) -> None:
    """Inserts the call that replaces an operand, behind all that reads the operand."""
    operand = made.left[into]
    early, todo = set(), {n for n in readers_of(operand) if n > made.node}
    while todo:
        node = todo.pop()
        early.add(node)
        todo |= {n for n in node.all_input_nodes if n > made.node} - early
    for node in sorted(early):
        made.node.prepend(node)
    left, right = (n[:into] + n[into + 1 :] for n in (made.left, made.right))
    with graph.inserting_before(made.node):
        both = _torch.call_functional(
            graph, ops.products_.default, into=operand, weight=made.right[into], bias=made.bias, left=left, right=right
        )
        result = graph.call_function(operator.getitem, (both, 1))
    result.meta["val"] = made.node.meta["val"]
    for node in (both, result):
        inherit_origin(node, made.node)
    made.node.replace_all_uses_with(result)
