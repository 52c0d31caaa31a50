"""Message passing by the Triton kernels, in Triton's interpreter, which has to be chosen before Triton is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


PASSES = "tests/passes/edges/interpreted.py"
SOME = (
    *(f"test_gradients_are_those_of_eager[{name}]" for name in ("SAGE max", "GCN", "GAT 2 heads", "own relu")),
    "test_gradients_on_any_graph[SAGE max-no edges]",
    "test_gradients_on_any_graph[own relu-one node]",
    "test_in_bfloat16_gradients_are_finite_and_near[scatter max]",
    "test_ties_share_their_gradient_as_in_torch",
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpret(*cases):
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", *cases],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]
    assert " passed" in finished.stdout


def test_programs():
    interpret("tests/kernels/edges/interpreted.py")


def test_some_models():
    interpret(*(f"{PASSES}::{name}" for name in SOME))


@pytest.mark.slow
def test_all_models():
    """Minutes: the interpreter is slow."""
    interpret(PASSES)
