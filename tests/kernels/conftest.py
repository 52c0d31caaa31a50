"""Many small tensor operations: more threads than one only wait for each other. And many formats: one code for most."""

import pytest
import torch

from actcompile.kernels import cpu


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def code_for_many_formats():
    cpu.compiled.cache_clear()
    cpu.SPECIALISE = False
    yield
    cpu.SPECIALISE = True
    cpu.compiled.cache_clear()
