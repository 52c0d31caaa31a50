"""`reals`: a complex tensor is saved as what it is in memory, pairs of floats, which are encoded as any others.

Real and imaginary parts are rounded apart. What is linear in a complex number is linear in both, and a product of two
complex numbers is a sum of products of their parts: `bias` reads complex ops by the rules of real ones.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..graph.find import SavedActivation
from ..graph.split import Split, call, first_use
from .views import Viewed

aten = torch.ops.aten


def reals(split: Split, activations: Iterable[SavedActivation]) -> list[Viewed]:
    """Saves pairs of floats instead of complex numbers; returns what is not saved itself any more.

    Args:
        activations: those that may go, as `find` returned them; only complex ones do.
    """
    found = []
    for activation in activations:
        node, old = activation.node, activation.placeholder
        value = activation.value
        if not value.is_complex():
            continue
        graph = split.forward.graph
        with graph.inserting_after(max(node, *graph.find_nodes(op="placeholder"))):
            plain = call(graph, aten._conj.default, node, like=node) if value.is_conj() else node
        with graph.inserting_after(max(plain, *graph.find_nodes(op="placeholder"))):
            pairs = call(graph, aten.view_as_real.default, plain, like=node)
        saved = split.save(pairs, f"{pairs.name}_pairs", like=node)
        graph = split.backward.graph
        with graph.inserting_before(first_use(old)):
            again = call(graph, aten.view_as_complex.default, saved, like=old)
            if value.is_conj():
                again = call(graph, aten._conj.default, again, like=old)
        old.replace_all_uses_with(again)
        split.drop(old)
        found.append(Viewed(activation, (pairs,)))
    return found
