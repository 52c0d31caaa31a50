"""One of two processes that train by one plan, which rank 0 makes: `python -m tests.training.pinned RANK FOLDER`.

It makes it of a step in DDP, for whose buckets torch cuts the graph. Batches have different sizes. Writes
FOLDER/RANK.pt: the gradients, and in how many activations the plan that was taken differs from the one that was made.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from actcompile import SavedPlan, compress, explain
from tests.helpers import SAVED
from tests.training.ranks import NODES, RANKS, Net, ddp, gradients, part

BOUNDS = {**SAVED, "max_gradient_error": 0.1}


def batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As many copies of the rank's graph as its number says, and one."""
    x, edge_index = part(rank)
    return x.repeat(rank + 1, 1), torch.cat([edge_index + NODES * copy for copy in range(rank + 1)], dim=1)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    path = folder / "plan.json"
    first = ddp(compress(Net(), **BOUNDS))
    gradients(first, *batch(rank))
    if rank == 0:
        explain(first).plan().save(path)
    dist.barrier()
    torch._dynamo.reset()
    model = ddp(compress(Net(), plan=path, inner="aot_eager"))
    torch.manual_seed(rank)
    step = gradients(model, *batch(rank))
    difference = explain(model).plan().difference(SavedPlan.load(path))
    torch.save({"gradients": step, "difference": len(difference.rows)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
