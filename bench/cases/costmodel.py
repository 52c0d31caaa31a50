"""Is the cost model true? What it predicts of a step beside what is measured: saved bytes, peak memory, gradient error.

Bytes and peaks are of a process that trains with Inductor, without us and with. A peak is predicted of tensors, and
measured as that of torch's allocator and of the resident set, to which the C library's heap adds its own. The error of
the gradients is that which rounding alone makes, as the root of its mean square over draws, relative to the exact
gradient's norm; predicted from one backward pass by `actcompile.measure`, on graphs small enough to draw often, with
dropout off.
"""

from __future__ import annotations

from typing import Any

import torch

import actcompile
from bench import plots
from bench.pool import Process, WorkerFailed
from bench.registry import Options, case
from bench.results import earlier, megabytes, progress, show, write
from bench.zoo import Brought

NAME = "costmodel"
MODELS = ("sage", "sage-max", "gcn", "gin", "gat", "gatv2", "transformer", "edge-conv", "pna", "molecules", "gps")
DRAWS = 16
BITS = (2, 4)
MEASURED = ("saved", "peak", "tensors")


@case(NAME, "what is predicted of a step, beside what is measured: saved bytes, peak, gradient error")
def run(options: Options) -> dict[str, Any]:
    size = "tiny" if options.quick else options.size
    models = [name for name in MODELS if not options.models or name in options.models]
    draws = options.seeds or (4 if options.quick else DRAWS)
    settings = {"size": size, "draws": draws, "threads": Brought("", size).threads}
    file = f"{NAME}-{size}"
    known: dict[str, Any] = earlier(options.out, file, settings).get("models", {})
    with progress(options.console) as bar:
        task = bar.add_task("", total=len(models) * (2 + len(BITS)))
        for name in models:
            bar.update(task, description=f"{name}: peaks")
            found = {"memory": _memory(Brought(name, size)), "errors": {}}
            bar.advance(task, 2)
            for bits in BITS:
                bar.update(task, description=f"{name}: gradients, {bits} bits")
                found["errors"][str(bits)] = _error(Brought(name, "tiny", dropout=False), bits, draws)
                bar.advance(task)
            known[name] = found
            write(options.out, file, {"settings": settings, "models": known})
    known = {name: known[name] for name in MODELS if name in known}
    _print(options, known)
    _plot(options, known, size)
    return {"settings": settings, "models": known, "file": file, "correct": True}


def _memory(workload: Brought) -> dict[str, Any]:
    try:
        with Process(workload, "default") as process:
            predicted = process.ask({"do": "predicted"})
            ours = {do: process.ask({"do": do})["bytes"] for do in MEASURED}
        with Process(workload, "inductor") as process:
            plain = {do: process.ask({"do": do})["bytes"] for do in MEASURED}
    except WorkerFailed as failure:
        return {"error": str(failure)}
    return {"predicted": predicted, "ours": ours, "plain": plain}


def _error(workload: Brought, bits: int, draws: int) -> dict[str, float] | None:
    """Predicted and measured; None where nothing is rounded."""
    training = workload.training(lambda model: model)
    model, batch = training.model, training.batches[0]
    options: dict[str, Any] = {"inner": "aot_eager", "min_bytes": 0, "bits": bits}

    def loss(output: torch.Tensor) -> torch.Tensor:
        return batch.loss(output, batch.target)

    config = actcompile.measure(model, *batch.inputs, loss=loss, **options)
    outlooks = [g.outlook for g in actcompile.explain(model, *batch.inputs, config=config).graphs]
    errors = [o.error for o in outlooks if o is not None]
    exact = torch.cat([g.flatten().double() for g in training.gradients(0)])
    compressed = workload.training(lambda m: actcompile.compress(m, config))
    squares = 0.0
    for seed in range(draws):
        drawn = torch.cat([g.flatten().double() for g in compressed.gradients(seed)])
        squares += float((drawn - exact).square().sum()) / draws
    predicted = sum(e * e for e in errors) ** 0.5
    return {"predicted": predicted, "measured": (squares / float(exact.square().sum())) ** 0.5} if predicted else None


def _print(options: Options, models: dict[str, Any]) -> None:
    rows = []
    for name, found in models.items():
        memory, errors = found["memory"], found["errors"]
        row: list[str] = [name]
        if "error" in memory:
            row += ["failed"] * 6
        else:
            p = memory["predicted"]
            row += [megabytes(p["saved_after"]), megabytes(memory["ours"]["saved"])]
            for key, who in (("before", "plain"), ("after", "ours")):
                resident = memory[who]["peak"]
                row += [_pair(p[f"peak_{key}"], memory[who]["tensors"]), megabytes(resident) if resident else "-"]
        for bits in BITS:
            e = errors[str(bits)]
            row.append("nothing rounded" if e is None else f"{e['predicted']:.3f} / {e['measured']:.3f}")
        rows.append(row)
    peaks = ("peak, plain", "resident", "peak, ours", "resident")
    header = ["model", "reported MB", "held MB", *peaks, *(f"error, {b} bits" for b in BITS)]
    show(options.console, "predicted / measured; MB = 10**6 bytes", header, rows)


def _pair(predicted: int, measured: int | None) -> str:
    if not measured:
        return megabytes(predicted)
    return f"{megabytes(predicted)} / {megabytes(measured)} ({predicted / measured - 1:+.0%})"


def _plot(options: Options, models: dict[str, Any], size: str) -> None:
    peaks: dict[str, list[tuple[str, float, float]]] = {"torch.compile": [], "actcompile": []}
    errors: dict[str, list[tuple[str, float, float]]] = {f"{bits} bits": [] for bits in BITS}
    for name, found in models.items():
        memory = found["memory"]
        if "error" not in memory:
            for family, key, who in (("torch.compile", "before", "plain"), ("actcompile", "after", "ours")):
                predicted, measured = memory["predicted"][f"peak_{key}"], memory[who]["tensors"]
                peaks[family].append((name, predicted / 1e6, measured / 1e6))
        for bits in BITS:
            if e := found["errors"][str(bits)]:
                errors[f"{bits} bits"].append((name, e["predicted"], e["measured"]))
    path = options.out.joinpath(f"{NAME}-{size}.svg")
    panels = {"peak of a step, MB of tensors": peaks, "relative error of the gradients, actcompile": errors}
    plots.agreement(path, "The cost model: predicted against measured", panels)
