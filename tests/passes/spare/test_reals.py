"""Complex activations are saved as pairs of floats: exactly where nothing is rounded, in few bits and unbiased else."""

import pytest
import torch
from torch import nn

import actcompile
from tests.helpers import EXACT, FAST, SAVED, assert_equal, step, uncompressed

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")


class Filter(nn.Module):
    """A layer of FNet or of a global filter network: products of frequencies with learned complex numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)
        self.filter = nn.Parameter(torch.randn(17, 2))

    def forward(self, x):
        frequencies = torch.fft.rfft(self.first(x), norm="ortho") * torch.view_as_complex(self.filter)
        return self.last(torch.fft.irfft(frequencies, n=32, norm="ortho"))


class Rotations(nn.Module):
    """RotatE: an entity, turned by a relation, is another one."""

    def __init__(self):
        super().__init__()
        self.real, self.imaginary, self.angle = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        entity = torch.complex(self.real(x), self.imaginary(x))
        angle = self.angle(x)
        turned = entity * torch.polar(torch.ones_like(angle), angle)
        return (turned - entity.roll(1, 0)).abs().sum(-1)


class Conjugates(nn.Module):
    """Bilinear forms of complex numbers (ComplEx), lazily conjugated and transposed."""

    def __init__(self):
        super().__init__()
        self.real, self.imaginary = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        one = torch.complex(self.real(x), self.imaginary(x))
        two = torch.complex(self.imaginary(x.sin()), self.real(x.cos()))
        return (one @ two.conj().t() @ one).real


MODELS = [Filter, Rotations, Conjugates]


def rows(model, **options):
    return actcompile.explain(model, X, options={**SAVED, **options}).graphs[0].rows


@pytest.mark.parametrize("make", MODELS)
def test_without_rounding_nothing_changes(make):
    model = make()
    reference = step(uncompressed(model), (X,), model.parameters())
    torch._dynamo.reset()
    ours = torch.compile(model, backend="actcompile", options=EXACT)
    assert_equal(step(ours, (X,), model.parameters()), reference)


@pytest.mark.parametrize("make", MODELS)
def test_pairs_are_encoded(make):
    found = rows(make())
    assert not any("complex" in r.dtype and r.bytes_after for r in found)
    assert any("view_as_real" in r.name and r.codec.startswith(("quantize", "cast")) for r in found)
    before, after = sum(r.bytes_before for r in found), sum(r.bytes_after for r in found)
    assert after < before / 2.5


def test_a_filter_of_frequencies_takes_two_bits_and_is_unbiased():
    (pairs,) = [r for r in rows(Filter()) if "view_as_real" in r.name]
    assert pairs.codec.startswith("quantize(2 bits") and not pairs.biased


@pytest.mark.parametrize("make", MODELS)
def test_gradients_are_as_the_plan_claims(make):
    """One check in 1,000 without a bias finds one by chance; the seeds are fixed."""
    checked = actcompile.check(make(), X, seeds=40, options=FAST)
    assert checked.rounded and not [c.name for c in checked.gradients if c.wrong]


def test_a_rule_keeps_them():
    found = rows(Filter(), rules={"*": actcompile.keep()})
    assert any("complex" in r.dtype and r.codec == "keep" and r.bytes_after for r in found)
