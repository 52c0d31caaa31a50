"""The test of a mean: its false alarms are as rare as it says, a bias is seen, and its size is estimated."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binom, norm
from torch import Tensor

from actcompile.checking.bias_test import MOST, Errors, score


def errors(exact: Tensor, draws: Tensor, choosing: int = 8, resolution: float = 0.0) -> Errors:
    found = Errors(exact, choosing, resolution)
    for draw in draws:
        found.add(exact + draw)
    return found


@pytest.mark.parametrize("correlated", [False, True])
def test_false_alarms_are_as_rare_as_stated(correlated: bool) -> None:
    """500 tests without a bias: more alarms than a binomial of that rate has with a probability of 1e-6 fail."""
    generator = torch.Generator().manual_seed(0)
    limit, alarms = 1.96, 0  # one in 20
    mixing = torch.randn(30, 30, generator=generator) if correlated else torch.eye(30)
    for _ in range(500):
        noise = torch.randn(20, 30, generator=generator) @ mixing
        alarms += errors(torch.ones(30), noise).z > limit
    assert alarms <= binom.isf(1e-6, 500, 0.05)


@pytest.mark.parametrize(("elements", "part"), [(500, 0.2), (10_000, 0.1)])
def test_the_bias_that_the_documentation_names_is_visible(elements: int, part: float) -> None:
    generator = torch.Generator().manual_seed(1)
    seen = 0
    for _ in range(20):
        bias = torch.randn(elements, generator=generator)
        bias *= part / bias.norm()
        noise = torch.randn(20, elements, generator=generator) / elements**0.5
        found = errors(torch.randn(elements, generator=generator), noise + bias)
        assert abs(found.of_one_step - (1 + part**2) ** 0.5) < 0.1
        seen += found.z > 4
    assert seen >= 15


def test_a_shrunken_gradient_is_seen_and_measured() -> None:
    generator = torch.Generator().manual_seed(2)
    exact = torch.randn(1000, generator=generator)
    found = errors(exact, 0.1 * torch.randn(20, 1000, generator=generator) - 0.05 * exact)
    assert found.z > 10
    assert found.bias == pytest.approx(0.05 * float(exact.norm()), rel=0.1)


def test_what_arithmetic_adds_is_no_bias() -> None:
    exact = torch.ones(100)
    draws = torch.full((20, 100), 1e-7)
    assert errors(exact, draws, resolution=2e-6).z == 0
    assert errors(exact, draws).z == MOST  # the same in every draw: no noise explains it


def test_no_errors_and_errors_that_are_not_finite() -> None:
    exact = torch.ones(3)
    assert errors(exact, torch.zeros(20, 3)).z == 0
    broken = torch.zeros(20, 3)
    broken[5, 1] = torch.nan
    assert not errors(exact, broken).finite and errors(exact, broken).z == MOST


def test_scores_are_those_of_a_normal_distribution() -> None:
    assert score(float(2 * norm.sf(3.0))) == pytest.approx(3.0)
    assert score(0.0) == MOST and score(1.0) == 0
