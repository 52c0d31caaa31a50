"""Random mini-batches, every one of another size, through one compiled model: how often is it compiled, and are the
gradients right?"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from rich.progress import track
from torch.nn import functional as F

from actcompile import datasets
from bench import _torch, models
from bench.measure import relative_error, saved_bytes
from bench.registry import Options, case
from bench.results import show
from bench.sampling import neighbor_loader, sampler_in_use
from bench.variants import VARIANTS

BATCHES, LIMIT = 20, 2
COMPARED = ("inductor", "lossless", "default", "4-bit")


@case("minibatch", "twenty mini-batches of PyG's NeighborLoader: compilations, gradients, saved bytes")
def run(options: Options) -> dict[str, Any]:
    task = datasets.generated(2_000, 12_000, 32, 8) if options.quick else datasets.load("pubmed")
    torch.manual_seed(0)
    loader = neighbor_loader(task.to_data(), [10, 10], batch_size=64 if options.quick else 512, shuffle=True)
    batches = [batch for batch, _ in zip(loader, range(BATCHES), strict=False)]
    original = models.build(
        "sage", task.features, task.classes, hidden=64 if options.quick else 256, layers=2, dropout=0.0
    )
    results: dict[str, dict[str, Any]] = {}
    for name in options.pick(COMPARED):
        _torch.forget_compilations()
        exact, ours = copy.deepcopy(original), copy.deepcopy(original)
        run_ours = VARIANTS[name].prepare(ours)
        errors, saved = [], []
        for batch in track(batches, description=name, console=options.console, transient=True):
            _gradients(exact, exact, batch)
            saved.append(_gradients(ours, run_ours, batch))
            errors.append(relative_error(_grads(ours), _grads(exact)))
        results[name] = {
            "compilations": _torch.compilations(),
            "gradient_error": statistics.mean(errors),
            "saved_bytes": statistics.mean(saved),
            "correct": max(errors) <= VARIANTS[name].gradient_error and _torch.compilations() <= LIMIT,
        }
    rows = [
        [n, str(r["compilations"]), f"{r['gradient_error']:.1e}", f"{r['saved_bytes'] / 1e6:.2f}"]
        for n, r in results.items()
    ]
    sizes = [b.num_nodes for b in batches]
    title = f"{len(batches)} batches of {min(sizes):,} to {max(sizes):,} nodes, sampled by {sampler_in_use()}"
    show(options.console, title, ["variant", "compilations", "gradient error", "saved MB per batch"], rows)
    return {
        "settings": {"data": task.name, "batches": len(batches), "sampler": sampler_in_use(), "nodes": sizes},
        "variants": results,
        "correct": all(r["correct"] for r in results.values()),
    }


def _grads(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _gradients(model: torch.nn.Module, forward: Any, batch: Any) -> int:
    """Leaves the gradients of the seed nodes' loss in the model; returns the bytes saved for backward."""
    model.zero_grad(set_to_none=True)
    out = forward(batch.x, batch.edge_index)
    saved = saved_bytes(out, [batch.x, batch.edge_index, *model.parameters(), *model.buffers()])
    F.cross_entropy(out[: batch.batch_size], batch.y[: batch.batch_size]).backward()
    return saved
