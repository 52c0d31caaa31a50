"""What is there to win in DDP: bytes of the gradients that ranks exchange, beside those of saved activations."""

from __future__ import annotations

import statistics
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import actcompile
from bench.measure import relative_error, seconds
from bench.registry import Options, case
from bench.results import megabytes, show
from bench.workload import Training
from bench.zoo import Brought

NAME, RANKS = "ddp", 2
MODELS = ("sage", "gcn", "gin", "gat")
BITS = (8, 4, 2)
Result = dict[str, Any]


@case(NAME, "two ranks of DDP over gloo: gradients exchanged in a few bits, beside saved activations")
def run(options: Options) -> Result:
    size = "tiny" if options.quick else options.size
    names = [name for name in MODELS if not options.models or name in options.models]
    steps = options.steps or (3 if options.quick else 9)
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_rank, (name, size, steps, folder), nprocs=RANKS)
            found[name] = torch.load(Path(folder) / "result.pt")
    rows = []
    for name, r in found.items():
        saved = f"{megabytes(r['saved_before'])} -> {megabytes(r['saved_after'])}"
        for way, e in r["exchanged"].items():
            ratio = e["seconds"] / r["exchanged"]["exact"]["seconds"]
            rows.append([name, saved, way, f"{e['bytes'] / 1e6:.3f}", f"{e['error']:.1%}", f"{ratio:.2f}"])
    header = ["model", "saved activations, MB", "gradients", "MB", "error", "step"]
    show(options.console, "of one rank; MB = 10**6 bytes; error and step: beside all-reduced gradients", header, rows)
    settings = {"size": size, "steps": steps, "ranks": RANKS, "threads": 1}
    return {"settings": settings, "models": found, "file": f"{NAME}-{size}", "correct": True}


def _rank(rank: int, name: str, size: str, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{Path(folder) / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(minutes=10))

    def training(bits: int | None, compressed: bool = True) -> Training:
        def prepare(model: nn.Module) -> nn.Module:
            ddp = DistributedDataParallel(actcompile.compress(model) if compressed else model)
            return ddp if bits is None else actcompile.compress_gradients(ddp, bits)

        return Brought(name, size, dropout=False).training(prepare)

    ways = {"exact": training(None), **{f"{bits} bits": training(bits) for bits in BITS}}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for trained in ways.values():  # compiled, and the buckets are in their order
        trained.step()
        trained.step()
    for _ in range(steps):
        for way, trained in ways.items():
            times[way].append(seconds(trained.step))
    exact = ways["exact"]
    report = actcompile.explain(exact.model)
    # Of eager models: activations that are rounded another way would count, too.
    gradients = {way: training(bits, False).gradients(seed=0) for way, bits in zip(ways, (None, *BITS), strict=True)}
    numbers = sum(p.numel() for p in exact.model.parameters())
    exchanged = {}
    for way in ways:
        bits = 32 if way == "exact" else int(way.split()[0]) + 2 * 16 / 256
        exchanged[way] = {
            "bytes": int(numbers * bits / 8),
            "seconds": statistics.median(times[way]),
            "error": relative_error(gradients[way], gradients["exact"]),
        }
    before, after = report.saved_bytes_before, report.saved_bytes_after
    if rank == 0:
        result = {"saved_before": before, "saved_after": after, "exchanged": exchanged}
        torch.save(result, Path(folder) / "result.pt")
    dist.destroy_process_group()
