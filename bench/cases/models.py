"""The models that people bring, compressed and with plain torch.compile side by side: compile time, saved bytes, peak,
step time and gradients."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from bench.measure import relative_error
from bench.pool import TIMING_ALLOCATOR, Process, WorkerFailed, alternate
from bench.registry import Options, case
from bench.results import earlier, megabytes, show, write
from bench.variants import OURS, VARIANTS
from bench.zoo import SIZES, ZOO, Brought

NAME, REFERENCE = "models", "inductor"
COMPARED = ("eager", REFERENCE, "default")
TARGETS = {"cold_compile_seconds": 1.3, "warm_compile_seconds": 1.1, "seconds": 1.0}  # at most, of the reference's
CACHE = "TORCHINDUCTOR_CACHE_DIR"
Result = dict[str, Any]
Tick = Callable[[str], None]


@case(NAME, "models that people bring, ours and plain torch.compile: compile time, saved bytes, peak, step, gradients")
def run(options: Options) -> Result:
    return compare(options, NAME, list(ZOO), COMPARED)


def compare(options: Options, case_name: str, known_models: Sequence[str], compared: Sequence[str]) -> Result:
    """Measures models of the zoo in some variants side by side; a model that was measured is written down at once.

    Args:
        case_name: also the name of the file of results, with the size behind it.
        known_models, compared: which models and variants there are; the options choose among them.
    """
    size = "tiny" if options.quick else options.size
    described = Brought("", size)
    models = [name for name in known_models if not options.models or name in options.models]
    if not models:
        raise ValueError(f"--models: {case_name} has none of {options.models}; it has {', '.join(known_models)}")
    variants, steps = options.pick(compared), options.steps or (3 if options.quick else 9)
    settings = {"size": size, "shape": asdict(SIZES[size]), "threads": described.threads, "allocator": TIMING_ALLOCATOR}
    file = f"{case_name}-{size}"
    known = earlier(options.out, file, settings).get("models", {})
    content: Result = {"settings": settings, "models": known}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        Progress(*columns, console=options.console, transient=True) as progress,
        tempfile.TemporaryDirectory() as folder,
    ):
        task = progress.add_task("")
        headers = Path(folder) / "headers"
        _precompile_headers(headers)
        for name in models:

            def tick(what: str, name: str = name) -> None:
                progress.update(task, description=f"{name}: {what}")

            least, found = _measure(replace(described, model=name), variants, steps, headers, tick)
            measured = known.get(name, {}).get("variants", {}) | found
            known[name] = {"note": ZOO[name].note, "least": least, "variants": measured}
            write(options.out, file, content)
    content["models"] = {name: known[name] for name in ZOO if name in known}
    content["targets"] = [target for name in models for target in _targets(name, known[name]["variants"])]
    _print(options, content["models"])
    correct = all(r["correct"] for name in models for r in known[name]["variants"].values())
    return content | {"file": file, "correct": correct}


def _precompile_headers(cache: Path) -> None:
    """Has Inductor compile a trivial graph there: a first compile is then that of the model, not of torch's headers."""
    program = "import torch; torch.compile(lambda x: x.sin() + 1)(torch.ones(8))"
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {CACHE: str(cache)})


def _measure(
    workload: Brought, variants: list[str], steps: int, headers: Path, tick: Tick
) -> tuple[Result, dict[str, Result]]:
    """What a step takes at least, and what it takes, by variant."""
    tick("exact gradients")
    with Process(replace(workload, dropout=False), "eager", warm_up=0) as process:
        exact = process.gradients([0])[0]
        least = process.ask({"do": "bound"})
    with _caches(headers, variants) as caches:
        results = {name: _first(workload, name, caches(name), exact, tick) for name in variants}
        sound = [n for n in variants if n != REFERENCE and results[n]["correct"]]
        if REFERENCE in variants and results[REFERENCE]["correct"]:
            timed = alternate(workload, REFERENCE, sound, steps, lambda n: tick(f"{n}, warm"), caches)
            for name, timing in timed.items():
                results[name] |= _again(timing, VARIANTS[name].compiled)
    return least, results


