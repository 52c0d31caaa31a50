"""What is saved beside what it is made of, so that nothing meets itself: which, in how many bits, and rightly."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch_geometric.nn import PointNetConv

import actcompile
from tests.helpers import EXACT, FAST, SAVED, assert_equal, step, uncompressed

ROWS, WIDTH = 1500, 32
JOINS = {
    "product": lambda a, b: a * b,
    "gate": lambda a, b: a * b.sigmoid(),
    "quotient": lambda a, b: a / (F.softplus(b) + 0.3),
}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Joined(nn.Module):
    """BatchNorm of what two linear layers make together."""

    def __init__(self, join):
        super().__init__()
        torch.manual_seed(0)
        self.join = JOINS[join]
        self.a, self.b, self.norm, self.out = (
            nn.Linear(8, WIDTH),
            nn.Linear(8, WIDTH),
            nn.BatchNorm1d(WIDTH),
            nn.Linear(WIDTH, 3),
        )

    def forward(self, x):
        return self.out(self.norm(self.join(self.a(x), self.b(x))).relu())


class Residual(nn.Module):
    """A sum of a norm's result and its input, in front of another norm; as often as there are layers."""

    def __init__(self, layers=1):
        super().__init__()
        torch.manual_seed(0)
        self.skip, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
        self.lins = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.inner, self.outer = (nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(layers)) for _ in "io")

    def forward(self, x):
        h = self.skip(x)
        for lin, inner, outer in zip(self.lins, self.inner, self.outer, strict=True):
            h = outer(inner(lin(h)) + h).relu()
        return self.out(h)


MODELS = {**{join: lambda join=join: Joined(join) for join in JOINS}, "residual": Residual}


def rows(model, **options):
    made = actcompile.explain(model, torch.randn(ROWS, 8), options={**SAVED, "min_bytes": 16384, **options})
    return {r.name: r for g in made.graphs for r in g.rows if r.codec.startswith("quantize")}


@pytest.mark.parametrize("model", MODELS)
def test_one_more_value_in_two_bits_spares_eight_for_the_others(model):
    found = rows(MODELS[model]())
    added = [r for r in found.values() if "meets itself" in r.reason]
    assert len(added) == 1 and "2 bits" in added[0].codec
    assert added[0].averaged_over == ROWS or not added[0].biased
    wide = [r for r in found.values() if r.averaged_over == 1]
    assert len(wide) == {"gate": 1}.get(model, 0)  # a sigmoid's input; that of a divisor takes bfloat16
    assert all("8 bits" in r.codec for r in wide)
    assert all("2 bits" in r.codec for r in found.values() if r not in wide)


def test_in_deep_models_no_layer_takes_more():
    """Torch itself saves the sums of the later layers."""
    found = rows(Residual(3))
    assert len(found) == 10 and all("2 bits" in r.codec for r in found.values())


@pytest.mark.parametrize("options", [{"bits": None, "nonlinear_bits": None}, {"bits": None}])
def test_nothing_is_added_where_it_would_spare_nothing(options):
    assert not any("meets itself" in r.reason for r in rows(Joined("product"), **options).values())


def test_a_method_of_the_users_is_left_alone():
    assert not any(
        "meets itself" in r.reason for r in rows(Joined("product"), method=actcompile.cast("bfloat16")).values()
    )


@pytest.mark.parametrize("model", MODELS)
def test_what_is_added_is_what_backward_would_compute(model):
    """Kept exact by a rule for the model itself, every value gives the gradients of the uncompressed graphs."""
    made, x = MODELS[model](), torch.randn(ROWS, 8)
    exact = step(uncompressed(made), (x,), made.parameters())
    torch._dynamo.reset()
    ours = torch.compile(made, backend="actcompile", options=EXACT)
    assert_equal(step(ours, (x,), made.parameters()), exact)
    torch._dynamo.reset()
    fine = torch.compile(made, backend="actcompile", options={**FAST, "replay": 0, "bits": 8})
    for found, wanted in zip(step(fine, (x,), made.parameters()), exact, strict=True):
        assert (found - wanted).norm() < 0.02 * torch.stack([w.norm() for w in exact]).max()


def test_tensors_without_elements_are_left_alone():
    """A graph without edges: the maximum over messages is one over nothing."""

    class Points(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.into = nn.Linear(8, 8)
            inner = nn.Sequential(nn.Linear(11, 8), nn.ReLU(), nn.Linear(8, 8))
            self.conv = PointNetConv(inner, nn.Linear(8, 8), add_self_loops=False)

        def forward(self, x, edges):
            x = self.into(x)
            return self.conv(x, x[:, :3], edges)

    model = actcompile.compress(Points(), **EXACT, rebuild=False, replay=0)
    inputs = torch.randn(64, 8), torch.zeros(2, 0, dtype=torch.int64)
    found = step(model, inputs, model.parameters())
    plain = Points()
    for ours, eager in zip(found, step(plain, inputs, plain.parameters()), strict=True):
        assert (ours is None) == (eager is None)
        if ours is not None and eager is not None:
            torch.testing.assert_close(ours, eager)
