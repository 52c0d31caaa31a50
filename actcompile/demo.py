"""A 3-layer GraphSAGE trained full-batch on a real graph: by `torch.compile`, then with its activations compressed.

`python -m actcompile demo` runs `demo`. What a training script of your own needs is one line of `train`:
`actcompile.compress(model)`.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import actcompile
from actcompile import datasets
from actcompile.backend import check_compilers
from actcompile.config import Config

FALLBACK = (19_717, 88_648, 500, 3)  # PubMed's shape: nodes, edges, features, classes


@dataclass(frozen=True)
class Result:
    """One training run: test accuracy, and of one training step the bytes saved for backward, the peak (None where this
    machine cannot measure it), and the median seconds."""

    name: str
    accuracy: float
    saved_bytes: int
    peak_bytes: int | None
    seconds: float
    report: actcompile.Report


def demo(
    console: Console,
    config: Config,
    dataset: str = "pubmed",
    shape: tuple[int, int, int, int] | None = None,
    hidden: int = 256,
    epochs: int = 40,
    device: str | None = None,
    seed: int = 0,
) -> list[Result]:
    """Trains the same model twice, plain and compressed, and prints what came of it.

    Args:
        config: how the compressed model is compressed; both are compiled by its `inner`.
        epochs: at least 3: the first step compiles, the last one's memory is measured, the others' time.
        dataset: a name of `actcompile.datasets`; where it is not to be had, a generated graph takes its place.
        shape: nodes, edges, features and classes of a generated graph to use instead.
        device: by default CUDA where there is a device, else the CPU.

    Raises:
        ImportError: torch_geometric is not installed; the message says what to do.
        RuntimeError: no such device, or no compiler for it; the message says what to install, or how to go on without.
        ValueError: too few epochs.
    """
    if epochs < 3:
        raise ValueError(f"epochs must be at least 3, got {epochs}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device here, or this torch is built without CUDA: use the CPU")
    if config.inner == "inductor":
        check_compilers([torch.empty(0, device=device)])
    graph_sage()
    task = find_task(console, dataset, shape)
    console.print(
        f"{task.name} ({task.source}): {task.nodes:,} nodes, {task.edges:,} edges, {task.features} features, "
        f"{task.classes} classes\nGraphSAGE: 3 layers of {hidden}, BatchNorm, dropout 0.5; {device}, {config.inner}"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=console) as progress:
        for name, compressed in (("torch.compile", False), ("actcompile", True)):
            bar = progress.add_task(f"{name}: compiles", total=epochs)

            def show(loss: float, bar: Any = bar, name: str = name) -> None:
                progress.update(bar, advance=1, description=f"{name}: loss {loss:.3f}")

            results.append(train(name, task, config, compressed, hidden, epochs, device, seed, show))
            torch.compiler.reset()  # the second model starts like the first
    console.print(table(results))
    console.print(results[-1].report)
    return results


def train(
    name: str,
    task: datasets.NodeTask,
    config: Config,
    compressed: bool,
    hidden: int,
    epochs: int,
    device: str,
    seed: int,
    show: Callable[[float], None],
) -> Result:
    """Trains full-batch with Adam; the test accuracy is that of the epoch with the best validation accuracy."""
    torch.manual_seed(seed)
    model = graph_sage()(task.features, hidden, 3, task.classes, dropout=0.5, norm="batch_norm").to(device)
    x, edge_index, y = task.x.to(device), task.edge_index.to(device), task.y.to(device)
    nodes, val_mask, test_mask = (mask.to(device) for mask in task.split())
    nodes = nodes.nonzero().flatten()

    forward: Callable[..., Tensor] = model
    if compressed:
        actcompile.compress(model, config)  # the one line; calling the model now runs it compiled and compressed
    else:
        forward = torch.compile(model, backend=config.inner)

    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)

    def step() -> float:
        model.train()
        loss = F.cross_entropy(forward(x, edge_index)[nodes], y[nodes])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    seconds, best, peak = [], (-1.0, 0.0), None
    for epoch in range(1, epochs + 1):
        if epoch == epochs:
            loss, peak = with_peak_memory(step, device)
        else:
            start = time.perf_counter()
            loss = step()  # float(loss) waits for the device
            if epoch > 1:
                seconds.append(time.perf_counter() - start)
        show(loss)
        if epoch % 5 == 0 or epoch == epochs:
            best = max(best, evaluate(model, x, edge_index, y, val_mask, test_mask))
    model.train()  # in eval mode there is no dropout, and less to save
    report = actcompile.explain(model) if compressed else actcompile.explain(model, x, edge_index, config=config)
    saved = report.saved_bytes_after if compressed else report.saved_bytes_before
    return Result(name, best[1], saved, peak, statistics.median(seconds), report)


def evaluate(
    model: nn.Module, x: Tensor, edge_index: Tensor, y: Tensor, val_mask: Tensor, test_mask: Tensor
) -> tuple[float, float]:
    """Accuracy of validation and test nodes; a few evaluations are not worth a compilation."""
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        right = model(x, edge_index).argmax(-1) == y
    return float(right[val_mask].float().mean()), float(right[test_mask].float().mean())


def find_task(console: Console, dataset: str, shape: tuple[int, int, int, int] | None) -> datasets.NodeTask:
    """The data set asked for, or, with a word about it, a generated graph."""
    if shape is not None:
        return datasets.generated(*shape)
    try:
        return datasets.load(dataset)
    except datasets.DataUnavailable as reason:
        console.print(f"{reason}\nGoing on with a generated graph of PubMed's shape.", style="yellow")
        return datasets.generated(*FALLBACK)


def graph_sage() -> Callable[..., nn.Module]:
    """PyG's own model, as it is."""
    try:
        from torch_geometric.nn import GraphSAGE
    except ImportError as error:
        raise ImportError(
            "the demo's model comes from torch_geometric, which is not installed: pip install 'actcompile[demo]'"
        ) from error
    return GraphSAGE


def table(results: list[Result]) -> Table:
    """Both runs side by side; MB = 10**6 bytes."""
    title = "one training step: MB = 10**6 bytes, peak over the memory before the step"
    caption = "one seed each, with other dropout: accuracies differ by several points from seed to seed"
    made = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for header in ("", "test accuracy", "saved MB", "peak MB", "seconds per step"):
        made.add_column(header, justify="right" if header else "left")
    for r in results:
        peak = "-" if r.peak_bytes is None else f"{r.peak_bytes / 1e6:,.1f}"
        made.add_row(r.name, f"{r.accuracy:.1%}", f"{r.saved_bytes / 1e6:,.1f}", peak, f"{r.seconds:.3f}")
    return made


def with_peak_memory(step: Callable[[], float], device: str) -> tuple[float, int | None]:
    """Runs a step; returns its result, and by how many bytes memory rose above its level before, at most.

    CUDA: from the caching allocator. CPU: the resident set's high-water mark, which Linux lets a process reset; None
    elsewhere.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return step(), torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # pages that are free but still held would hide the first part of the rise
        Path("/proc/self/clear_refs").write_text("5")
        resident = _resident("VmRSS")
    except (OSError, AttributeError, TypeError):
        return step(), None
    return step(), _resident("VmHWM") - resident


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024
