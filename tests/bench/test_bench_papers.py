"""What the cases `paper` and `gradients` conclude from numbers, and how they count bytes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcompile.datasets import DataUnavailable
from bench import claims
from bench.accounting import MB, Setting, compressed_bytes, full_precision_bytes
from bench.cases import gradients, paper
from bench.registry import Options
from bench.trials import Trial


def found(**means: float) -> dict[str, Any]:
    saved = {"inductor": 1000, "exact": 100, "iexact-64": 80}
    return {"graph": {n: {"mean": m, "saved_bytes": saved.get(n, 90)} for n, m in means.items()}}


def verdict(claim: str, *arguments: Any) -> dict[str, Any]:
    return next(v for v in claims.verdicts(*arguments) if claim in v["claim"])


def test_a_claim_on_accuracy_holds_or_fails_with_the_numbers() -> None:
    names = ("inductor", "exact", "iexact_64")
    good = found(**{n.replace("_", "-"): 0.7 for n in names})
    assert verdict("accuracy within", good, {})["verdict"] == claims.REPRODUCED
    bad = found(**{"inductor": 0.72, "exact": 0.71, "iexact-64": 0.70})
    failed = verdict("accuracy within", bad, {})
    assert failed["verdict"] == claims.NOT and "-1.50 on average, iexact-64 -2.00" in failed["number"]
    assert verdict("accuracy within", {}, {})["verdict"] == claims.UNTESTABLE


def test_a_claim_on_speed_is_about_pairs_only() -> None:
    assert verdict("faster", found(exact=0.7), {})["verdict"] == claims.UNTESTABLE
    faster = {"iexact-8": {"ratio": 0.99}, "iexact-64": {"ratio": 0.95}}
    assert verdict("faster", {}, faster)["verdict"] == claims.REPRODUCED
    assert verdict("faster", {}, {"iexact-64": {"ratio": 1.01}})["verdict"] == claims.NOT


def test_a_claim_on_memory_needs_the_graphs_too() -> None:
    assert verdict("15 %", {}, {})["verdict"] == claims.REPRODUCED
    assert verdict("15 %", found(**{"exact": 0.7, "iexact-64": 0.7}), {})["verdict"] == claims.REPRODUCED
    less = found(**{"exact": 0.7, "iexact-64": 0.7})
    less["graph"]["iexact-64"]["saved_bytes"] = 90
    assert verdict("15 %", less, {})["verdict"] == claims.NOT


places = st.tuples(st.floats(-2, 2), st.floats(-5, 5))


@given(st.floats(-3, 3), st.lists(places, min_size=1, max_size=6, unique_by=lambda place: place[0]))
def test_interpolation_stays_between_neighbours(x: float, points: list[tuple[float, float]]) -> None:
    points.sort()
    left = [q for p, q in points if p <= x] or [points[0][1]]
    right = [q for p, q in points if p >= x] or [points[-1][1]]
    low, high = sorted((left[-1], right[0]))
    assert low - 1e-9 <= gradients.interpolated(x, points) <= high + 1e-9
    for p, q in points:
        assert gradients.interpolated(p, points) == pytest.approx(q)


def test_at_equal_bytes_the_families_are_interpolated() -> None:
    curve = {"a": {"saved_bytes": 100, "error": 0.4}, "b": {"saved_bytes": 400, "error": 0.1}}
    families = {name: curve for name in gradients.THEIRS}
    ours = {"2-bit": {"saved_bytes": 200, "error": 0.15}}
    at = gradients.equal_bytes({**families, "actcompile": ours})
    assert all(math.isclose(e["error"], 0.2) and e["ours_is_lower"] for e in at.values())
    ours["2-bit"]["error"] = 0.25
    assert not any(e["ours_is_lower"] for e in gradients.equal_bytes({**families, "actcompile": ours}).values())


def test_bytes_in_the_papers_count() -> None:
    try:
        trial = Trial("cora", hidden=32, layers=2)
        graph = trial.task()
    except DataUnavailable as reason:
        pytest.skip(str(reason))
    setting = Setting(graph.nodes, 140, 1433, 32, 7, 2)
    assert paper.their_bytes("inductor", trial, graph, 5) == full_precision_bytes(setting)
    assert paper.their_bytes("iexact-8-vm", trial, graph, 5) == compressed_bytes(setting, 8)
    assert paper.their_bytes("default", trial, graph, 5) == 5 + 8 * 140
    encoded = Trial("cora", hidden=32, layers=2, encoder=True)
    assert paper.their_bytes("exact", encoded, graph, 7) == 7 + 8 * 140  # the papers have no encoder to count
    assert MB == 2**20


def test_gradient_errors_of_a_tiny_model(tmp_path: Path) -> None:
    try:
        step = gradients.Step(Trial("cora", hidden=8, layers=2, epochs=2))
    except DataUnavailable as reason:
        pytest.skip(str(reason))
    exact = step.error({"bits": None, "nonlinear_bits": None}, range(2))
    rounded = step.error({"bits": 2, "nonlinear_bits": 2}, range(4))
    assert exact["error"] < 1e-4 < rounded["error"]
    assert rounded["error_of_mean"] < rounded["error"]
    assert rounded["saved_bytes"] < exact["saved_bytes"]


def test_graphs_that_cannot_be_had_are_skipped_with_the_reason(tmp_path: Path, monkeypatch: Any) -> None:
    def unavailable(self: Trial, seed: int = 0) -> Any:
        raise DataUnavailable("no network")

    monkeypatch.setattr(Trial, "task", unavailable)
    content = paper.run(Options(tmp_path, quick=True, variants=["default"]))
    assert content["skipped"] == {"cora": "no network"} and content["data"] == {}
