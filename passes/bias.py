"""Which saved activations may be rounded without biasing any gradient.

Rounding replaces a source `s` by a random `r(s)` with mean `s`, drawn independently of every other source. A gradient
`f` with `f(E r(s)) = E f(r(s))` keeps its mean; this holds for every distribution of `r(s)` exactly if `f` is affine in
the whole tensor `s` while all else is held. With several sources rounded at once it is enough that `f` is affine in
each: independence turns the mean of a product of different sources into the product of their means.

Affine in the whole tensor is more than needed where the *elements* of a source are rounded independently of one
another: `x0 * x1` of one source would keep its mean, only `x0 * x0` would not. We ask for the stronger property, since
a random projection rounds all elements of a row together, and since ops on whole tensors (`x.T @ x`, the
`h * sum(g * h)` of a normalisation) nearly always hold some square.

`bias` proves affinity op by op, by the rules of `linearity`. Whatever it cannot prove it calls biased: an op without a
rule, an op that writes into its arguments, a node that does not know its dtype (no `meta["val"]`). So "unbiased" is a
proof, while "biased" may be caution: `exp(log(x))` is called biased through `aten.log.default`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from actcompile.passes.linearity import Polynomial, rule_for

Degrees: TypeAlias = dict[fx.Node, fx.Node | None]
"""How a value depends on each source: absent from the dict, affine (None), or non-linear, since this node."""


@dataclass(frozen=True)
class Dependence:
    """How the gradients depend on one saved activation.

    `through` is the first op of the backward graph that makes an output of the graph non-linear in it.
    """

    biased: bool
    through: fx.Node | None = None

    @property
    def op(self) -> str:
        """The name of that op, such as `"aten.mul.Tensor"`; empty where there is none."""
        return "" if self.through is None else op_name(self.through)


def op_name(node: fx.Node) -> str:
    """A readable name of what a node calls, such as `"aten.mul.Tensor"`."""
    target = node.target
    if isinstance(target, str) or hasattr(target, "overloadpacket"):
        return str(target)
    return getattr(target, "__name__", str(target))


def bias(backward: fx.Graph, sources: Sequence[fx.Node]) -> dict[fx.Node, Dependence]:
    """Says for each of `sources` whether rounding it without bias, independently of the others, biases an output.

    Args:
        backward: the graph of AOTAutograd's backward function, before or after decomposition, with `meta["val"]`.
        sources: placeholders of `backward` that stand for the tensors to be rounded.

    The answer for one source holds whether the other sources are rounded too or kept.

    Raises:
        ValueError: a source is not a placeholder of `backward`.
    """
    for source in sources:
        if source.graph is not backward or source.op != "placeholder":
            raise ValueError(f"sources: {source} is not a placeholder of the backward graph")
    return _Propagation(backward, sources).run()


class _Propagation:
    """One walk through the graph, in order. An op with several outputs has a list of degrees, one for each."""

    def __init__(self, graph: fx.Graph, sources: Sequence[fx.Node]) -> None:
        self.graph = graph
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.values: dict[fx.Node, Degrees | list[Degrees]] = {source: {source: None} for source in sources}
        self.sources = sources

    def run(self) -> dict[fx.Node, Dependence]:
        seen: list[Degrees] = []  # by whoever runs the graph: outputs, and effects
        for node in self.graph.nodes:
            if node.op == "output":
                seen.append(self.of(node.args))
            elif node.op != "placeholder":
                self.values[node] = self.call(node)
                if _has_effect(node):
                    seen.append(self.nonlinear(node, self.of((node.args, node.kwargs))))
        degrees = self.join(seen)
        return {s: Dependence(degrees.get(s) is not None, degrees.get(s)) for s in self.sources}

    def call(self, node: fx.Node) -> Degrees | list[Degrees]:
        everything = self.of((node.args, node.kwargs))
        if not everything:
            return {}
        if node.target is operator.getitem:
            whole, index = node.args
            parts = self.values.get(whole) if isinstance(whole, fx.Node) else None
            if isinstance(parts, list) and isinstance(index, int):
                return parts[index]
            return everything if isinstance(whole, fx.Node) and not self.of(index) else self.nonlinear(node, everything)
        found = None if _has_effect(node) else rule_for(node)
        if found is None or "val" not in node.meta:
            return self.nonlinear(node, everything)
        rule, bound = found
        arguments = {name: degrees for name, value in bound.items() if (degrees := self.of(value))}
        value = node.meta["val"]
        if len(rule.outputs) == 1:
            return self.apply(node, rule.outputs[0], arguments, _is_float(value))
        return [self.apply(node, out, arguments, _is_float(v)) for out, v in zip(rule.outputs, value, strict=True)]

    def apply(self, node: fx.Node, output: Polynomial, arguments: dict[str, Degrees], is_float: bool) -> Degrees:
        arguments = {name: degrees for name, degrees in arguments.items() if name not in output.ignored}
        result = self.join(arguments.values())
        for source, through in result.items():
            depending = frozenset(name for name, degrees in arguments.items() if source in degrees)
            if through is None and not (is_float and output.affine_in(depending)):
                result[source] = node
        return result

    def of(self, argument: Any) -> Degrees:
        """The degrees of an argument: a node, or containers that hold nodes, all of them added up."""
        found: list[Degrees] = []

        def collect(node: fx.Node) -> fx.Node:
            value = self.values.get(node, {})
            found.extend(value if isinstance(value, list) else [value])
            return node

        fx.map_arg(argument, collect)
        return self.join(found)

    def join(self, values: Iterable[Degrees]) -> Degrees:
        """The degrees of a sum: non-linear where one summand is, since the earliest node that made one so."""
        result: Degrees = {}
        for degrees in values:
            for source, through in degrees.items():
                known = result.get(source)
                if known is None or (through is not None and self.order[through] < self.order[known]):
                    result[source] = through
        return result

    @staticmethod
    def nonlinear(node: fx.Node, degrees: Degrees) -> Degrees:
        return {source: through or node for source, through in degrees.items()}


def _has_effect(node: fx.Node) -> bool:
    """Whether a call may do more than give back a value: write into an argument, or keep it elsewhere.

    Higher-order ops and Python functions do not say, so they may.
    """
    return node.target is not operator.getitem and (not hasattr(node.target, "overloadpacket") or node.is_impure())


def _is_float(value: Any) -> bool:
    """Whether a value can be affine in a source: all its tensors are of a float dtype of two bytes or more.

    Casts to integers round, and so do those to fp8, coarsely and always to the nearest.
    """
    if isinstance(value, torch.Tensor):
        return (value.is_floating_point() or value.is_complex()) and value.dtype.itemsize >= 2
    if isinstance(value, (list, tuple)):
        return all(_is_float(item) for item in value)
    return value is None
