"""What the compressor does on a GPU, in one short run: its tests, its kernels against a copy, message passing against
torch.compile's, and training steps.

Every figure is written as soon as it is there, the most telling ones first; what no longer fits into the time is left
out, and said to be. `--device cpu --tiny` tries the case itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcompile.kernels import BlockFormat
from bench.measure import relative_error, seconds
from bench.message_passing import HEADS, Work, compared, grouping_time, random_graph, works
from bench.pool import Process, WorkerFailed
from bench.registry import Options, case
from bench.results import write
from bench.variants import VARIANTS
from bench.zoo import ZOO, Brought

STEPS = ("eager", "inductor", "checkpoint", "default", "lossless")
PRODUCTS = ("default", "inductor", "eager")
MODELS = ("sage", "gat", "gcn", "sage-max", "gatv2", "transformer", "pna", "gated-gcn", "edge-conv")
SECTIONS = ("tests", "steps", "products", "messages", "kernels")
# Seconds left, below which it isn't begun; and those that a round's measuring takes, after its compiling.
ENOUGH = {"tests": 120.0, "steps": 120.0, "measuring": 30.0, "products": 60.0, "kernels": 30.0}
TESTS = ("tests/kernels", "tests/passes/edges")
MESSAGES = (  # a hub's share of the edges, dtype, columns
    (0.0, torch.float32, 256),
    (0.0, torch.bfloat16, 256),
    (0.0, torch.float32, 40),
    (0.25, torch.float32, 256),
)
Row = dict[str, Any]


@dataclass
class Run:
    """The rows so far, the clock, and what was asked for."""

    options: Options
    device: str
    tiny: bool
    file: str
    rows: list[Row] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.options.budget - (time.monotonic() - self.start)

    def runs(self, usual: int) -> int:
        """How often to time what is timed."""
        return self.options.steps or (2 if self.tiny else usual)

    def record(self, section: str, **figures: Any) -> None:
        self.rows.append({"section": section, **figures})
        short = {k: v for k, v in figures.items() if not isinstance(v, list)}
        shown = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in short.items())
        self.options.console.print(f"{section}: {shown}", markup=False, highlight=False)
        write(self.options.out, self.file, self.content())

    def content(self) -> Row:
        bad = [r for r in self.rows if "failed" in r or r.get("correct") is False]
        settings = {"device": self.device, "tiny": self.tiny, "budget_seconds": self.options.budget}
        return {"settings": settings, "rows": self.rows, "correct": not bad}

    def attempt(self, what: Callable[[], None], section: str, needs: float, **named: Any) -> None:
        """Runs `what`; a failure, or too little time, is a row like others and does not stop the run."""
        if self.left() < needs:
            self.record(section, **named, skipped=f"{self.left():.0f} s were left")
            return
        try:
            what()
        except Exception as error:
            self.record(section, **named, failed=f"{type(error).__name__}: {str(error)[-800:]}")
        finally:
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()


@case(
    "gpu",
    "on a CUDA device: the tests for it, kernels against a copy, steps of SAGE, GAT and GCN, ogbn-products' shape",
)
def run(options: Options) -> Row:
    device = options.device or "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        return {"skipped": "no CUDA device here; --device cpu --tiny tries the case itself"}
    tiny = options.quick or options.size == "tiny"
    machine = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    state = Run(options, device, tiny, "gpu-" + re.sub("[^a-z0-9]+", "-", machine.lower()))
    sections = (_tests, _steps, _products, _messages, _kernels)
    for name, section in zip(SECTIONS, sections, strict=True):
        if not options.sections or name in options.sections:
            section(state)
    options.console.print(f"{time.monotonic() - state.start:.0f} s of {options.budget:.0f}", style="dim")
    return state.content() | {"file": state.file}


def _tests(state: Run) -> None:
    root = Path(__file__).resolve().parents[2]

    def tests() -> None:
        if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
            state.record("tests", skipped="pytest or hypothesis is not installed")
            return
        limit = min(240.0, state.left() - 60)
        many = ["-n", "auto"] if importlib.util.find_spec("xdist") is not None else []
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *many, *TESTS]
        try:
            ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired as late:
            said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
            state.record("tests", skipped=f"stopped after {limit:.0f} s", said=said[-300:])
            return
        lines = (ended.stdout.strip() or ended.stderr.strip()).splitlines()
        state.record("tests", correct=ended.returncode == 0, said=lines[-1] if lines else "")
        if ended.returncode:
            state.options.console.print(ended.stdout[-4000:], markup=False, highlight=False)

    state.attempt(tests, "tests", ENOUGH["tests"])


def _milliseconds(run: Callable[[], object], device: str, runs: int = 15) -> float:
    for _ in range(2):
        run()
    return 1e3 * statistics.median(seconds(run, device) for _ in range(runs))


def _messages(state: Run) -> None:
    """arxiv's shape, also with a quarter of the edges at one node."""
    nodes, count = (500, 4_000) if state.tiny else (169_343, 1_166_243)

    def milliseconds(run: Callable[[], object]) -> float:
        return _milliseconds(run, state.device, state.runs(15))

    for hub, dtype, width in MESSAGES[: 1 if state.tiny else None]:
        index = random_graph(nodes, count, state.device, hub)
        x = torch.randn(nodes, width, device=state.device, dtype=dtype)
        weight = torch.rand(count, HEADS, device=state.device, dtype=dtype)
        named = {"hub": hub, "dtype": str(dtype)[6:], "width": width}
        for work in works(nodes):

            def compare(work: Work = work, named: Row = named, given: Any = (x, index, weight)) -> None:
                state.record("messages", op=work.name, **named, **compared(work, given, milliseconds))

            state.attempt(compare, "messages", ENOUGH["kernels"], op=work.name, **named)

        def group(index: Tensor = index, hub: float = hub) -> None:
            state.record("messages", op="grouping", hub=hub, fused_ms=grouping_time(index, nodes, milliseconds))

        state.attempt(group, "messages", ENOUGH["kernels"], op="grouping", hub=hub)


