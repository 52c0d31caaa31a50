"""The command line, and what a user is told where something is missing on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from actcompile import datasets, demo, environment
from actcompile.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
TINY = "400x2000x16x3"
MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x, scale=None):
        x = torch.relu(self.first(x))
        return self.last(x if scale is None else x * scale)

def make():
    return Net(), torch.randn(1000, 64)

def nothing():
    return "no model"
"""


def _python(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own in the repository, with more environment variables."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | environ
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "net_to_explain.py"
    path.write_text(MODEL)
    return path


def test_demo_trains_both_and_compares_them() -> None:
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115  rich keeps it open
    config = demo.Config(inner="aot_eager", min_bytes=1024)
    plain, compressed = demo.demo(console, config, shape=(400, 2000, 16, 3), hidden=32, epochs=5, device="cpu")
    assert plain.saved_bytes == compressed.report.saved_bytes_before
    assert compressed.saved_bytes == compressed.report.saved_bytes_after
    assert plain.saved_bytes > 4 * compressed.saved_bytes > 0
    for result in (plain, compressed):
        assert 0 < result.accuracy <= 1 and result.seconds > 0
        assert result.peak_bytes is None or result.peak_bytes >= 0
    text = console.export_text()
    for word in (
        "torch.compile",
        "actcompile",
        "test accuracy",
        "saved MB",
        "peak MB",
        "seconds per step",
        "quantize(",
    ):
        assert word in text


def test_demo_goes_on_with_a_generated_graph_where_there_is_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ACTCOMPILE_DATA", raising=False)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    task = demo.find_task(Console(width=200), "ogbn-arxiv", None)
    assert (task.nodes, task.edges, task.features, task.classes) == demo.FALLBACK
    said = " ".join(capsys.readouterr().out.split())
    assert "'ogbn-arxiv' is not on this machine" in said and "generated graph" in said


def test_demo_refuses_too_few_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--epochs", "1", "--inner", "aot_eager", "--shape", TINY]) == 1
    assert "epochs must be at least 3" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_demo_without_the_device_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--device", "cuda", "--shape", TINY]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_explain_a_file_with_its_inputs(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    html, data = tmp_path / "out.html", tmp_path / "out.json"
    written = ["--html", str(html), "--json", str(data), "--code"]
    assert (
        main(
            [
                "explain",
                f"{model_file}:make",
                "--inner",
                "aot_eager",
                "--nonlinear-bits",
                "none",
                "--bits",
                "2",
                *written,
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "quantize(2 bits" in out and "torch.ops.actcompile.quantize" in out
    assert "<svg" in html.read_text()
    rows = json.loads(data.read_text())["graphs"][0]["rows"]
    assert any(row["bytes_before"] == 1000 * 64 * 4 > 10 * row["bytes_after"] for row in rows)


def test_explain_a_module_with_inputs_by_shape(model_file: Path, tmp_path: Path) -> None:
    shapes = ["--input", "float32[500,64]", "--input", "scale=float32[500, 1]"]
    out = tmp_path / "out.json"
    ran = _python(
        *("-m", "actcompile", "explain", "net_to_explain:Net", *shapes),
        *("--bits", "8", "--rule", "first=lossless", "--json", str(out)),
        PYTHONPATH=f"{ROOT}{os.pathsep}{model_file.parent}",
    )
    assert ran.returncode == 0, ran.stderr
    codecs = {row["codec"].partition(",")[0] for row in json.loads(out.read_text())["graphs"][0]["rows"]}
    assert "quantize(8 bits" in codecs and "quantize(2 bits" not in codecs


def test_explain_a_model_of_pyg_at_a_size_that_no_machine_holds(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "2000000000x20000000000x128x40"
    assert main(["explain", "--model", "sage", "--shape", shape, "--hidden", "64", "--layers", "2"]) == 0
    assert "times less" in capsys.readouterr().out


@pytest.mark.slow
def test_estimate_tells_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--shape", "100000x1000000x128x40", "--hidden", "64", "--inner", "aot_eager"]
    assert main(["estimate", "--model", "sage", "--layers", "2", *shape, "--memory", "1GB"]) == 0
    out = capsys.readouterr().out
    assert "peak of a step" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[-2:]}
    plain, ours = ([int(n.replace(",", "")) for n in rows[who]] for who in ("torch.compile", "actcompile"))
    assert all(p < o for p, o in zip(plain, ours, strict=True))  # nodes, layers, width


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a target"),
        (["x.py:make", "--model", "sage"], "give either a target"),
        (["nowhere.py:make"], "there is no file nowhere.py"),
        (["make"], "names no object"),
        (["{file}:gone"], "has no 'gone'"),
        (["{file}:nothing"], "gives a str"),
        (["{file}:Net"], "gives no inputs"),
        (["no_such_package:Net"], "No module named 'no_such_package'"),
        (["{file}:make", "--block", "3"], "block must be an integer of at least 8"),
        (["{file}:make", "--replay", "2"], "replay must be a number from 0 to 1"),
    ],
)
def test_explain_says_what_is_wrong(
    arguments: list[str], message: str, model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *(a.format(file=model_file) for a in arguments)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "float33[2]"], "is not like"),
        (["--input", "float32(2)"], "is not like"),
        (["--rule", "first=3"], "is not like"),
        (["--shape", "1x2x3"], "is not four sizes"),
        (["--bits", "3"], "invalid choice"),
        (["--budget", "2 parsecs"], "budget must be None"),
    ],
)
def test_options_that_cannot_be_read(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["explain", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_env_tells_what_is_here() -> None:
    assert environment.versions()["torch"] == torch.__version__
    assert environment.hardware()["threads"] == str(torch.get_num_threads())
    assert environment.folders()["data sets"] == str(datasets.cache_folder() / "data")
    works = {part.name: part.lacks for part in environment.parts()}
    assert works['inner="aot_eager" (any device, no compiler)'] == ""
    assert bool(works['inner="inductor" on CUDA']) != torch.cuda.is_available()


def test_without_a_compiler(tmp_path: Path) -> None:
    program = f"""
import torch, actcompile
from actcompile.__main__ import main

print("demo", main(["demo", "--device", "cpu", "--shape", "{TINY}"]))
print("env", main(["env"]))
for inner in ("aot_eager", "inductor"):
    model = torch.nn.Linear(8, 8)
    step = torch.compile(model, backend="actcompile", options={{"inner": inner}})
    step(torch.randn(4, 8)).sum().backward()
    print(inner, model.weight.grad is not None)
"""
    nowhere = {"CXX": "/nonexistent/c++", "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ran = _python("-c", program, **nowhere)
    advice = "install g++ or clang, or set CXX to one, or pass inner="
    assert "demo 1" in ran.stdout and "actcompile demo: compiling for the CPU needs a C++ compiler" in ran.stderr
    assert "env 0" in ran.stdout and "none found" in ran.stdout and advice in ran.stdout
    assert "aot_eager True" in ran.stdout
    assert "inductor" not in ran.stdout.splitlines()[-1] and ran.stderr.count(advice) == 2


def test_with_a_torch_older_than_supported() -> None:
    ran = _python("-c", "import torch; torch.__version__ = '2.9.1+cpu'; import actcompile")
    assert ran.returncode == 1
    assert "actcompile needs torch 2.11 or newer, found 2.9.1+cpu: pip install 'torch>=2.11'" in ran.stderr


def test_without_pyg() -> None:
    arguments = ["--inner", "aot_eager", "--shape", TINY]
    program = f"""
import sys

sys.modules["torch_geometric"] = None  # what an import then says is what it says where PyG is not installed
from actcompile.__main__ import main

for command in (["demo"], ["explain", "--model", "sage"]):
    print(main([*command, *{arguments!r}]))
"""
    ran = _python("-c", program)
    assert ran.stdout.splitlines() == ["1", "1"]
    assert ran.stderr.count("pip install 'actcompile[demo]'") == 2


def test_a_plan_is_saved_and_taken_again(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, path = f"{model_file}:make", tmp_path / "plan.json"
    assert main(["explain", target, "--inner", "aot_eager", "--bits", "4", "--save-plan", str(path)]) == 0
    first = capsys.readouterr().out
    assert json.loads(path.read_text())["settings"]["bits"] == 4
    assert main(["explain", target, "--inner", "aot_eager", "--plan", str(path)]) == 0
    (saved,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("saved for backward"))
    assert saved in first
    assert main(["explain", target, "--plan", str(path), "--bits", "8"]) == 1
    assert "bits: 8 was asked for, but the plan was made with 4" in capsys.readouterr().err
    assert main(["explain", target, "--plan", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
