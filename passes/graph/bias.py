"""How every gradient depends on every saved activation, and so what rounding the activation does to its mean.

Rounding replaces each element of a source `s` by a random one with the same mean, drawn independently of all others. A
gradient that is affine in each element keeps its mean. A product of two values that both hold an element `e` does not:
its mean is off by `Var(e)` times the shares that `e` has in them. The *share* of an element is

- 1 in a value that is made of single elements of `s`: moved, masked, multiplied with something else, or a sum over
  neighbours, which may be one neighbour;
- `1/n` in a mean of `n` elements;
- `1/sqrt(n)` in a sum of `n` elements, for its summands may cancel, so that it is no larger than that.

So `x * mean(x)` of BatchNorm's backward is biased by the variance over `n`, while `x * f(x)` is biased by all of it,
also where the sum or mean over many rows is taken afterwards: that averages the noise, not the bias. A non-linear
function of one element is biased by its variance; of a mean, by that of the mean. Where the function is *steep* near
zero (a divisor, a logarithm, a root), no variance bounds the bias: what matters is the error relative to the element.
Where its argument is a sum that may cancel, not even that does: rounding may make zero of it.

`bias` follows the shares through the backward graph, op by op, by the rules of `linearity`, and returns for each source
the worst product, as the number `n` by which its variance is divided. Whatever it cannot prove counts as made of single
elements, non-linearly: an op without a rule, an op that writes into its arguments, a node without `meta["val"]`. So
"unbiased" is a proof, while "biased" may be caution: `exp(log(x))` is called biased through `aten.log.default`.

Affine in each element would be enough where elements are rounded apart. A random projection rounds all elements of a
row together, so "unbiased" here is more: no product of the source with itself at all, not even of different elements.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from . import _torch
from .bodies import BODY, operands_of
from .linearity import Polynomial, Term, rule_for
from .signs import never_negative
from .split import is_view

STEEP = {"div": "other", "reciprocal": "self", "rsqrt": "self", "sqrt": "self", "pow": "self"}  # op -> argument
STEEP |= {"log": "self", "log2": "self", "log10": "self"}
AWAY = 0.05  # what is larger is not near zero
TINY = 1e-6  # what is added to a divisor so that it is not zero
POWERS = {"mul", "div", "abs", "relu", "where", "sqrt", "rsqrt", "reciprocal", "pow", "square", "exp", "sigmoid"}
POWERS |= {"maximum", "minimum", "leaky_relu", "cat", "stack"}  # what they make is as exact, relative to itself
SUMS = {"add", "sum", "mean", "scatter_add", "index_add", "index_put"}  # so are theirs, of what is never negative
SPREADS = ("aten.var", "aten.var_mean", "aten.std")  # made of sums, but not linear
NEARLY = 4  # a sum of n elements times 1 / n up to such a factor is a mean: 1 / (n - 1), 2 / n


@dataclass(frozen=True)
class Share:
    """Some elements of a value are sums over `summed` elements of a source, or means where they were `divided`.

    `repeats`: single elements stand in the value so often, by broadcasts and takes: a sum over repeats is none.
    """

    summed: float = 1.0
    divided: bool = False
    repeats: float = 1.0

    @property
    def size(self) -> float:
        """What one element of the source contributes, relative to the whole."""
        return 1 / self.summed if self.divided else 1 / math.sqrt(self.summed)

    def meets(self, other: Share) -> float:
        """The variance of one element is divided by so many in the mean of a product of two such values."""
        common = min(self.summed, other.summed)
        return max(1.0, 1 / (common * self.size * other.size))


ELEMENT = Share()


@dataclass(frozen=True)
class Form:
    """How a value depends on one source.

    Attributes:
        shares: those that occur among the elements of the value.
        averaged_over: its mean is off by the variance of an element over so many; infinite where it is not off, 0 where
            a function that is steep near zero was taken of single elements, -1 where of what rounding may make zero.
        through: the op that did so.
        relative: whether the value is zero only where it would be without rounding, if no element is rounded to zero.
    """

    shares: frozenset[Share] = frozenset((ELEMENT,))
    averaged_over: float = math.inf
    through: fx.Node | None = None
    relative: bool = True

    def biased(self, over: float, node: fx.Node) -> Form:
        """This form, after `node` made a product that moves the mean by the variance over so many."""
        return replace(self, averaged_over=over, through=node) if over < self.averaged_over else self

    def unknown(self, node: fx.Node) -> Form:
        """This form, after `node` may have done anything to single elements."""
        return replace(self, shares=self.shares | {ELEMENT}).biased(1.0, node)

    def without_bias(self) -> Form:
        """What decides what an op makes of this form, and no more: equal for most sources of a deep network."""
        return Form(self.shares, relative=self.relative)


STABLE = "actcompile_stable"
"""In the meta of a node of backward: of its elements that are read, rounding moves none by much of itself."""
MOVES = (torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default, torch.ops.aten.clone.default)

Forms = dict[fx.Node, Form]
"""By source; absent where a value does not depend on it."""


@dataclass(frozen=True)
class Dependence:
    """How the gradients depend on one saved activation.

    Attributes:
        biased: whether rounding it moves the mean of a gradient.
        through: the op of the backward graph that does so most.
        averaged_over: the bias is the rounding's variance over so many elements; 1: element by element; 0: no bias.
        steep: element by element, through a function that is steep near zero.
        vanishing: through such a function of a value that rounding may make zero, however small it is.
    """

    biased: bool
    through: fx.Node | None = None
    averaged_over: int = 0
    steep: bool = False
    vanishing: bool = False

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
    """Says for each of `sources` what rounding it, without bias and independently of the others, does to the outputs.

    Args:
        backward: the graph of AOTAutograd's backward function, before or after decomposition, with `meta["val"]`.
        sources: the tensors to be rounded: placeholders of `backward`, or values in whose place one would come.

    The answer for one source holds whether the other sources are rounded too or kept.

    Raises:
        ValueError: a source is no value of `backward`.
    """
    for source in sources:
        if source.graph is not backward or source.op == "output":
            raise ValueError(f"sources: {source} is no value of the backward graph")
    return _Propagation(backward, sources).run()


class _Propagation:
    """One walk through the graph, in order. An op with several outputs has a list of forms, one for each."""

    def __init__(self, graph: fx.Graph, sources: Sequence[fx.Node]) -> None:
        self.graph = graph
        self.values: dict[fx.Node, Forms | list[Forms]] = {source: {source: Form()} for source in sources}
        self.sources = sources
        self.stable = {node for node in graph.nodes if STABLE in node.meta}

    def run(self) -> dict[fx.Node, Dependence]:
        seen: list[Forms] = []  # by whoever runs the graph: outputs, and effects
        for node in self.graph.nodes:
            if node.op == "output":
                seen.append(self.of(node.args))
            elif node.op != "placeholder" and node not in self.values:
                self.values[node] = self.call(node)
                self.move(node)
                if _has_effect(node):
                    seen.append(self.unknown(node, self.of((node.args, node.kwargs))))
        forms = self.join(seen)
        return {s: _dependence(forms.get(s)) for s in self.sources}

    def call(self, node: fx.Node) -> Forms | list[Forms]:
        if not any(self.values.get(n) for n in node.all_input_nodes):
            return {}
        everything = functools.partial(self.of, (node.args, node.kwargs))
        if BODY in node.meta:
            return [self.inside(node, node.meta[BODY])]
        if node.target is operator.getitem:
            whole, index = node.args
            parts = self.values.get(whole) if isinstance(whole, fx.Node) else None
            if isinstance(parts, list) and isinstance(index, int):
                return parts[index]
            alone = isinstance(whole, fx.Node) and not self.of(index)
            return everything() if alone else self.unknown(node, everything())
        if str(getattr(node.target, "overloadpacket", "")) in SPREADS:
            return self.spread(node, everything())
        found = None if _has_effect(node) else rule_for(node)
        if "val" not in node.meta or (found is None and not _is_pointwise(node)):
            return self.unknown(node, everything())
        value = node.meta["val"]
        if found is None:
            given = {str(i): a for i, a in enumerate((*node.args, *node.kwargs.values()))}
            return self.apply(node, Polynomial((), frozenset()), given, value)
        rule, bound = found
        if len(rule.outputs) == 1:
            return self.apply(node, rule.outputs[0], bound, value)
        return [self.apply(node, out, bound, v) for out, v in zip(rule.outputs, value, strict=True)]

    def inside(self, node: fx.Node, body: fx.Graph) -> Forms:
        """The forms of what a fused region computes, op by op; its operands are the last list of its arguments."""
        inputs = body.find_nodes(op="placeholder")
        for inner, given in zip(inputs, operands_of(node), strict=False):
            self.values[inner] = self.of(given)
            if given in self.stable:
                self.stable.add(inner)
        for inner in body.nodes:
            if inner.op == "call_function":
                self.values[inner] = self.call(inner)
                self.move(inner)
        return self.of(body.output_node().args[0])

    def move(self, node: fx.Node) -> None:
        """Notes that elements of what is stable are, wherever an op puts them."""
        if node.args and node.args[0] in self.stable and (is_view(node) or node.target in MOVES):
            self.stable.add(node)

    def apply(self, node: fx.Node, output: Polynomial, bound: Mapping[str, Any], value: Any) -> Forms:
        """The forms of one output of a call with the arguments `bound`, by name."""
        arguments = {
            name: forms for name, given in bound.items() if name not in output.ignored and (forms := self.of(given))
        }
        if not _is_float(value):
            return self.unknown(node, self.join(arguments.values()))
        result: Forms = {}
        made: dict[Any, Form] = {}  # by what decides it
        for source in dict.fromkeys(s for forms in arguments.values() for s in forms):
            given = {name: forms[source] for name, forms in arguments.items() if source in forms}
            key = tuple((name, form.shares, form.relative) for name, form in given.items())
            if key not in made:
                alike = {name: form.without_bias() for name, form in given.items()}
                made[key] = self.form(node, output, bound, value, alike)
            form, worst = made[key], _worst(given.values())
            if worst.averaged_over <= form.averaged_over:
                form = Form(form.shares, worst.averaged_over, worst.through, form.relative)
            result[source] = form
        return result

    def form(
        self, node: fx.Node, output: Polynomial, bound: Mapping[str, Any], value: Any, given: Mapping[str, Form]
    ) -> Form:
        """The form by one source of one output of a call, by the forms of its arguments, none of them biased."""
        form = _joined(_moved(given[name], *place) for name in given for place in _places(output, name, bound, value))
        for one, other in _meeting(output, given):
            if other in output.named or _is_pointwise(node):
                over = min(a.meets(b) for a in given[one].shares for b in given[other].shares)
                single = any(share.summed == 1 for share in given[other].shares)
                steep = single and bound.get(other) not in self.stable and _is_steep(node, bound.get(other))
                form = form.biased((0.0 if given[other].relative else -1.0) if steep else over, node)
            else:
                form = form.unknown(node)
        if not (form.relative and _is_relative(node, output)):
            form = replace(form, relative=False)
        return _scaled(form, _factor(node))

    @staticmethod
    def spread(node: fx.Node, forms: Forms) -> Forms:
        """The forms of a variance: of means over its dimensions, and off by all of an element's variance."""
        operand, bound = node.args[0].meta["val"], {"dim": node.args[1] if len(node.args) > 1 else None}  # type: ignore[union-attr]
        count = _torch.least_product(_reduced(Term(("input",), "sum"), bound, operand))
        return {source: _moved(form, 1.0, count, True).biased(1.0, node) for source, form in forms.items()}

    def of(self, argument: Any) -> Forms:
        """The forms of an argument: a node, or containers that hold nodes, all of them added up."""
        if isinstance(argument, fx.Node) and not isinstance(forms := self.values.get(argument, {}), list):
            return forms
        found: list[Forms] = []

        def collect(node: fx.Node) -> fx.Node:
            value = self.values.get(node, {})
            found.extend(value if isinstance(value, list) else [value])
            return node

        fx.map_arg(argument, collect)
        return self.join(found)

    @staticmethod
    def join(values: Iterable[Forms]) -> Forms:
        """The forms of a sum."""
        result: dict[fx.Node, list[Form]] = {}
        for forms in values:
            for source, form in forms.items():
                result.setdefault(source, []).append(form)
        return {source: _joined(forms) for source, forms in result.items()}

    @staticmethod
    def unknown(node: fx.Node, forms: Forms) -> Forms:
        """Anything may have been done to single elements."""
        return {source: form.unknown(node) for source, form in forms.items()}


