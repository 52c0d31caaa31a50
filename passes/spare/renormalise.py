"""`renormalise`: backward adds a softmax's exponentials up again, of the scores as they came back.

A softmax's gradient is small: what its weights, which add up to one, multiply is less its own mean. With scores that
were rounded, and their exact sum, or a rounded one, the weights add up to one no more, the mean is not taken off, and
what is left of it is a bias of a tenth of the gradients of GAT's attention. Weights of the rounded scores and of their
own sum are a softmax again. It takes one more pass over numbers of edges, a few to each, and the sum is not saved.

The maximum that is subtracted beforehand stands in both, so that it may be rounded.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from actcompile.kernels.edges.program import parse

from ..graph.bias import STABLE, Dependence
from ..graph.find import SavedActivation
from ..graph.split import Split, call, is_input, is_tensor, is_view, writes

aten, ops = torch.ops.aten, torch.ops.actcompile
FEW = 16  # numbers of a node or of an edge, those of heads, that are added up again
POINTWISE = (aten.add.Tensor, aten.add.Scalar, aten.clone.default)  # what is done to a sum before it is saved


@dataclass(frozen=True)
class Renormalised:
    """A sum of exponentials that backward takes again."""

    activation: SavedActivation

    @property
    def reason(self) -> str:
        return "a softmax's sum: backward adds up the scores that it has, so that its weights add up to one"


def renormalise(
    split: Split, activations: Iterable[SavedActivation], dependences: Mapping[fx.Node, Dependence]
) -> list[Renormalised]:
    """Replaces saved sums of exponentials by sums that backward takes of saved scores; returns what was replaced.

    Args:
        activations: those that may be replaced, as `find` returned them.
        dependences: what `bias` returned, by backward placeholder: only what would be rounded with a bias is replaced.
    """
    made = []
    for activation in activations:
        dependence = dependences.get(activation.placeholder)
        chain = list(_chain(activation.node)) if dependence is not None and dependence.biased else []
        if chain and _is_sum_of_few(chain[-1]) and _Copy(split, activation).write(chain):
            made.append(Renormalised(activation))
    return made


def _chain(node: fx.Node) -> Iterator[fx.Node]:
    """A node, what it was made of by views and by adding a number, and so on; a call of `edges` ends it."""
    yield node
    while node.target is not ops.edges.default:
        first = node.args[0] if node.args else None
        simple = node.target in POINTWISE or node.target is operator.getitem or is_view(node)
        if not simple or not isinstance(first, fx.Node) or node.all_input_nodes != [first]:
            return
        node = first
        yield node


def _is_sum_of_few(node: fx.Node) -> bool:
    """Whether a node adds exponentials up by node, and reads a few numbers of each edge and node only."""
    if node.target is not ops.edges.default:
        return False
    program = parse(node.args[0])  # type: ignore[arg-type]
    (output, *more), operands = program.outputs, node.args[8]
    few = all(_width(tensor) <= FEW for tensor in operands)  # type: ignore[union-attr, arg-type]
    made_by = {f"v{i}": step.op for i, step in enumerate(program.steps)}.get(output.value)
    return output.kind == "sum" and not more and few and made_by == "exp"


def _width(node: fx.Node) -> int:
    sizes = node.meta["val"].shape[1:]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else FEW + 1


class _Copy:
    """A copy of a chain in backward, in place of what was saved of it."""

    def __init__(self, split: Split, activation: SavedActivation) -> None:
        self.split, self.old = split, activation.placeholder
        self.here = {n: p for n, p in split.pairs if n is not activation.node}

    def write(self, chain: list[fx.Node]) -> bool:
        """Writes it, unless backward lacks what it is computed from."""
        sums = chain[-1]
        program, by, row, nodes, heads, columns, indices, rows, operands, grouped = sums.args
        size = nodes.meta["val"] if isinstance(nodes, fx.Node) else nodes
        needed: list[Any] = [by, *indices, *operands]  # type: ignore[misc]
        if not all(n in self.here or _is_alive(n) or _is_number(n) for n in needed) or not self.split.knows(size):
            return False
        graph = self.split.backward.graph
        with graph.inserting_before(min(self.old.users)):
            here = {n: self._in_backward(n) for n in needed}
            number = self.split.size_in_backward(size)
            sort = []
            if grouped:  # as what else goes by these nodes groups them: `arrange` makes one of all
                both = call(graph, ops.group_edges.default, here[by], row, number, like=self.old)
                sort = [call(graph, operator.getitem, both, i, like=self.old) for i in range(2)]
            result = call(
                graph, ops.edges.default, program, here[by], row, number, heads, columns, [here[n] for n in indices],  # type: ignore[union-attr]
                rows, [here[n] for n in operands], sort, like=self.old,  # type: ignore[union-attr]
            )  # fmt: skip
            result.meta |= {key: sums.meta[key] for key in sums.meta if key.startswith("actcompile")}
            for node in reversed(chain[:-1]):
                result = call(graph, node.target, result, *node.args[1:], like=self.old, **node.kwargs)
        result.meta["val"] = self.old.meta["val"]
        # Rounding a score moves its term by a share, however small that is, and no term is negative: so with the sum.
        result.meta[STABLE] = True
        self.old.replace_all_uses_with(result)
        self.split.drop(self.old)
        return True

    def _in_backward(self, node: fx.Node) -> fx.Node:
        if node not in self.here and is_input(node):
            self.here[node] = self.split.save(node, f"{node.name}_alive")
        elif node not in self.here:
            inputs = {n: self._in_backward(n) for n in node.all_input_nodes}
            self.here[node] = self.split.backward.graph.node_copy(node, inputs.__getitem__)
        return self.here[node]


def _is_alive(node: fx.Node) -> bool:
    """Whether a node is an input that backward finds as forward did."""
    return is_input(node) and not any(map(writes, node.users))


def _is_number(node: fx.Node) -> bool:
    """Whether a node makes one number of inputs, or of nothing."""
    one = node.op == "call_function" and is_tensor(node) and node.meta["val"].dim() == 0
    return one and all(_is_alive(n) or _is_number(n) for n in node.all_input_nodes)
