"""Short recurrences stay in the graphs of our backends, step by step; others end the graph as they did."""

import pytest
import torch
from torch import nn

from actcompile import compress, explain
from actcompile.tracing.capture import MOST_STEPS
from tests.helpers import EXACT, FAST, assert_close, step
from tests.tracing.test_capture import counted, settings_are_left  # noqa: F401


class Recurrent(nn.Module):
    """Takes a sequence of changing length [nodes, steps, 8] apart, as JumpingKnowledge and Set2Set do."""

    def __init__(self, cell=nn.LSTM, lin=True, **options):
        super().__init__()
        self.lin = nn.Linear(8, 8) if lin else nn.Identity()
        self.cell = cell(8, 16, batch_first=True, **options)

    def forward(self, x):
        x = self.lin(x).sin()
        return self.cell(x)[0].sin().sum(1)


CELLS = [
    (nn.LSTM, {"bidirectional": True}),
    (nn.GRU, {"num_layers": 2}),
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu"}),
]


@pytest.mark.parametrize("lin", [True, False])  # what the recurrence reads requires a gradient, or does not
@pytest.mark.parametrize(("cell", "options"), CELLS)
def test_a_short_recurrence_is_in_the_graph(cell, options, lin):
    model, x = Recurrent(cell, lin, **options), torch.randn(20, 3, 8)
    exact = step(model, (x,), model.parameters())
    assert_close(step(compress(model, **EXACT), (x,), model.parameters()), exact, within=1e-5)
    report = explain(model)
    assert len(report.graphs) == 1 and not report.notes
    assert len(explain(model, x).graphs) == 1


def test_what_a_recurrence_saves_is_encoded():
    model, x = compress(Recurrent(), **FAST), torch.randn(64, 3, 8)
    model(x).sum().backward()
    report = explain(model)
    assert any(r.module.startswith("cell") and r.codec.startswith("quantize") for r in report.graphs[0].rows)
    assert report.saved_bytes_after < report.saved_bytes_before / 3


@pytest.mark.parametrize("steps", [MOST_STEPS + 1, 300])
def test_a_long_recurrence_ends_the_graph_as_it_did(steps):
    model, x = Recurrent(), torch.randn(4, steps, 8)
    exact = step(model, (x,), model.parameters())
    assert_close(step(compress(model, **EXACT), (x,), model.parameters()), exact, within=1e-5)
    report = explain(model)
    assert any("graph break" in note for note in report.notes)
    assert not any(r.module.startswith("cell") for made in report.graphs for r in made.rows)


def test_a_recurrence_of_changing_length_is_compiled_once_more():
    model = compress(Recurrent(), **EXACT)
    compiled = []
    for steps in range(3, 14):
        x = torch.randn(5, steps, 8)
        assert_close([model(x).detach()], [Recurrent.forward(model, x).detach()], within=1e-5)
        compiled.append(len(explain(model).graphs))
    assert compiled[-1] == compiled[2] <= 3  # 2.11 learns a size later


def test_packed_sequences_end_the_graph_as_they_did():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.cell = nn.Linear(8, 8), nn.GRU(8, 16, batch_first=True)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(self.lin(x), lengths, batch_first=True)
            return self.cell(packed)[1].sin()

    model, inputs = Packed(), (torch.randn(4, 3, 8), torch.tensor([3, 2, 2, 1]))
    exact = step(model, inputs, model.parameters())
    assert_close(step(compress(model, **EXACT), inputs, model.parameters()), exact, within=1e-5)


def test_other_models_do_not_see_the_setting_for_recurrences():
    x = torch.randn(20, 3, 8)
    compress(Recurrent(), **EXACT)(x).sum().backward()
    counter, compiled = counted(Recurrent())
    compiled(x)
    assert not any(node.target is torch.lstm for made in counter.graphs for node in made.graph.nodes)
