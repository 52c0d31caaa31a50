"""How tests are run: what Hypothesis draws, how the C++ of kernels is compiled, and threads.

Hypothesis profiles: "ci" (the default) draws the same cases in every run, "explore" draws new and more of them. Choose
with the environment variable HYPOTHESIS_PROFILE.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import actcompile
from actcompile.kernels import _cpp, _torch, cpu
from actcompile.kernels.edges import ops as edges_ops

SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci", derandomize=True, deadline=None, database=None, max_examples=60, suppress_health_check=SLOW_IS_FINE
)
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if "actcompile" not in torch.compiler.list_backends():  # a clone that is not installed: on a machine without a network
    torch._dynamo.register_backend(actcompile.backend, name="actcompile")

KERNELS = Path(__file__).parent / "kernels"
AS_FOR_USERS, QUICKLY = _torch.FLAGS, ("-O0", "-g0")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Has kernels compiled as for users in their own tests and in slow ones, and in a third of the time in all others.

    The others are about what is computed, not about what a compiler makes of loops. What is loaded is forgotten in
    between, so that it does not matter which test a process ran before.
    """
    flags = AS_FOR_USERS if KERNELS in item.path.parents or item.get_closest_marker("slow") else QUICKLY
    if flags != _torch.FLAGS:
        _torch.FLAGS = flags
        for loaded in (_cpp._library, cpu.compiled):
            loaded.cache_clear()
        edges_ops._kernels.clear()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For gradients that are compared to the bit: with more threads torch adds scattered rows in varying order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before, or counted towards Dynamo's limits, and the same random numbers, whatever ran before."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
