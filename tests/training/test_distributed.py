"""Two processes over gloo, each with half of the batch: their gradients are those of one process with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training import pinned, ranks

ROOT = Path(__file__).resolve().parents[2]


def started(module, folder):
    """What each rank's process of a module wrote."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(ranks.RANKS):
        command = [sys.executable, "-m", module, str(rank), str(folder)]
        log = folder.joinpath(f"{rank}.log").open("w")
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:  # one that waits for a rank that failed
            process.kill()
    assert codes == [0] * ranks.RANKS, folder.joinpath("0.log").read_text()[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks.RANKS)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return started("tests.training.ranks", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def exact():
    model = ranks.Net()
    return ranks.gradients(model, *ranks.whole())


@pytest.mark.parametrize("kind", ["lossless", "rounded"])
@pytest.mark.parametrize("way", ranks.WAYS)
def test_gradients_are_those_of_the_whole_batch_and_ranks_agree(found, exact, way, kind):
    results = [rank[way, kind] for rank in found]
    before, after = results[0]["bytes"]
    assert 0 < after < before / (1.5 if kind == "lossless" else 3)
    errors = []
    for name, expected in exact.items():
        first, *others = [result["gradients"][name] for result in results]
        if expected is None:  # a layer that took no part
            assert first is None or not first.any()
            continue
        assert all(torch.equal(first, other) for other in others), name
        errors.append(float((first - expected).norm() / expected.norm()))
        assert errors[-1] < (1e-5 if kind == "lossless" else 0.05), name
    assert kind == "lossless" or max(errors) > 1e-4


def test_ranks_take_the_plan_that_one_of_them_made(tmp_path):
    """Within a bound, and on batches of different sizes, for which each rank by itself might make another plan."""
    first, second = started("tests.training.pinned", tmp_path)
    assert first["difference"] == second["difference"] == 0
    expected = [ranks.gradients(ranks.Net(), *pinned.batch(rank)) for rank in range(ranks.RANKS)]
    errors = []
    for name, gradient in first["gradients"].items():
        exact = [gradients[name] for gradients in expected]
        if exact[0] is not None:
            mean = sum(exact) / len(exact)
            assert torch.equal(gradient, second["gradients"][name]), name
            errors.append(float((gradient - mean).norm() / mean.norm()))
    assert 1e-3 < max(errors) < 0.5
