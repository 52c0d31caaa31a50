"""The Triton kernels: instructions per element, counted without a GPU, and speed against a copy, on one."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from actcompile import Config
from actcompile.kernels import BlockFormat
from actcompile.kernels.blocks.format import LEVELS
from bench import sass
from bench.registry import Options, case
from bench.results import show

H100 = {"multiprocessors": 132, "schedulers": 4, "lanes": 32, "hertz": 1.7e9, "bytes_per_second": 3.35e12}
BLOCK, METADATA = Config().block, torch.bfloat16  # the defaults
WORDS = 16  # of booleans, in groups of 512
BITS = (1, 2, 4, 8)


def instructions_per_second() -> float:
    """Of single threads, on an H100 that issues one instruction per scheduler and clock."""
    return H100["multiprocessors"] * H100["schedulers"] * H100["lanes"] * H100["hertz"]


def instruction_budget(bytes_per_element: float) -> float:
    """Instructions per element above which a kernel is no longer bound by an H100's memory.

    `(132 multiprocessors * 4 schedulers * 32 lanes * 1.7e9 Hz) / (3.35e12 bytes/s / bytes per element)`, that is 8.57
    instructions per byte moved. An upper bound: instructions of half rate (integer logic, minimum and maximum) count as
    much as others, and latencies count as hidden. What is read a second time counts as cached.
    """
    return instructions_per_second() * bytes_per_element / H100["bytes_per_second"]


def _kernels(quick: bool) -> dict[str, tuple[Callable[[int], sass.MachineCode], float]]:
    """Name to (machine code for an architecture, bytes moved per element)."""
    kernels: dict[str, tuple[Callable[[int], sass.MachineCode], float]] = {}
    for bits in (2,) if quick else BITS:
        for levels in LEVELS[:1] if bits == 1 else LEVELS:
            fmt = BlockFormat(bits, BLOCK, levels, METADATA)
            for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
                moved = dtype.itemsize + fmt.nbytes(fmt.group) / fmt.group
                what = f"{bits} bits, {levels}, {str(dtype).removeprefix('torch.')}"
                kernels[f"quantize, {what}"] = partial(sass.quantize_code, fmt, dtype), moved
                kernels[f"dequantize, {what}"] = partial(sass.dequantize_code, fmt, dtype), moved
    for op in ("pack_bits", "unpack_bits"):
        kernels[op] = partial(sass.bits_code, op, WORDS), 1 + 1 / 8
    return kernels


@case("triton", "Triton kernels: instructions per element for sm_80 and sm_90, counted in the machine code")
def run(options: Options) -> dict[str, Any]:
    """Static counts for sizes of whole groups: the code has no loops, so each instruction runs once per thread."""
    settings = {"block": BLOCK, "words_of_bits": WORDS, "h100": H100}
    reason = sass.missing()
    if reason is not None:
        options.console.print(f"skipped: {reason}")
        return {"settings": settings, "skipped": reason}
    results: dict[str, dict[str, Any]] = {}
    rows = []
    for name, (compile_for, moved) in _kernels(options.quick).items():
        budget = instruction_budget(moved)
        result: dict[str, Any] = {"bytes_per_element": moved, "instruction_budget_h100": budget}
        row = [name, f"{moved:.2f}"]
        for arch in (80, 90):
            code = compile_for(arch)
            result[f"sm_{arch}"] = {
                "instructions_per_element": code.per_element,
                "instructions": code.instructions.total(),
                "elements_per_thread": code.elements / code.threads,
                "registers": code.registers,
                "spills": code.spills,
                "load_bytes": dict(sorted(code.widths("LDG").items())),
                "store_bytes": dict(sorted(code.widths("STG").items())),
                "opcodes": dict(code.instructions.most_common(12)),
            }
            row += [f"{code.per_element:.1f}", str(code.registers), str(code.spills)]
        result["memory_bound_h100"] = result["sm_90"]["instructions_per_element"] <= budget
        results[name] = result
        rows.append([*row, f"{budget:.1f}", "yes" if result["memory_bound_h100"] else "no"])
    header = ["kernel", "bytes", "sm_80", "reg.", "spills", "sm_90", "reg.", "spills", "budget", "memory-bound"]
    show(options.console, "instructions per element, and the H100's budget", header, rows)
    spilled = any(r[f"sm_{arch}"]["spills"] for r in results.values() for arch in (80, 90))
    return {"settings": settings, "kernels": results, "correct": not spilled}


@case("gpu-copy-speed", "quantize, dequantize and the bit ops on a GPU, against a copy of the same tensor")
def run_on_gpu(options: Options) -> dict[str, Any]:
    """Times by CUDA events, best of several, alternating; each result is compared with the reference first."""
    if not torch.cuda.is_available():
        reason = "no CUDA device"
        options.console.print(f"skipped: {reason}")
        return {"skipped": reason}
    from actcompile.kernels import dequantize, draw_seed, pack_bits, quantize, unpack_bits
    from actcompile.kernels.blocks.quantize import quantize_reference

    size = (4_096, 256) if options.quick else (1_693_440, 256)
    steps = options.steps or 20
    results: dict[str, dict[str, Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(size, device="cuda", dtype=dtype)
        y, seed, mask = torch.empty_like(x), draw_seed(1, x.device), x > 0
        runs: dict[str, Callable[[], Any]] = {"copy": partial(y.copy_, x)}
        correct = True
        for bits in BITS:
            fmt = BlockFormat(bits, BLOCK, metadata=METADATA)
            fields = fmt.bits, fmt.block, fmt.levels, fmt.metadata, fmt.words
            small = x[:1000]
            ours, truth = quantize(small, seed, 0, *fields), quantize_reference(small, seed, 0, fmt)
            correct &= all(
                torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(ours, truth, strict=True)
            )
            encoded = quantize(x, seed, 0, *fields)
            runs[f"quantize {bits}"] = partial(quantize, x, seed, 0, *fields)
            runs[f"dequantize {bits}"] = partial(dequantize, *encoded, size, dtype, *fields[:3])
        packed = pack_bits(mask, WORDS)
        correct &= torch.equal(unpack_bits(packed, size), mask)
        runs |= {"pack_bits": partial(pack_bits, mask, WORDS), "unpack_bits": partial(unpack_bits, packed, size)}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for step in range(steps + 2):
            for name, work in runs.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                work()
                end.record()
                end.synchronize()
                if step >= 2:
                    times[name].append(begin.elapsed_time(end))
        results[str(dtype).removeprefix("torch.")] = {
            "correct": correct,
            "milliseconds": {n: {"best": min(t), "median": statistics.median(t)} for n, t in times.items()},
        }
    rows = [
        [f"{name}, {dtype}", f"{t['best']:.3f}", f"{r['milliseconds']['copy']['best'] / t['best']:.2f}"]
        for dtype, r in results.items()
        for name, t in r["milliseconds"].items()
    ]
    show(options.console, f"{size[0]:,} x {size[1]}, best of {steps}", ["op", "ms", "times a copy's speed"], rows)
    settings = {"size": list(size), "block": BLOCK, "steps": steps}
    return {"settings": settings, "dtypes": results, "correct": all(r["correct"] for r in results.values())}