def _kernels(state: Run) -> None:
    rows = 512 if state.tiny else 4 * 169_344
    if state.device == "cuda":
        x = torch.randn(2**28, device="cuda")
        y = torch.empty_like(x)
        copied = _milliseconds(lambda: y.copy_(x), "cuda")
        state.record("kernels", op="copy", terabytes_per_second=2 * x.nbytes / copied / 1e9)
        del x, y
    for width in (256, 100):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, width, device=state.device, dtype=dtype)
            for fmt in _formats(state.tiny):
                named = {"width": width, "dtype": str(dtype)[6:], "bits": fmt.bits, "block": fmt.block}

                def quantise(x: Tensor = x, fmt: BlockFormat = fmt, named: Row = named) -> None:
                    state.record("kernels", **named, **_codec(x, fmt, state.device, state.runs(15)))

                state.attempt(quantise, "kernels", ENOUGH["kernels"], **named)
    state.attempt(lambda: _bits(state, rows), "kernels", ENOUGH["kernels"], op="pack_bits")


def _formats(few: bool) -> Iterator[BlockFormat]:
    for bits in (2, 8) if few else (2, 4, 8, 1):
        for block in (64,) if few else (64, 256, 1024):
            yield BlockFormat(bits, block, "variance-minimising" if bits in (2, 4) else "uniform", torch.bfloat16)


def _codec(x: Tensor, fmt: BlockFormat, device: str, runs: int) -> Row:
    """Encoding and decoding in times of a copy's speed; `of_bandwidth`: bytes moved in a second, of a copy's."""
    ops, size = torch.ops.actcompile, list(x.shape)
    seed = ops.draw_seed(1, x.device)
    fields = fmt.bits, fmt.block, fmt.levels
    encoded = ops.quantize(x, seed, 0, *fields, fmt.metadata, fmt.words)
    restored = ops.dequantize(*encoded, size, x.dtype, *fields)
    error = float((restored.float() - x.float()).norm() / x.float().norm())
    y = torch.empty_like(x)
    copy = _milliseconds(lambda: y.copy_(x), device, runs)
    encode = _milliseconds(lambda: ops.quantize(x, seed, 0, *fields, fmt.metadata, fmt.words), device, runs)
    decode = _milliseconds(lambda: ops.dequantize(*encoded, size, x.dtype, *fields), device, runs)
    moved = (x.nbytes + sum(t.nbytes for t in encoded)) / (2 * x.nbytes)
    return {
        "copy_ms": copy,
        "encode_ms": encode,
        "decode_ms": decode,
        "encode_speed": copy / encode,
        "decode_speed": copy / decode,
        "encode_of_bandwidth": moved * copy / encode,
        "decode_of_bandwidth": moved * copy / decode,
        "error": error,
    }


def _bits(state: Run, rows: int) -> None:
    ops, runs = torch.ops.actcompile, state.runs(15)
    mask = torch.rand(rows, 256, device=state.device) > 0.5
    packed, out = ops.pack_bits(mask, 32), torch.empty_like(mask)
    state.record(
        "kernels",
        op="pack_bits",
        correct=torch.equal(ops.unpack_bits(packed, list(mask.shape)), mask),
        copy_ms=_milliseconds(lambda: out.copy_(mask), state.device, runs),
        encode_ms=_milliseconds(lambda: ops.pack_bits(mask, 32), state.device, runs),
        decode_ms=_milliseconds(lambda: ops.unpack_bits(packed, list(mask.shape)), state.device, runs),
    )


