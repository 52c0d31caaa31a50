"""The models that people bring: each trains, the same every time, and sizes change where its note says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.cases import models
from bench.variants import VARIANTS
from bench.zoo import ZOO, Brought, _pairs

EAGER = VARIANTS["eager"].prepare


@pytest.mark.parametrize("name", ZOO)
def test_a_model_trains_and_repeats_itself(name: str) -> None:
    training, again = (Brought(name, "tiny", dropout=False).training(EAGER) for _ in range(2))
    first, second = training.gradients(0), again.gradients(0)
    assert len(first) >= 0.9 * len(list(training.model.parameters()))
    for ours, theirs in zip(first, second, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs)
    for _ in training.batches:
        training.step()
    sizes = {batch.inputs[0].shape for batch in training.batches}
    assert ("changing sizes" in ZOO[name].note) == (len(sizes) > 1)


def test_dropout_is_left_out_where_gradients_are_compared() -> None:
    for dropout in (True, False):
        training = Brought("sage", "tiny", dropout=dropout).training(EAGER)
        differ = any(not torch.equal(a, b) for a, b in zip(training.gradients(0), training.gradients(1), strict=True))
        assert differ == dropout


def test_pairs_lie_within_one_molecule() -> None:
    batch = torch.tensor([0, 0, 0, 1, 2, 2])
    found = set(zip(*(t.tolist() for t in _pairs(batch)), strict=True))
    assert found == {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (4, 5), (5, 4)}


def test_targets_compare_with_plain_torch_compile() -> None:
    plain = {"cold_compile_seconds": 10.0, "warm_compile_seconds": 1.0, "seconds": 2.0, "ratio": 1.0}
    ours = {"cold_compile_seconds": 12.0, "warm_compile_seconds": 2.0, "seconds": 9.0, "ratio": 0.9}
    met = {
        t["target"].split(":")[1].split()[0]: t["met"]
        for t in models._targets("m", {"inductor": plain, "default": ours})
    }
    assert met == {"cold_compile_seconds": True, "warm_compile_seconds": False, "seconds": True}


@pytest.mark.slow
def test_the_case_measures_ours_and_plain(tmp_path: Path) -> None:
    assert main(["models", "--size", "tiny", "--models", "gin", "--steps", "3", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "models-tiny.json").read_text())
    found = content["models"]["gin"]["variants"]
    assert set(found) == {"eager", "inductor", "default"}
    for name, pairings in (("inductor", 2), ("default", 1)):  # all others are paired with the reference
        r = found[name]
        assert r["cold_compile_seconds"] > r["warm_compile_seconds"] and len(r["steps"]) == 3 * pairings
    assert found["default"]["reported_bytes"] == pytest.approx(found["default"]["saved_bytes"], rel=0.05)
    assert found["default"]["saved_bytes"] < found["inductor"]["saved_bytes"]
