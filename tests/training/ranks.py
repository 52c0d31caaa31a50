"""One of two processes that train on half of a batch each: `python -m tests.training.ranks RANK FOLDER`.

Writes FOLDER/RANK.pt: for every way to train that is named in WAYS, the gradients by parameter and the reports' bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.nn import SAGEConv

from actcompile import compress, explain
from tests.helpers import EXACT, SAVED

ROUNDED: dict[str, Any] = {**SAVED, "bits": 8, "nonlinear_bits": 8}
RANKS, NODES, WIDTH = 2, 64, 512


class Net(nn.Module):
    """Parameters of 1 MB, so that DDP makes several buckets of them, and a layer that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList([SAGEConv(16, WIDTH), SAGEConv(WIDTH, WIDTH), SAGEConv(WIDTH, 4)])
        self.norm, self.unused = nn.LayerNorm(WIDTH), nn.Linear(3, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for conv in self.convs[:-1]:
            x = self.norm(conv(x, edge_index)).relu()
        return self.convs[-1](x, edge_index)


def part(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(NODES, 16, generator=generator), torch.randint(NODES, (2, 256), generator=generator)


def whole() -> tuple[Tensor, Tensor]:
    """The ranks' graphs as one, which a single process would train on."""
    x, edges = zip(*map(part, range(RANKS)), strict=True)
    return torch.cat(x), torch.cat([e + NODES * rank for rank, e in enumerate(edges)], dim=1)


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=1)


def sharded(model: Net) -> Net:
    mesh = init_device_mesh("cpu", (RANKS,))
    for conv in model.convs:
        fully_shard(conv, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "compress in DDP": lambda options: ddp(compress(Net(), **options)),
    "DDP in compress": lambda options: compress(ddp(Net()), **options),
    "compress in FSDP2": lambda options: sharded(compress(Net(), **options)),
    "FSDP2 in compress": lambda options: compress(sharded(Net()), **options),
}


def gradients(model: nn.Module, x: Tensor, edge_index: Tensor) -> dict[str, Tensor | None]:
    """By parameter, of the mean over nodes; those of the second of two steps, as the first one compiles."""
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model(x, edge_index).square().mean().backward()
    return {name.removeprefix("module."): _full(p.grad) for name, p in model.named_parameters()}


def _full(gradient: Any) -> Tensor | None:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    found = {}
    for way, make in WAYS.items():
        for kind, options in {"lossless": EXACT, "rounded": ROUNDED}.items():
            torch._dynamo.reset()
            model = make(options)
            torch.manual_seed(rank)
            step = gradients(model, *part(rank))
            report = explain(model)
            bytes_before_and_after = report.saved_bytes_before, report.saved_bytes_after
            found[way, kind] = {"gradients": step, "bytes": bytes_before_and_after}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