def _steps(state: Run) -> None:
    """Models in rounds of as many processes as there are cores: a round's graphs are compiled side by side, and then
    one process is measured at a time."""
    names = state.options.pick(STEPS)
    size = "tiny" if state.tiny else "arxiv"
    models = [name for name in MODELS if not state.options.models or name in state.options.models]
    at_once = max(1, (os.cpu_count() or 1) // max(len(names), 1))
    for start in range(0, len(models), at_once):
        chosen = [Brought(model, size, device=state.device) for model in models[start : start + at_once]]
        still = {w.model: replace(w, dropout=not ZOO[w.model].dropout) for w in chosen}  # the same where it has none

        def measure(chosen: list[Brought] = chosen, still: dict[str, Brought] = still) -> None:
            wanted = dict.fromkeys((w, name) for name in names for v in chosen for w in (v, still[v.model]))
            with _processes(list(wanted), state.left() - ENOUGH["measuring"]) as started:
                for workload in chosen:
                    for name in names:
                        _step(state, "steps", workload, name, started[workload, name])
                for model, workload in still.items():
                    _gradients(state, model, {name: started[workload, name] for name in names})

        state.attempt(measure, "steps", ENOUGH["steps"], models=" ".join(w.model for w in chosen))


def _products(state: Run) -> None:
    """Full batch: does a step fit, and what does it take? One at a time."""
    workload = Brought("sage", "tiny" if state.tiny else "products", device=state.device)
    for name in state.options.pick(PRODUCTS):

        def measure(name: str = name) -> None:
            with _processes([(workload, name)], state.left()) as started:
                _step(state, "products", workload, name, started[workload, name])

        state.attempt(measure, "products", ENOUGH["products"], model="sage", variant=name)


Started = Process | Exception


@contextlib.contextmanager
def _processes(wanted: Sequence[tuple[Brought, str]], within: float) -> Iterator[dict[tuple[Brought, str], Started]]:
    """Trainings in processes of their own, which compile side by side, for so many seconds at most; an exception where
    one came to nothing."""
    settings = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // len(wanted)))}

    def begin(pair: tuple[Brought, str]) -> Started:
        try:
            return Process(*pair, settings=settings, within=within)
        except WorkerFailed as failure:
            return failure

    with ThreadPoolExecutor(len(wanted)) as pool:
        started = dict(zip(wanted, pool.map(begin, wanted), strict=True))
        try:
            yield started
        finally:
            list(pool.map(Process.close, (p for p in started.values() if isinstance(p, Process))))


def _step(state: Run, section: str, workload: Brought, name: str, process: Started) -> None:
    """`busy_ms`: of a step, in which the device computes; `kernels`: what takes longest of that, in ms, how often."""

    def measure() -> None:
        if isinstance(process, Exception):
            raise process
        times = [process.ask({"do": "step"})["seconds"] for _ in range(state.runs(10))]
        profile = process.ask({"do": "profile"})
        state.record(
            section,
            model=workload.model,
            variant=name,
            saved_bytes=process.ask({"do": "saved"})["bytes"],
            peak_bytes=process.ask({"do": "peak"})["bytes"],
            step_ms=1e3 * statistics.median(times),
            busy_ms=profile["busy_ms"],
            first_step_seconds=process.started["warm_up_seconds"][0],
            kernels=profile["kernels"],
        )

    state.attempt(measure, section, 0.0, model=workload.model, variant=name)


def _gradients(state: Run, model: str, started: dict[str, Started], seeds: int = 4) -> None:
    """Errors relative to eager of one step and of the mean of several; without dropout."""
    exact: list[Tensor] = []
    for name, process in started.items():

        def measure(name: str = name, process: Started = process) -> None:
            if isinstance(process, Exception):
                raise process
            samples = process.gradients(range(seeds))
            if name == "eager":
                exact[:] = samples[0]
            if not exact:
                state.record("gradients", model=model, variant=name, skipped="eager was not run")
                return
            mean = [torch.stack(parts).mean(0) for parts in zip(*samples, strict=True)]
            error = relative_error(samples[0], exact)
            correct, off = error <= VARIANTS[name].gradient_error, relative_error(mean, exact)
            state.record("gradients", model=model, variant=name, correct=correct, error=error, error_of_mean=off)

        state.attempt(measure, "gradients", 0.0, model=model, variant=name)
