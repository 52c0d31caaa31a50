"""What Inductor makes of our loops beside those around them."""

import re

import pytest
import torch
from torch import nn

# Private, as all of Inductor: a wrapper around a call, which returns the code that was written for it (2.11 to 2.14).
from torch._inductor.utils import run_and_get_code

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.slow
def test_dropout_is_one_loop_with_the_norm_before_it():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 4))
    x = torch.randn(3000, 64)
    compiled = torch.compile(model, backend="actcompile", options={"min_bytes": 0})
    with torch._inductor.config.patch(force_disable_caches=True):  # else there is no code to see
        _, (forward, _) = run_and_get_code(lambda: compiled(x).sum().backward())
    written = re.findall(r"empty_strided_cpu\(\(3000, 64\), \(64, 1\), torch.float32\)|# reuse", forward)
    assert len(written) == 2  # what the layer makes, and what dropout makes of it: no norm's result
