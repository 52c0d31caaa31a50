"""`apart`: where a rounded activation would meet itself in backward, what backward makes of it is saved beside it.

BatchNorm's backward asks for its input. Where that is `a * b`, min-cut saves `a` and `b` and multiplies again. The
gradient of `a` then holds `b` twice, once from the product and once as a factor, and rounding biases it by all of its
variance, so that both take 8 bits. But forward has the product. Saved in 2 bits of its own, it is rounded independently
of `a` and `b`, these meet nothing of themselves any more and take 2 bits, too: six for sixteen. The same holds for
gates, quotients, and the sum of a residual connection between two norms. What is made of one activation alone, as
`1 - s` of a sigmoid, is left: two tensors in 2 bits would be much noisier than the one in 8.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..graph.bias import Dependence, bias
from ..graph.find import SavedActivation, numel_hint
from ..graph.split import Split, is_tensor, is_view
from ..plan.plan import bits_of
from ..plan.policy import Policy
from .masks import is_pure

MOST_TRIED = 24  # values made of one activation
LEAST_GAIN = 0.9  # of the bits that were taken; less is not worth an encoder more
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Costs:
    """Bits that activations and values take, by how the gradients depend on them."""

    split: Split
    policy: Callable[[fx.Node], Policy]

    def of(self, node: fx.Node, dependence: Dependence) -> float:
        """Bits of a saved placeholder, or of a value that would be saved."""
        value = node.meta["val"]
        numel = numel_hint(value)
        bits = bits_of(dependence, value, self.policy(node))
        return float(numel * (bits or 8 * value.dtype.itemsize))

    def together(self, sources: Iterable[fx.Node], cut: fx.Node | None = None) -> float:
        """Bits of `sources`, and of the value `cut` in case it is saved."""
        graph = self.split.backward.graph
        used = [s for s in sources if _reaches(s, cut)]
        nodes = [*used, *([cut] if cut else [])]
        found = bias(graph, nodes)
        return sum(self.of(node, found[node]) for node in nodes)


def apart(split: Split, activations: Iterable[SavedActivation], policy: Callable[[fx.Node], Policy]) -> set[fx.Node]:
    """Saves values that backward computes from activations which need fewer bits for it; returns them, of forward.

    Args:
        activations: floats that may be rounded.
        policy: that of a node of either graph.
    """
    sources = [a.placeholder for a in activations]
    costs = _Costs(split, policy)
    made: set[fx.Node] = set()
    while (value := _worth_saving(sources, costs)) is not None:
        made.add(_save(split, value))
        still = {placeholder for _, placeholder in split.pairs}
        sources = [source for source in sources if source in still]
    return made


def _worth_saving(sources: Sequence[fx.Node], costs: _Costs) -> fx.Node | None:
    """The value that spares most bits of the first source which needs many, and for which there is one."""
    found = bias(costs.split.backward.graph, sources)
    origins = _recomputed(costs.split, sources)
    for source in (s for s in sources if found[s].averaged_over == 1):
        best, least = None, LEAST_GAIN
        for value in [v for v, s in origins.items() if source in s and len(s) > 1][:MOST_TRIED]:
            before, after = costs.together(origins[value]), costs.together(origins[value], value)
            if after < least * before:  # nothing is spared of tensors without elements
                best, least = value, after / before
        if best is not None:
            return best
    return None


def _recomputed(split: Split, sources: Iterable[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """Floats that backward computes of what is saved alone, in order, and the sources that each is made of."""
    made: dict[fx.Node, set[fx.Node]] = {p: set() for _, p in split.pairs} | {s: {s} for s in sources}
    placeholders = set(made)
    for node in split.backward.graph.nodes:
        if node.op == "call_function" and is_pure(node) and all(n in made for n in node.all_input_nodes):
            made[node] = set().union(*(made[n] for n in node.all_input_nodes))
    return {n: s for n, s in made.items() if s and n not in placeholders and _may_be_saved(n)}


def _may_be_saved(node: fx.Node) -> bool:
    return is_tensor(node) and node.meta["val"].dtype in FLOATS and not is_view(node)


def _reaches(source: fx.Node, cut: fx.Node | None) -> bool:
    """Whether backward still needs a source where it is given `cut`."""
    seen, todo = {cut}, [source]
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                return True
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def _save(split: Split, value: fx.Node) -> fx.Node:
    node = split.copy_to_forward(value, split.origin())
    placeholder = split.save(node, f"{value.name}_apart")
    value.replace_all_uses_with(placeholder)
    split.drop_unused()
    return node