def _joined(forms: Iterable[Form]) -> Form:
    """The form of a sum; of equal biases the op that comes first."""
    forms = list(forms)
    if len(forms) == 1:
        return forms[0]
    worst = _worst(forms)
    shares = frozenset(share for form in forms for share in form.shares)
    return Form(shares, worst.averaged_over, worst.through, all(form.relative for form in forms))


def _worst(forms: Iterable[Form]) -> Form:
    return min(forms, key=lambda f: (f.averaged_over, f.through is None, f.through))


def _meeting(output: Polynomial, given: Mapping[str, Form]) -> Iterator[tuple[str, str]]:
    """The pairs of arguments, of those that depend on one source, that an op multiplies, or may multiply.

    The second of a pair is one that the op is not affine in, if any of the two is.
    """
    names = sorted(given, key=lambda name: name not in output.named)
    for i, other in enumerate(names):
        for one in names[: i + (other not in output.named)]:
            if other not in output.named or any({one, other} <= set(term.factors) for term in output.terms):
                yield one, other


def _places(output: Polynomial, name: str, bound: Mapping[str, Any], value: Any) -> Iterator[tuple[float, float, bool]]:
    """How an argument gets into a result: how often an element stands there, of how many a sum is, whether a mean."""
    given = bound.get(name)
    operand = given.meta.get("val") if isinstance(given, fx.Node) else None
    for term in [term for term in output.terms if name in term.factors] or [Term((name,))]:
        if not isinstance(operand, torch.Tensor) or not isinstance(value, torch.Tensor):
            yield 1.0, 1.0, False
            continue
        count = _torch.least_product(_reduced(term, bound, operand)) if term.reduce else 1
        repeats = _torch.most_ratio(value.shape, operand.shape) * count
        yield max(repeats, 1.0), max(count, 1.0), term.reduce == "mean"


