"""What is called never negative is not."""

import pytest
import torch

from actcompile.passes.graph.signs import never_negative
from tests.helpers import Mlp, gnn, graph, uncompressed

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def verdicts(function, *inputs):
    """Runs a compiled forward graph node by node: (op, called never negative, smallest value) of every float."""
    found = []

    class Look(torch.fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                found.append((str(node.target), never_negative(node), float(value.min())))
            return value

    def transform(split):
        transform.graph = split.forward

    uncompressed(function, transform)(*inputs)
    with torch.no_grad():
        Look(transform.graph).run(*arguments(transform.graph, function, inputs))
    return found


def arguments(module, function, inputs):
    """Any values of the right shapes: what is never negative is so for all."""
    values = []
    for node in module.graph.find_nodes(op="placeholder"):
        fake = node.meta["val"]
        if fake.is_floating_point():
            values.append(torch.randn(fake.shape))
        else:
            same = [t for t in inputs if t.shape == fake.shape and t.dtype == fake.dtype]
            values.append(same[0] if same else torch.zeros(fake.shape, dtype=fake.dtype))
    return values


@pytest.mark.parametrize("name", ["sage", "gin", "gat", "max_min", "edge_mlp"])
def test_of_a_gnn(name):
    found = verdicts(gnn(name, layers=3), *graph())
    claimed = [(op, least) for op, claims, least in found if claims]
    assert claimed and all(least >= 0 for _, least in claimed), claimed
    assert any(not claims and least < 0 for _, claims, least in found)


def test_the_mean_of_what_relu_passed_is_seen_through_dropout_and_messages():
    found = verdicts(gnn("sage", layers=3), *graph())
    means = [claims for op, claims, _ in found if op == "aten.div.Tensor"]
    assert means == [False, True, True]  # of the features; of what dropout returned


@pytest.mark.parametrize(
    "negative",
    [
        lambda x: x.relu() * -1.0,
        lambda x: x.relu() - 1,
        lambda x: torch.sub(x.relu(), x.relu(), alpha=2),
        lambda x: x.relu() + x,
        lambda x: x.clamp_min(-1),
        lambda x: torch.where(x > 0, x, -1.0),
        lambda x: torch.add(x.relu(), x.relu(), alpha=-3),
        lambda x: torch.nn.functional.pad(x.relu(), (1, 1), value=-1.0),
        lambda x: x.relu() / -2,
        lambda x: x.tanh(),
    ],
)
def test_what_can_be_negative_is_not_claimed(negative):
    torch.manual_seed(0)
    w = torch.randn(16, 16, requires_grad=True)
    found = verdicts(lambda x: negative(x @ w).exp().sum(), torch.randn(32, 16))
    assert any(least < 0 and not claims for _, claims, least in found)
    assert all(least >= 0 for _, claims, least in found if claims)


def test_a_module_without_relu_has_no_such_values():
    assert not any(claims for op, claims, _ in verdicts(torch.nn.Linear(4, 4), torch.randn(8, 4)))
    assert any(claims for op, claims, _ in verdicts(Mlp(), torch.randn(8, 16)) if op == "aten.relu.default")
