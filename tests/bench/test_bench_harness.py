"""Workers, result files and the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actcompile.datasets import DataUnavailable
from bench.__main__ import main
from bench.cases import accuracy
from bench.pool import Process, WorkerFailed, alternate, memory
from bench.registry import CASES, Options
from bench.results import earlier, environment, write
from bench.trials import Record, Trial, runs, select
from bench.variants import VARIANTS
from bench.workload import Workload

TINY = Workload(nodes=200, edges=900, features=8, classes=3, hidden=16, threads=1)


def test_a_worker_trains_the_same_model_as_this_process() -> None:
    exact = replace(TINY, dropout=0.0).training(VARIANTS["eager"].prepare).gradients(0)
    with Process(replace(TINY, dropout=0.0), "eager", warm_up=0) as process:
        first, second = process.gradients([0, 1])
    for ours, again, wanted in zip(first, second, exact, strict=True):
        torch.testing.assert_close(ours, wanted)
        torch.testing.assert_close(ours, again)


def test_memory_of_a_variant() -> None:
    found = memory(TINY, "eager")
    assert found["saved_bytes"] == sum(t["bytes"] for t in found["saved_tensors"])
    assert found["saved_bytes"] > 200 * 16 * 4
    assert found["peak_bytes"] is None or found["peak_bytes"] >= 0


def test_pairs_are_timed_and_a_broken_variant_spoils_nothing() -> None:
    results = alternate(TINY, "eager", ["no such variant", "eager"], steps=3)
    assert "no such variant" in results["no such variant"]["error"]
    assert len(results["eager"]["steps"]) == 3 and results["eager"]["seconds"] > 0


def test_failures_of_a_worker_reach_the_caller() -> None:
    with pytest.raises(WorkerFailed, match="unknown model"):
        Process(replace(TINY, model="perceptron"), "eager")


def test_results_carry_the_machine_and_are_found_again_only_for_equal_settings(tmp_path: Path) -> None:
    content = {"settings": {"steps": (1, 2)}, "variants": {"eager": {"seconds": 1.0}}}
    path = write(tmp_path, "some-case", content)
    stored = json.loads(path.read_text())
    assert stored["environment"] == environment() and stored["environment"]["versions"]["torch"]
    assert earlier(tmp_path, "some-case", {"steps": (1, 2)})["variants"] == content["variants"]
    assert earlier(tmp_path, "some-case", {"steps": (1, 3)}) == {}
    assert earlier(tmp_path, "other-case", {}) == {}


def test_verdicts_are_plain() -> None:
    reference = [0.70, 0.72, 0.74]
    assert accuracy._summary(reference, reference)["verdict"] == ""
    assert accuracy._summary([0.71, 0.72, 0.74], reference)["verdict"] == "within"
    worse = accuracy._summary([0.60, 0.62, 0.64], reference)
    assert not worse["within"] and worse["verdict"].startswith("-10.00")


def test_recorded_runs_are_not_made_again(tmp_path: Path) -> None:
    unloadable, record = Trial("no such data set"), Record(tmp_path / "runs.jsonl")
    for seed in (1, 0):
        record.add(unloadable.key("2-bit"), seed, {"score": seed / 10})
    done: list[int] = []
    found = runs(unloadable, "2-bit", range(2), record, lambda: done.append(1))
    assert [r["score"] for r in found] == [0.0, 0.1] and len(done) == 2
    for other, variant in ((unloadable, "default"), (replace(unloadable, epochs=7), "2-bit")):
        with pytest.raises(ValueError, match="no such data set"):
            runs(other, variant, range(2), record, lambda: None)


def test_a_run_is_recorded_as_it_ends_and_repeats_itself(tmp_path: Path) -> None:
    tiny = Trial("cora", hidden=8, layers=2, epochs=3, clip=0.5)
    try:
        tiny.task()
    except DataUnavailable as reason:
        pytest.skip(str(reason))
    first, second = (
        runs(tiny, "eager", [3], Record(tmp_path / name), lambda: None)[0] for name in ("a.jsonl", "b.jsonl")
    )
    assert first["score"] == second["score"] and first["saved_bytes"] == second["saved_bytes"] > 0
    assert Record(tmp_path / "a.jsonl").known(tiny.key("eager")) == {3: first}


def test_only_known_graphs_can_be_asked_for() -> None:
    trials = [Trial("cora"), Trial("pubmed")]
    assert select(trials, Options(Path(), data=["pubmed"])) == trials[1:]
    with pytest.raises(ValueError, match="--data citeseer: this case has cora, pubmed"):
        select(trials, Options(Path(), data=["citeseer"]))


def test_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in CASES)
