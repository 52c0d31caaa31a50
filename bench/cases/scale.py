"""Where one machine's memory ends: full-batch training on ogbn-products' shape, and on parts of it.

Nodes and edges grow together, so everything should grow in proportion. What needs more memory than there is, is not
run: its figures are the largest measured ones, times the edges.
"""

from __future__ import annotations

from typing import Any

from bench import plots
from bench.pool import Process, WorkerFailed
from bench.registry import Options, case
from bench.results import earlier, megabytes, progress, show, write
from bench.zoo import SHARES, SIZES, ZOO, Brought

NAME, MODEL = "scale", "sage"
COMPARED = ("eager", "inductor", "default")
ROOM = 20e9  # bytes that a step may be expected to take
FIELDS = ("saved", "peak", "seconds")
Result = dict[str, Any]


@case(NAME, "SAGE on ogbn-products' shape and parts of it: saved bytes, peak, step; beside eager and torch.compile")
def run(options: Options) -> Result:
    models = options.models or (MODEL,)
    shares = {"tiny": 1} if options.quick else SHARES
    steps = options.steps or 3
    variants = options.pick(COMPARED)
    settings = {"threads": Brought("", "tiny").threads, "steps": steps}
    known: Result = earlier(options.out, NAME, settings).get("models", {})
    with progress(options.console) as bar:
        task = bar.add_task("", total=len(models) * len(variants) * len(shares))
        for model in models:
            found: dict[str, Result] = known.setdefault(model, {})
            for variant in variants:
                found[variant] = {}
                for share in shares:
                    bar.update(task, description=f"{model}, {variant}: {share}")
                    found[variant][share] = _measured(Brought(model, share), variant, found[variant], steps)
                    bar.advance(task)
                    write(options.out, NAME, {"settings": settings, "models": known})
    _print(options, known)
    if not options.quick:
        for model, found in known.items():
            _plot(options, model, found)
    failed = [r for found in known.values() for shares in found.values() for r in shares.values() if "error" in r]
    return {"settings": settings, "models": known, "correct": not failed}


def _measured(workload: Brought, variant: str, smaller: dict[str, Result], steps: int) -> Result:
    """Bytes and seconds of a step, in one process; or in proportion to a smaller one's, where there is no room."""
    expected = _in_proportion(workload.size, smaller)
    if expected and (expected["peak"] or 0) > ROOM:
        return expected
    try:
        with Process(workload, variant) as process:
            seconds = sorted(process.ask({"do": "step"})["seconds"] for _ in range(steps))
            saved, peak = (process.ask({"do": do})["bytes"] for do in ("saved", "peak"))
    except WorkerFailed as failure:
        return {"error": str(failure)}
    return {"saved": saved, "peak": peak, "seconds": seconds[len(seconds) // 2], "measured": True}


def _in_proportion(size: str, smaller: dict[str, Result]) -> Result | None:
    measured = {name: r for name, r in smaller.items() if r.get("measured")}
    if not measured:
        return None
    name, result = max(measured.items(), key=lambda item: SIZES[item[0]].edges)
    times = SIZES[size].edges / SIZES[name].edges
    return {**{f: result[f] and result[f] * times for f in FIELDS}, "measured": False}


def _print(options: Options, models: dict[str, dict[str, dict[str, Result]]]) -> None:
    rows = []
    for model, found in models.items():
        for variant, shares in found.items():
            for share, r in shares.items():
                size = SIZES[share]
                if "error" in r:
                    end = r["error"].strip().splitlines()[-1][:60]
                    rows.append([model, variant, f"{size.edges:,}", f"failed: {end}", "", "", ""])
                    continue
                about = "" if r["measured"] else "~"
                per_edge = r["seconds"] / size.edges * 1e9
                row = [f"{about}{megabytes(r['saved'])}", f"{about}{megabytes(r['peak'])}"]
                row += [f"{about}{r['seconds']:,.2f}", f"{per_edge:,.0f}" if r["measured"] else ""]
                rows.append([model, variant, f"{size.edges:,}", *row])
    title = "MB = 10**6 bytes; ~: in proportion to the largest that was run; " + ", ".join(ZOO[m].note for m in models)
    show(options.console, title, ["model", "variant", "edges", "saved MB", "peak MB", "s / step", "ns / edge"], rows)


def _plot(options: Options, model: str, found: dict[str, dict[str, Result]]) -> None:
    lines = {
        variant: [(SIZES[s].edges, r["peak"] / 1e9, r["measured"]) for s, r in shares.items() if r.get("peak")]
        for variant, shares in found.items()
    }
    path = options.out / f"{NAME}-{model}.svg"
    title = f"Peak of a step on ogbn-products' shape and parts of it, {model}"
    plots.growth(path, title, "edges", "GB over what the data takes", lines)
