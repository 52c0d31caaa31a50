"""Measures encoding and decoding against a plain copy: `python -m bench.copying '{"rows": ..., "steps": ...}'`.

Prints one JSON object. Runs in a process of its own, because the allocator's settings are read when a process starts.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import actcompile.kernels  # noqa: F401  registers the ops
from actcompile.config import METADATA
from actcompile.kernels import BlockFormat
from actcompile.kernels.blocks.quantize import dequantize_reference, quantize_reference
from actcompile.passes.plan.formats import block_format

Formats = list[tuple[int, int, str, str]]  # width, block asked for, levels, metadata


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    results = []
    for width, block, levels, metadata in settings["formats"]:
        results.append(measure(settings["rows"], width, block, levels, metadata, settings["steps"]))
        print(json.dumps(results[-1]), flush=True)


def measure(rows: int, width: int, block: int, levels: str, metadata: str, steps: int) -> dict[str, Any]:
    """Medians of alternating runs, in milliseconds, after a check of a few rows against the reference."""
    torch._dynamo.reset()  # every format shares this function, and with it a limit of eight compilations
    x = torch.randn(rows, width)
    fmt = block_format(width, 2, block, levels, METADATA[metadata])
    seed = torch.ops.actcompile.draw_seed(1, x.device)
    encode = torch.compile(lambda x, seed: torch.ops.actcompile.quantize(x, seed, 0, *fields(fmt)), dynamic=False)
    encoded = encode(x, seed)
    decode = torch.compile(
        lambda *parts: torch.ops.actcompile.dequantize(*parts, [rows, width], torch.float32, *fields(fmt)[:3]),
        dynamic=False,
    )

    few = 4 * fmt.group
    exact = quantize_reference(x.flatten()[:few], seed, 0, fmt)
    same = all(torch.equal(bits(a[: len(b)]), bits(b)) for a, b in zip(encoded, exact, strict=True))
    restored = dequantize_reference(*exact, [few], x.dtype, fmt)
    same = same and torch.equal(decode(*encoded).flatten()[:few], restored)

    target = torch.empty_like(x)
    runs: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(x),
        "quantize": lambda: encode(x, seed),
        "dequantize": lambda: decode(*encoded),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(steps + 3):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if step >= 3:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return {
        "width": width,
        "block_asked": block,
        "block": fmt.block,
        "words": fmt.words,
        "levels": levels,
        "metadata": metadata,
        "correct": same,
        "milliseconds": medians,
        "quantize_speed": medians["copy"] / medians["quantize"],
        "dequantize_speed": medians["copy"] / medians["dequantize"],
    }


def fields(fmt: BlockFormat) -> tuple[Any, ...]:
    return fmt.bits, fmt.block, fmt.levels, fmt.metadata, fmt.words


def bits(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.uint8)


if __name__ == "__main__":
    main()