def _moved(form: Form, repeats: float, count: float, mean: bool) -> Form:
    """The form of an argument after it was brought to its places in a result, and added up there."""
    if repeats == count == 1:
        return form
    shares = set()
    for share in form.shares:
        if share.summed == 1:
            apart = count / share.repeats
            often = max(1.0, share.repeats / count) * repeats
            share = Share(apart, mean) if apart > 1 else Share(repeats=often)
        shares.add(share)
    return replace(form, shares=frozenset(shares))


def _reduced(term: Term, bound: Mapping[str, Any], operand: torch.Tensor) -> list[Any]:
    """The sizes of the dimensions that an op adds up."""
    if len(term.factors) > 1:  # the last one of the first factor: of matrices, and of vectors
        first = bound[term.factors[0]].meta.get("val")
        return [] if first is None else [first.shape[-1]]
    dims = bound.get("dim", bound.get("dims"))
    if dims is None or dims == [] or operand.dim() == 0:  # a number may be summed up over a dimension that it has not
        return list(operand.shape)
    return [operand.shape[d] for d in ([dims] if isinstance(dims, int) else dims)]


def _factor(node: fx.Node) -> float:
    """The number that a call multiplies a tensor with, 1 where it is none."""
    name = str(getattr(node.target, "overloadpacket", ""))
    if name not in ("aten.mul", "prims.mul", "aten.div", "prims.div") or len(node.args) < 2:
        return 1.0
    number = next((n for a in node.args[:2] if (n := _torch.number(a)) is not None), None)
    if number is None or number == 0:
        return 1.0
    return abs(1 / number) if name.endswith("div") else abs(number)


