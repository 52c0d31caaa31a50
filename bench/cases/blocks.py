"""Which block size is best? The papers' first open question, answered by measured noise instead of by training runs.

A block of `n` elements costs `4 / n` bytes an element for its ends, in bfloat16, and rounds more coarsely the larger
it is. For models after some training on real graphs, the probes of `actcompile.measure` give the noise that every
activation adds to the gradients in every format: all sizes of blocks and all numbers of bits from one backward pass
each. Here one format is taken for all activations of a model, so the curve is that of error against bytes an element.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from torch.nn import functional as F

from actcompile import Config
from actcompile.checking.measure import Noises, noises
from actcompile.datasets import DataUnavailable
from actcompile.passes.codecs.codecs import Quantize
from bench import plots
from bench.cases.gradients import Step
from bench.registry import Options, case
from bench.results import earlier, progress, show, write
from bench.trials import Trial, select

NAME = "blocks"
BLOCKS = (16, 32, 64, 128, 256, 512, 1024)
BITS = (1, 2, 4, 8)
TRIALS = tuple(
    Trial(data, hidden=hidden, encoder=True, epochs=15, model=model)
    for data in ("cora", "pubmed", "computers")
    for model in ("sage", "gcn", "gat", "gin")
    for hidden in (64, 256)
)


@case(NAME, "gradient error against bytes an element, by block size and bits, for models on real graphs")
def run(options: Options) -> dict[str, Any]:
    trials = TRIALS if not options.quick else [Trial("cora", hidden=32, layers=2, epochs=2, encoder=True)]
    trials = [t for t in select(trials, options) if not options.models or t.model in options.models]
    known = earlier(options.out, NAME, {"blocks": BLOCKS}).get("trials", {})
    found: dict[str, Any] = {}
    with progress(options.console) as bar:
        task = bar.add_task("", total=len(trials))
        for trial in trials:
            name = f"{trial.data}, {trial.model}, {trial.hidden} wide"
            bar.update(task, description=name)
            if known.get(name, {}).get("trial") == asdict(trial):
                found[name] = known[name]
            else:
                try:
                    found[name] = {"trial": asdict(trial), "points": _points(Step(trial))}
                except DataUnavailable as reason:
                    options.console.print(f"{trial.data} skipped: {reason}", style="yellow")
            bar.advance(task)
            write(options.out, NAME, {"settings": {"blocks": BLOCKS}, "trials": known | found})
    _print(options, found)
    _draw(options, found)
    return {"settings": {"blocks": BLOCKS}, "trials": known | found}


def _points(step: Step) -> dict[str, dict[str, float]]:
    """By `bits x block`: bytes an element, and the error of the gradients, with one format for all activations."""
    task = step.task

    def loss(out: Any) -> Any:
        return F.cross_entropy(out[step.nodes], task.y[step.nodes])

    config = Config(inner="aot_eager", min_bytes=0, nonlinear_bits=1, bits=1)  # so that every format is tried
    measured = noises(step.model, (task.x, task.edge_index), loss, config, steps=1, probes=3, blocks=BLOCKS)
    points = {}
    for bits in BITS:
        for block in BLOCKS:
            taken = [t for n in measured.values() if (t := _nearest(n, bits, block)) is not None]
            if taken:
                numel = sum(n for n, _, _ in taken)
                noise = sum(e for _, _, e in taken)
                points[f"{bits}x{block}"] = {"bytes": sum(b for _, b, _ in taken) / numel, "error": math.sqrt(noise)}
    return points


def _nearest(noises: Noises, bits: int, block: int) -> tuple[int, int, float] | None:
    """Elements, bytes and noise of an activation in the format of so many bits that is nearest to a block size."""
    formats = [(c.format, e) for c, e in noises.by_codec.items() if isinstance(c, Quantize) and c.format.bits == bits]
    if not formats:
        return None
    fmt, noise = min(formats, key=lambda f: abs(math.log(f[0].block / block)))
    return noises.numel, fmt.nbytes(noises.numel), noise


def best(points: dict[str, dict[str, float]], bits: int) -> tuple[int, float]:
    """The block size of least error at equal bytes, and by what factor the error at the default's 64 is above it.

    Bytes are made equal at the rate at which more bits buy exactness: from `bits` to `2 * bits`, in blocks of 64.
    """
    few, many = points[f"{bits}x64"], points[f"{2 * bits}x64"]
    rate = math.log(few["error"] / many["error"]) / (many["bytes"] - few["bytes"])
    cost = {block: math.log(p["error"]) + rate * p["bytes"] for block in BLOCKS if (p := points.get(f"{bits}x{block}"))}
    found = min(cost, key=lambda block: cost[block])
    return found, math.exp(cost[64] - cost[found])


def _print(options: Options, found: dict[str, Any]) -> None:
    rows = []
    for name, result in found.items():
        points = result["points"]
        row = [name, f"{points['2x64']['error']:.3f}"]
        for block in BLOCKS:
            row.append(f"{points[f'2x{block}']['error'] / points['2x64']['error']:.2f}")
        for bits in BITS[:-1]:
            size, factor = best(points, bits)
            row.append(f"{size} ({factor:.2f})")
        rows.append(row)
    header = ["", "error, 2x64", *map(str, BLOCKS), *(f"best, {bits}" for bits in BITS[:-1])]
    title = "gradient error by block size, 2 bits, of that at 64; best size at equal bytes (error at 64 of the best's)"
    show(options.console, title, header, rows)


def _draw(options: Options, found: dict[str, Any]) -> None:
    panels = {}
    for name, result in found.items():
        families: dict[str, list[tuple[str, float, float, float]]] = {}
        for point, p in result["points"].items():
            bits, block = point.split("x")
            families.setdefault(f"{bits} bits", []).append((block, p["bytes"], p["error"], 0.0))
        if result["trial"]["hidden"] == 256 or options.quick:
            panels[name] = families
    path = options.out.joinpath(f"{NAME}.svg")
    plots.scatters(path, "Blocks of 16 to 1,024 elements", "bytes an element", "relative error", panels, True)
