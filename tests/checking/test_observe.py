"""Observing changes nothing that is computed, and shows what is saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcompile
from actcompile.checking.observe import observed
from actcompile.passes.plan.plan import Choice
from tests.helpers import SAVED, Mlp, assert_close, assert_equal, gnn, graph, loss, quickly, step, uncompressed


@pytest.fixture(autouse=True)
def one_graph() -> Iterator[None]:
    """Attention layers add self-loops, which breaks the graph, and a break in one model leaves marks on others."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


class Seen:
    """Keeps copies of what was looked at."""

    def __init__(self) -> None:
        self.choices: list[Choice] = []
        self.values: list[Tensor] = []

    def __call__(self, choice: Choice, value: Tensor) -> None:
        self.choices.append(choice)
        self.values.append(value.clone())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["sage", "gin", "gat"])
def test_outputs_and_gradients_are_exact_with_dropout(name: str) -> None:
    model, inputs = gnn(name, dropout=0.5), graph()
    parameters = list(model.parameters())
    ours = step(observed(model, Seen(), **SAVED, fuse=False), inputs, parameters)
    torch._dynamo.reset()
    exact = step(uncompressed(model), inputs, parameters)
    assert_equal(ours[:1], exact[:1])
    for found, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in parameters)


INNER = [(name, inner) for name in ("sage", "gat") for inner in ("aot_eager", "inductor")]


@pytest.mark.parametrize(("name", "inner"), quickly(INNER, [("gat", "inductor")]))
def test_looks_once_at_each_float_that_the_report_says_is_quantised(name: str, inner: str) -> None:
    model, inputs, seen = gnn(name), graph(), Seen()
    options = {**SAVED, "inner": inner}
    observed(model, seen, **options)(*inputs)
    report = actcompile.explain(gnn(name), *inputs, options=options)
    expected = [(r.module, r.name, r.codec) for g in report.graphs for r in g.rows]
    found = [(c.activation.module, c.activation.node.name, str(c.codec)) for c in seen.choices]
    assert found and sorted(found) == sorted(row for row in expected if row[2].startswith("quantize"))
    assert all(v.dim() == c.activation.value.dim() for c, v in zip(seen.choices, seen.values, strict=True))


def test_gradients_are_exact_with_the_graphs_of_inductor() -> None:
    model, inputs = gnn("sage", dropout=0.0, norm=False), graph()  # a bias before BatchNorm has a gradient of zero
    parameters = list(model.parameters())
    ours = step(observed(model, Seen(), min_bytes=0, replay=0, inner="inductor"), inputs, parameters)
    assert_close(ours, step(model, inputs, parameters), 1e-4)


def test_shows_the_activation_itself_in_training_mode() -> None:
    model, seen = Mlp(), Seen()
    x = torch.randn(64, 16)
    torch.manual_seed(3)
    out = observed(model, seen, **SAVED)(x)
    (hidden,) = seen.values  # the input of the last layer
    torch.testing.assert_close(model.last(hidden), out)
    assert 0.6 < float((hidden == 0).float().mean()) < 0.9  # half by ReLU, half of the rest by dropout


def test_values_come_in_the_order_in_which_blocks_are_cut() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 32), nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).sin().t())

    model, seen = Turned(), Seen()
    observed(model, seen, **SAVED)(torch.randn(64, 16))
    pairs = zip(seen.choices, seen.values, strict=True)
    turned = [(c, v) for c, v in pairs if not c.activation.value.is_contiguous()]
    assert turned and all(v.is_contiguous() and v.shape == c.activation.value.t().shape for c, v in turned)


def test_training_steps_are_those_of_the_plain_model() -> None:
    def train(compiled: Any, parameters: list[Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            loss(compiled(*inputs)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in parameters]

    inputs, seen = graph(), Seen()
    first, second = gnn("sage"), gnn("sage")
    ours = train(observed(first, seen, **SAVED), list(first.parameters()))
    torch._dynamo.reset()
    for found, expected in zip(ours, train(uncompressed(second), list(second.parameters())), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(seen.choices) == 3 * len({c.activation.node for c in seen.choices}) > 0


def test_nothing_is_seen_without_gradients() -> None:
    model, seen = Mlp().eval(), Seen()
    with torch.no_grad():
        observed(model, seen, **SAVED)(torch.randn(64, 16))
    assert not seen.choices


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="unknown option 'bit'"):
        observed(Mlp(), Seen(), bit=2)


def test_a_piece_of_a_tensor_is_seen_as_it_is_cut_into_blocks() -> None:
    layer, seen = nn.Linear(16, 64), Seen()

    def model(x: Tensor) -> Tensor:
        return layer(x).view(-1, 4, 16)[:, 1::2].transpose(0, 1).sin().sum()

    observed(model, seen, **SAVED)(torch.randn(32, 16))
    ((choice,), (value,)) = seen.choices, seen.values
    assert choice.activation.shape == (32, 2, 16) and value.shape == (32, 2, 16) and value.is_contiguous()
