"""The case for a GPU, tried on the CPU: every figure is there, and time that runs out is said and stops nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main


def run(out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["gpu", "--device", "cpu", "--tiny", "--out", str(out), *arguments]) == 0
    return json.loads((out / "gpu-cpu.json").read_text())


def test_every_section_leaves_its_figures(tmp_path: Path) -> None:
    sections = ["kernels", "steps", "products"]
    content = run(tmp_path, "--models", "sage", "--variants", "eager", "--sections", *sections)
    rows = content["rows"]
    assert content["environment"]["versions"]["torch"] and content["settings"]["device"] == "cpu"
    codecs = [row for row in rows if "encode_speed" in row]
    assert {(r["width"], r["dtype"], r["bits"]) for r in codecs} == {
        (width, dtype, bits) for width in (100, 256) for dtype in ("float32", "bfloat16") for bits in (2, 8)
    }
    assert all(row["error"] < 0.02 for row in codecs if row["bits"] == 8)
    steps = [row for row in rows if row["section"] in ("steps", "products")]
    assert len(steps) == 2 and all(r["saved_bytes"] > 0 and r["step_ms"] > 0 for r in steps)
    (gradients,) = [row for row in rows if row["section"] == "gradients"]
    assert gradients["error"] == 0 and gradients["error_of_mean"] < 1e-6


def test_without_time_everything_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    rows = run(tmp_path, "--budget", "0")["rows"]
    assert {row["section"] for row in rows} == {"tests", "messages", "kernels", "steps", "products"}
    assert all("were left" in row["skipped"] for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--out", str(tmp_path)]) == 1
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_message_passing_beside_plain_torch_compile(tmp_path: Path) -> None:
    content = run(tmp_path, "--sections", "messages")
    rows = {row["op"]: row for row in content["rows"]}
    assert set(rows) == {"sum", "weighted sum", "max", "attention", "product", "grouping"}
    assert content["correct"] and all(row["fused_ms"] > 0 for row in rows.values())


@pytest.mark.slow
def test_ours_beside_plain_torch_compile(tmp_path: Path) -> None:
    content = run(tmp_path, "--models", "sage", "--variants", "eager", "inductor", "default", "--sections", "steps")
    steps = {row["variant"]: row for row in content["rows"] if row["section"] == "steps"}
    assert steps["default"]["saved_bytes"] < steps["inductor"]["saved_bytes"] / 2
    assert content["correct"]
