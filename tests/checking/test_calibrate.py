"""Fitted levels: valid, better than a normal's where zeros rule, and found without touching the model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import actcompile
from actcompile import calibrate
from actcompile.checking.calibrate import project, some_blocks
from actcompile.checking.observe import observed
from actcompile.kernels.blocks.format import explicit_levels
from actcompile.kernels.blocks.histogram import Histogram
from actcompile.kernels.blocks.levels import expected_variance, level_values
from actcompile.passes.codecs.codecs import Quantize
from actcompile.passes.plan.plan import Choice
from tests.helpers import SAVED, Mlp, gnn, graph, step


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def test_every_float_of_2_or_4_bits_has_levels() -> None:
    model, inputs = gnn("sage"), graph()
    levels = dict(calibrate(model, *inputs, steps=2, **SAVED).fitted)
    rows = [r for g in actcompile.explain(model, *inputs, options=SAVED).graphs for r in g.rows]
    bits = {f"{r.module}/{r.name}": int(r.codec[9]) for r in rows if r.codec.startswith("quantize")}
    assert levels.keys() == {key for key, b in bits.items() if b in (2, 4)} and levels
    for key, text in levels.items():
        values = explicit_levels(text, bits[key])
        assert values[0] == 0 and values[-1] == 2 ** bits[key] - 1


def test_levels_beat_uniform_and_normal_ones_on_new_dropout() -> None:
    model, x = Mlp(), torch.randn(4000, 16)
    ((key, text),) = calibrate(model, x, steps=3, **SAVED).fitted
    seen: list[tuple[Histogram, int]] = []

    def look(choice: Choice, value: Tensor) -> None:
        fmt = choice.codec.format  # type: ignore[union-attr]
        seen.append((Histogram.of(value, fmt), fmt.block))

    torch.manual_seed(77)
    observed(model, look, **SAVED)(x)
    ((histogram, block),) = seen
    ours, uniform, normal = (
        expected_variance(np.array(v), histogram)
        for v in (explicit_levels(text, 2), (0, 1, 2, 3), level_values(2, block, "variance-minimising"))
    )
    assert key.startswith("dropout/") and ours < 0.95 * uniform and ours < 0.95 * normal, (
        key,
        ours / uniform,
        ours / normal,
    )


def test_model_and_generator_are_untouched_and_the_result_repeats() -> None:
    model, inputs = gnn("sage"), graph()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = calibrate(model, *inputs, **SAVED)
    assert torch.equal(torch.get_rng_state(), state) and first == calibrate(model, *inputs, **SAVED)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_works_under_no_grad_and_on_compressed_models() -> None:
    model, x = actcompile.compress(Mlp(), **SAVED), torch.randn(64, 16)
    with torch.no_grad():
        made = calibrate(model, x, steps=1)
    assert made == actcompile.Config.make(**SAVED, fitted=made.fitted) and len(made.fitted) == 1


def test_a_calibrated_config_is_used_and_rounds_less() -> None:
    """The mean squared gradient error of 20 seeds: a fifth less variance would show itself at three sigma."""
    model, x = Mlp(dropout=0.0), torch.randn(2000, 16)
    config = calibrate(model, x, steps=1, **SAVED)
    report = actcompile.explain(model, x, config=config)
    assert "fitted levels" in str([r.codec for g in report.graphs for r in g.rows])
    parameters = list(model.last.parameters())
    exact = step(model, [x], parameters)[1:]

    def error(options: dict[str, Any]) -> float:
        compiled = torch.compile(model, backend="actcompile", options=options)
        runs = [step(compiled, [x], parameters, seed)[1:] for seed in range(20)]
        return sum(float((a - b).square().sum()) for run in runs for a, b in zip(run, exact, strict=True))

    assert error({**SAVED, "fitted": config.fitted}) < error({**SAVED, "levels": "variance-minimising"})


def test_levels_of_a_projection_fit_what_is_rounded() -> None:
    model, x = Mlp(dropout=0.0), torch.randn(4000, 16)
    plain, projected = (dict(calibrate(model, x, steps=1, **SAVED, **o).fitted) for o in ({}, {"projection": 8}))
    histograms: list[Histogram] = []

    def look(choice: Choice, value: Tensor) -> None:
        codec = choice.codec
        assert isinstance(codec, Quantize) and codec.columns == 4
        histograms.append(Histogram.of(project(value, codec.columns, seed=99), codec.format))

    observed(model, look, **SAVED, projection=8)(x)
    (key,), (histogram,) = projected, histograms
    fitted, other = (expected_variance(explicit_levels(f[key], 2), histogram) for f in (projected, plain))
    assert fitted < 0.9 * other


def test_activations_without_a_range_are_left_out() -> None:
    model, x = Mlp(dropout=0.0), torch.zeros(64, 16)
    model.first.bias.data.fill_(-1.0)  # ReLU makes zeros only
    assert calibrate(model, x, steps=1, **SAVED).fitted == ()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        calibrate(lambda x: x, torch.randn(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
        calibrate(Mlp(), torch.randn(64, 16), steps=0)


@given(numel=st.integers(0, 500), block=st.integers(1, 40), limit=st.integers(1, 300))
def test_some_blocks_are_whole_distinct_blocks_from_end_to_end(numel: int, block: int, limit: int) -> None:
    found = some_blocks(torch.arange(numel), block, limit)
    if numel < block:
        assert found.tolist() == [list(range(numel))]
        return
    starts = found[:, 0].tolist()
    assert found.numel() <= max(limit, block)
    assert all(row == list(range(row[0], row[0] + block)) and row[0] % block == 0 for row in found.tolist())
    assert starts == sorted(set(starts)) and starts[0] == 0
    assert len(starts) == 1 or starts[-1] == (numel // block - 1) * block
    assert len(starts) == min(numel // block, max(1, limit // block))
