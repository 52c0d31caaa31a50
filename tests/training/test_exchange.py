"""Two processes over gloo exchange gradients in a few bits: they agree, and the mean over steps is exact."""

import math

import pytest
import torch
from torch import nn

from actcompile import compress_gradients
from tests.training.exchanging import BITS, STEPS
from tests.training.test_distributed import started


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return started("tests.training.exchanging", tmp_path_factory.mktemp("exchanging"))


@pytest.mark.parametrize("bits", BITS)
def test_ranks_agree(found, bits):
    one, two = found
    assert torch.equal(one[f"last {bits}"], two[f"last {bits}"])
    assert not torch.equal(one[f"last {bits}"], one["exact"])


@pytest.mark.parametrize("bits", BITS)
def test_the_mean_over_steps_is_exact(found, bits):
    """A z-test along 100 random directions, with one false alarm in 10,000 runs by Bonferroni; and no bias is left."""
    result = found[0]
    off, variance = (result[f"mean {bits}"] - result["exact"]).double(), result[f"variance {bits}"].double() / STEPS
    generator = torch.Generator().manual_seed(0)
    directions = torch.randint(0, 2, (100, len(off)), generator=generator).double() * 2 - 1
    z = directions @ off / variance.sum().sqrt()
    limit = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - 1e-4 / 2 / len(z), dtype=torch.float64))
    assert z.abs().max() < limit
    left = (off.square().sum() - variance.sum()) / (2 * variance.square().sum()).sqrt()  # a bias adds its square
    assert left.abs() < 6


def test_more_bits_are_less_noise(found):
    noise = [found[0][f"variance {bits}"].sum().sqrt() / found[0]["exact"].norm() for bits in BITS]
    assert noise[0] > 3 * noise[1] > 9 * noise[2] > 0


def test_fed_back_errors_cancel_over_steps(found):
    """What is left of the sum over steps is one step's rounding, not the root of the number of steps as many."""
    result = found[0]
    left = (result["fed back"] - result["exact"]).norm() * STEPS
    once = result["variance 2"].sum().sqrt()
    assert left < 4 * once
    assert (result["mean 2"] - result["exact"]).norm() * STEPS > 0.5 * math.sqrt(STEPS) * once


def test_infinite_gradients_reach_every_rank(found):
    for result in found:
        assert not result["infinite"].isfinite().all()


def test_other_dtypes_are_all_reduced(found):
    assert torch.equal(found[0]["double"], found[0]["double, exact"])


def test_activations_and_gradients_are_compressed_together(found):
    one, two = found
    assert one["saved"] > 0
    assert all(torch.equal(g, two["both"][n]) for n, g in one["both"].items() if g is not None)
    assert sum(g is not None for g in one["both"].values()) >= 8


@pytest.mark.parametrize("bits", BITS)
def test_no_random_numbers_of_the_users_are_drawn(found, bits):
    assert not found[0][f"drew {bits}"]


def test_what_is_no_ddp_is_refused():
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        compress_gradients(nn.Linear(2, 2))
