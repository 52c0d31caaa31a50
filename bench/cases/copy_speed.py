"""How fast are 2-bit encoding and decoding on the CPU, compiled inside a graph, against a copy of the same tensor?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from rich.progress import Progress

from actcompile import Config
from bench.pool import TIMING_ALLOCATOR
from bench.registry import Options, case
from bench.results import show

BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ODD_WIDTHS = (47, 100)


@case("copy-speed", "2-bit quantise and dequantise of 169,344 x 256 floats against copy_, blocks 16 to 4096")
def run(options: Options) -> dict[str, Any]:
    formats: list[tuple[int, int, str, str]] = [(256, block, "uniform", "float32") for block in BLOCKS]
    default = Config()
    formats += [(width, default.block, "variance-minimising", default.metadata) for width in (256, *ODD_WIDTHS)]
    formats += [(width, 256, "uniform", "float32") for width in ODD_WIDTHS]
    settings = {
        "rows": 1_000 if options.quick else 169_344,
        "steps": options.steps or 25,
        "threads": 2,
        "formats": formats[:1] if options.quick else formats,
    }
    command = [sys.executable, "-m", "bench.copying", json.dumps(settings)]
    results = []
    with Progress(console=options.console, transient=True) as progress:
        task = progress.add_task("copy-speed", total=len(settings["formats"]))  # type: ignore[arg-type]
        with subprocess.Popen(command, env=os.environ | TIMING_ALLOCATOR, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                results.append(json.loads(line))
                progress.advance(task)
    if worker.returncode or not results:
        raise RuntimeError(f"bench.copying ended with {worker.returncode}")
    header = ["width", "block", "levels", "ends", "right", "copy_ ms", "quantise ms", "copy / quantise",
              "dequantise ms", "copy / dequantise", "target"]  # fmt: skip
    rows = [_row(r) for r in results]
    show(options.console, "times as fast as copy_, medians of alternating runs, 2 threads", header, rows)
    return {
        "settings": settings | {"allocator": TIMING_ALLOCATOR},
        "formats": results,
        "correct": all(r["correct"] for r in results),
        "targets": [
            {"target": f"width {r['width']}, block {r['block_asked']}: {part} at {target(r):g} of copy_'s speed",
             "reached": r[f"{part}_speed"], "met": r[f"{part}_speed"] >= target(r)}
            for r in results
            for part in ("quantize", "dequantize")
        ],
    }  # fmt: skip


def target(result: dict[str, Any]) -> float:
    """The speed wanted, in that of a copy: 1 for blocks from 64 to 1024, 0.7 for others, half of it for odd widths."""
    speed = 1.0 if 64 <= result["block_asked"] <= 1024 else 0.7
    return speed if result["width"] == 256 else speed / 2


def _row(r: dict[str, Any]) -> list[str]:
    ms = r["milliseconds"]
    return [
        str(r["width"]),
        str(r["block"]),
        r["levels"],
        r["metadata"],
        "yes" if r["correct"] else "NO",
        f"{ms['copy']:.1f}",
        f"{ms['quantize']:.1f}",
        f"{r['quantize_speed']:.2f}",
        f"{ms['dequantize']:.1f}",
        f"{r['dequantize_speed']:.2f}",
        f"{target(r):g}",
    ]