@contextmanager
def _caches(headers: Path, variants: list[str]) -> Iterator[Callable[[str], Mapping[str, str]]]:
    """A cache folder of Inductor's for each variant, with nothing in it of the model; as settings of a process."""
    with tempfile.TemporaryDirectory() as folder:
        for name in variants:
            shutil.copytree(headers, Path(folder) / name)
        yield lambda name: {CACHE: str(Path(folder) / name)}


def _first(workload: Brought, name: str, cache: Mapping[str, str], exact: list[Tensor], tick: Tick) -> Result:
    """A process that finds nothing compiled: compile time, bytes, peak; and the gradients of one step."""
    try:
        tick(f"{name}, compiling")
        with Process(workload, name, cache) as process:
            first, second = process.started["warm_up_seconds"]
            result: Result = {
                "cold_compile_seconds": first - second if VARIANTS[name].compiled else None,
                "saved_bytes": process.ask({"do": "saved"})["bytes"],
                "reported_bytes": process.ask({"do": "reported"})["bytes"] if name in OURS else None,
                "peak_bytes": process.ask({"do": "peak"})["bytes"],
            }
            ours = process.gradients([0])[0] if not ZOO[workload.model].dropout else None
        if ours is None:
            tick(f"{name}, gradients without dropout")
            with Process(replace(workload, dropout=False), name, warm_up=0) as process:
                ours = process.gradients([0])[0]
    except WorkerFailed as failure:
        return {"correct": False, "error": str(failure)}
    error = relative_error(ours, exact)
    return result | {"gradient_error": error, "correct": error <= VARIANTS[name].gradient_error}


def _again(timing: Result, compiled: bool) -> Result:
    """A process that finds all compiled, and its steps."""
    if "error" in timing:
        return timing | {"correct": False}
    first, second = timing.pop("warm_up_seconds")
    return timing | {"warm_compile_seconds": first - second if compiled else None}


def _targets(model: str, results: dict[str, Result]) -> list[Result]:
    found = []
    for field, limit in TARGETS.items():
        ours, reference = (results.get(n, {}).get(field) for n in ("default", REFERENCE))
        if ours is not None and reference:
            reached = results["default"]["ratio"] if field == "seconds" else ours / reference
            target = f"{model}: {field} at most {limit} times {REFERENCE}'s"
            found.append({"target": target, "reached": reached, "met": reached <= limit})
    return found


def _print(options: Options, models: dict[str, Result]) -> None:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    rows = []
    for name, model in models.items():
        least = model.get("least", {}).get("seconds")
        for variant, r in model["variants"].items():
            if "error" in r:
                rows.append([name, variant, f"failed: {r['error'].strip().splitlines()[-1][:60]}", *[""] * 8])
                continue
            rows.append([
                name,
                variant,
                number(r["gradient_error"], "{:.1e}") + ("" if r["correct"] else " WRONG"),
                number(r["cold_compile_seconds"], "{:.1f}"),
                number(r.get("warm_compile_seconds"), "{:.1f}"),
                megabytes(r["saved_bytes"]),
                "" if r["reported_bytes"] is None else megabytes(r["reported_bytes"]),
                megabytes(r["peak_bytes"]),
                number(r.get("seconds"), "{:.3f}"),
                number(r.get("ratio"), "{:.2f}"),
                number(r["seconds"] / least if "seconds" in r and least else None, "{:.1f}"),
            ])  # fmt: skip
    header = ["model", "variant", "gradient error", "compile s", "from cache", "saved MB", "reported", "peak MB",
              "s / step", f"/ {REFERENCE}", "/ least"]  # fmt: skip
    title = (
        "MB = 10**6 bytes; compile: the first round of steps over the second; least: eager's products at the rate of a "
        "large one, and rows of edges at the speed of a copy"
    )
    show(options.console, title, header, rows)
