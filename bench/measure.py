"""The three numbers of every comparison: saved bytes, peak memory of a step, and seconds.

Each is taken in the same way for every variant, ours and the baselines alike.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.profiler import ProfilerActivity, profile

from bench._torch import saved_without_version_check


def saved_tensors(
    output: Tensor, exclude: Iterable[Tensor] = (), counts: Callable[[Node], bool] | None = None
) -> list[Tensor]:
    """One tensor for each distinct storage that the autograd graph below `output` keeps alive for backward.

    Storages of `exclude` (parameters, buffers, inputs: alive anyway) are left out. Works for eager graphs, for compiled
    ones, and for mixtures; call it after the forward pass and before the backward pass. `counts` says which nodes of
    the autograd graph count, all by default.
    """
    seen = {_storage(t) for t in exclude}
    found, visited, stack = [], set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        stack.extend(successor for successor, _ in node.next_functions)
        for tensor in _held_by(node) if counts is None or counts(node) else ():
            if tensor.numel() and _storage(tensor) not in seen:
                seen.add(_storage(tensor))
                found.append(tensor)
    return found


def saved_bytes(output: Tensor, exclude: Iterable[Tensor] = (), counts: Callable[[Node], bool] | None = None) -> int:
    """The bytes of the storages that `saved_tensors` finds."""
    return sum(t.untyped_storage().nbytes() for t in saved_tensors(output, exclude, counts))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _held_by(node: Node) -> list[Tensor]:
    if hasattr(node, "saved_tensors"):  # a Python autograd function: a compiled graph, or a user's own
        return [t for t in (*node.saved_tensors, *saved_without_version_check(node)) if isinstance(t, Tensor)]
    held: list[Tensor] = []
    for name in dir(node):
        if name.startswith("_saved_"):
            value = getattr(node, name)
            held.extend(t for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor))
    return held


class Unmeasurable(RuntimeError):
    """This machine cannot measure the number asked for; the message says what is missing."""


def peak_memory(step: Callable[[], object], device: str = "cpu") -> int:
    """By how many bytes memory rose above its level before `step()` at most, while that ran once.

    CUDA: from the caching allocator's own high-water mark. CPU: the resident set's, reset through
    /proc/self/clear_refs; give the process an allocator that returns memory (glibc's defaults do) and warm it up first.
    Raises Unmeasurable on a CPU without Linux's /proc.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _return_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise Unmeasurable(f"the resident set's high-water mark cannot be reset here: {error}") from error
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def peak_of_tensors(step: Callable[[], object]) -> int:
    """The most bytes at once of the tensors that one `step()` allocates on the CPU, as the profiler sees torch do it.

    The resident set has more: what the C library's heap keeps between blocks that were let go, and kernels' own memory.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(itertools.accumulate(change for _, change in changes), default=0)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise Unmeasurable(f"/proc/self/status has no {field}")


def _return_free_memory() -> None:
    """Free pages that the allocator still holds would hide the first part of a rise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def seconds(step: Callable[[], object], device: str = "cpu") -> float:
    """Wall-clock seconds of one `step()`, the device's queue included."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def relative_error(measured: list[Tensor], exact: list[Tensor]) -> float:
    """The Euclidean norm of all differences over the norm of all exact values, in float64."""
    pairs = list(zip(measured, exact, strict=True))
    difference = sum(float((m.double() - e.double()).square().sum()) for m, e in pairs)
    return (difference / sum(float(e.double().square().sum()) for _, e in pairs)) ** 0.5