def _scaled(form: Form, factor: float) -> Form:
    """Sums over n that are multiplied with about 1/n are means."""
    means = [s for s in form.shares if s.summed > NEARLY and 1 / NEARLY <= s.summed * factor <= NEARLY]
    return replace(form, shares=form.shares - {*means} | {replace(s, divided=True) for s in means})


def _dependence(form: Form | None) -> Dependence:
    if form is None or form.averaged_over == math.inf:
        return Dependence(False)
    over = form.averaged_over
    return Dependence(True, form.through, max(1, int(over)), steep=over <= 0, vanishing=over < 0)


def _is_relative(node: fx.Node, output: Polynomial) -> bool:
    """Whether an op makes zero only of zeros: one that moves elements, powers and products, sums without cancelling."""
    name = str(getattr(node.target, "overloadpacket", "")).partition(".")[2]
    if name in SUMS:
        numbers = [abs(n) for a in node.args[:2] if (n := _torch.number(a)) is not None]
        if numbers and name == "add":
            return max(numbers) <= TINY or never_negative(node)
        return never_negative(node)
    (first, *more) = output.terms or (None,)
    return name in POWERS or (first is not None and not more and not first.reduce and len(first.factors) == 1)


def _is_steep(node: fx.Node, argument: Any) -> bool:
    """Whether a call takes a function that is steep near zero of an argument which may be near zero."""
    name = str(getattr(node.target, "overloadpacket", "")).partition(".")[2]
    position = {"other": 1, "self": 0}.get(STEEP.get(name, ""))
    if position is None or len(node.args) <= position or node.args[position] is not argument:
        return False
    if name == "pow":
        power = _torch.number(node.args[1])
        return power is None or power < 0 or not power.is_integer()
    return not _is_away(argument)


def _is_away(node: Any) -> bool:
    """Whether a value is never near zero: what is never negative, and a number added."""
    if not isinstance(node, fx.Node) or node.target not in (torch.ops.aten.add.Tensor, torch.ops.aten.add.Scalar):
        return False
    numbers = [n for a in node.args[:2] if (n := _torch.number(a)) is not None]
    values = [a for a in node.args[:2] if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), torch.Tensor)]
    return len(values) == 1 and bool(numbers) and numbers[0] >= AWAY and never_negative(values[0])


def _is_pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


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
