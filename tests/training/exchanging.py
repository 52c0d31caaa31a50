"""One of two ranks that exchange gradients in a few bits: `python -m tests.training.exchanging RANK FOLDER`.

Writes FOLDER/RANK.pt: by name, what the tests compare.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from actcompile import compress, compress_gradients, explain
from tests.helpers import SAVED
from tests.training.ranks import RANKS, Net, part

STEPS = 150
BITS = (2, 4, 8)


def gradient_of(model: nn.Module, x: Tensor) -> Tensor:
    """All gradients of a step as one vector."""
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 700), nn.ReLU(), nn.Linear(700, 300), nn.ReLU(), nn.Linear(300, 4)).to(dtype)


def ddp(model: nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(model, bucket_cap_mb=0.5)  # several buckets


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    x, edge_index = part(rank)
    found: dict[str, object] = {"exact": gradient_of(ddp(mlp()), x)}
    for bits in BITS:
        model = compress_gradients(ddp(mlp()), bits)
        gradient_of(model, x)  # after it DDP arranges its buckets anew
        state = torch.get_rng_state()
        drawn = torch.stack([gradient_of(model, x) for _ in range(STEPS)])
        found[f"drew {bits}"] = not torch.equal(state, torch.get_rng_state())
        found[f"last {bits}"], found[f"mean {bits}"], found[f"variance {bits}"] = drawn[-1], drawn.mean(0), drawn.var(0)
    model = compress_gradients(ddp(mlp()), 2, error_feedback=True)
    found["fed back"] = torch.stack([gradient_of(model, x) for _ in range(STEPS)])[1:].mean(0)
    found["infinite"] = gradient_of(compress_gradients(ddp(mlp())), x / 0 if rank else x)
    found["double"] = gradient_of(compress_gradients(ddp(mlp(torch.float64)), 2), x.double())
    found["double, exact"] = gradient_of(ddp(mlp(torch.float64)), x.double())
    both = compress_gradients(DistributedDataParallel(compress(Net(), **SAVED), find_unused_parameters=True))
    for _ in range(2):
        both.zero_grad(set_to_none=True)
        both(x, edge_index).square().mean().backward()
    found["both"] = {n: p.grad for n, p in both.named_parameters()}
    found["saved"] = explain(both.module).saved_bytes_after
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
