"""Which gradients a saved activation reaches, compared with what changes when that activation alone is changed."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from actcompile.passes.graph.find import find
from actcompile.passes.graph.reach import reach
from actcompile.passes.graph.split import Split
from actcompile.passes.plan.plan import is_constant
from tests.helpers import gnn, graph, uncompressed


def disturb(graph: fx.Graph, placeholder: fx.Node) -> None:
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        other = graph.call_function(torch.ops.aten.mul.Tensor, (placeholder, -1.5))  # its sign may be what is read
    other.meta["val"] = placeholder.meta["val"]
    placeholder.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)


def test_a_disturbed_activation_changes_as_many_gradients_as_it_reaches() -> None:
    """Every saved float of a SAGE with BatchNorm in turn; of the first layer's biases, which BatchNorm subtracts again,
    the gradients are zero, so that a change of them need not show."""
    torch.manual_seed(0)
    model, inputs = gnn("sage", dropout=0.0, hidden=8), graph()
    parameters = list(model.parameters())
    reached: dict[str, tuple[int, ...]] = {}

    def gradients(disturbed: str = "") -> list[Tensor]:
        def look(split: Split) -> None:
            positions = reach(split)
            for a in find(split):
                if a.refusal is None and a.value.is_floating_point() and not is_constant(a.node):
                    reached[a.node.name] = positions[a.placeholder]
                    if a.node.name == disturbed:
                        disturb(split.backward.graph, a.placeholder)

        torch._dynamo.reset()
        return list(torch.autograd.grad(uncompressed(model, look)(*inputs).square().sum(), parameters))

    exact = gradients()
    assert len(reached) > 3
    for name in list(reached):
        changed = sum(not torch.equal(a, b) for a, b in zip(gradients(name), exact, strict=True))
        assert 0 < changed <= len(reached[name]) <= changed + 1, name
    assert len({len(positions) for positions in reached.values()}) > 1  # some reach more than others
