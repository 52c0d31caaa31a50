"""Starts workers, talks to them, and compares their step times in pairs."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from bench.workload import Described

# Without these, page faults of freshly mapped memory take as long as the work itself and vary from step to step.
TIMING_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


class WorkerFailed(RuntimeError):
    """A worker raised or died; the message holds the end of what it wrote."""


class Process:
    """A worker process that trains `variant`; a context manager that ends it.

    settings: environment variables of that process; of those about the allocator it has no others. warm_up: steps on
    every batch before it answers. within: seconds after which it is ended if it has not answered by then.
    """

    def __init__(
        self,
        workload: Described,
        variant: str,
        settings: Mapping[str, str] | None = None,
        warm_up: int = 2,
        within: float = threading.TIMEOUT_MAX,
    ) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        self.variant = variant
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=Path(__file__).resolve().parent.parent,
            env=environment | dict(settings or {}),
        )
        late = threading.Timer(within, self._process.kill)
        late.daemon = True
        late.start()
        try:
            values, kind = asdict(workload), type(workload).__name__  # type: ignore[call-overload]
            self.started = self.ask({"start": values, "kind": kind, "variant": variant, "warm_up": warm_up})
        except BaseException:
            self.close()
            raise
        finally:
            late.cancel()

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Sends one command and waits for its answer. Raises WorkerFailed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # where it has died there will be no answer either
            print(json.dumps(command), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise WorkerFailed(f"{self.variant}: the worker died\n{self._log.read()[-3000:]}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerFailed(f"{self.variant}: {reply['error']}")
        return reply

    def gradients(self, seeds: Sequence[int]) -> list[list[Tensor]]:
        """For each seed, the gradient of every parameter."""
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "gradients.pt")
            self.ask({"gradients": list(seeds), "path": path})
            return torch.load(path)

    def close(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def memory(workload: Described, variant: str) -> dict[str, Any]:
    """Saved bytes, the tensors they are made of, and the peak of a step, in a process with the default allocator."""
    with Process(workload, variant) as process:
        saved, peak = process.ask({"do": "saved"}), process.ask({"do": "peak"})
    return {"saved_bytes": saved["bytes"], "saved_tensors": saved["tensors"], "peak_bytes": peak["bytes"]}


def alternate(
    workload: Described,
    reference: str,
    others: Sequence[str],
    steps: int,
    tick: Callable[[str], None] = lambda _: None,
    settings: Callable[[str], Mapping[str, str]] = lambda _: {},
) -> dict[str, dict[str, Any]]:
    """Seconds per step of each variant beside the reference's in the same minutes.

    Two processes live at a time; they take steps in turn, so that whatever else the machine does falls on both. The
    ratio is that of the medians of one pairing; a variant that fails has {"error": text} instead. settings: more
    environment variables of a variant's process.
    """
    results: dict[str, dict[str, Any]] = {}
    with Process(workload, reference, {**TIMING_ALLOCATOR, **settings(reference)}) as first:
        every: list[float] = []
        for name in others:
            tick(name)
            try:
                with Process(workload, name, {**TIMING_ALLOCATOR, **settings(name)}) as second:
                    pairs = [
                        (first.ask({"do": "step"})["seconds"], second.ask({"do": "step"})["seconds"])
                        for _ in range(steps)
                    ]
            except WorkerFailed as failure:
                results[name] = {"error": str(failure)}
                continue
            ours, theirs = [p[1] for p in pairs], [p[0] for p in pairs]
            every += theirs
            results[name] = {
                "seconds": statistics.median(ours),
                "reference_seconds": statistics.median(theirs),
                "ratio": statistics.median(ours) / statistics.median(theirs),
                "steps": ours,
                "warm_up_seconds": second.started["warm_up_seconds"],
            }
        if not every:
            every = [first.ask({"do": "step"})["seconds"] for _ in range(steps)]
    results[reference] = {
        "seconds": statistics.median(every),
        "ratio": 1.0,
        "steps": every,
        "warm_up_seconds": first.started["warm_up_seconds"],
    }
    return results
