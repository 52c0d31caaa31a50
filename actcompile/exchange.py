"""Gradients that the ranks of DDP exchange in a few bits: the same blocks, for what is sent instead of what is saved.

Each rank rounds its own gradients, stochastically, and all ranks decode and add up what all have sent. So a step's
gradients are the same on every rank, and their mean over steps is that of exact ones. A rank receives
`bits / 32 * (ranks - 1)` times the gradients' bytes, where an all-reduce of float32 receives `2 * (ranks - 1) / ranks`
times: with 4 bits an eighth with two ranks, a half with eight.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .kernels import BlockFormat, dequantize, draw_seed, quantize
from .kernels.blocks.random_bits import rounding_seeded

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name from torch 2.13 on
SENT = (torch.float32, torch.bfloat16, torch.float16)  # gradients of other dtypes are all-reduced as they are


def compress_gradients(
    model: DistributedDataParallel, bits: int = 8, *, block: int = 256, error_feedback: bool = False, seed: int = 0
) -> DistributedDataParallel:
    """Has a DDP model exchange gradients in a few bits from now on.

    model = actcompile.compress_gradients(DistributedDataParallel(actcompile.compress(net)), bits=4)

    Args:
        model: as DDP made it, without a communication hook; the same comes back.
        bits: 1, 2, 4 or 8 per number, and two bounds in bfloat16 for each block.
        block: the number of consecutive gradients that share a minimum and a maximum.
        error_feedback: whether what rounding has added is subtracted from the next step's gradients before these are
            rounded (Seide et al., Interspeech 2014, sec. 3.2). Takes as much memory as the gradients.
        seed: of the rounding, which draws no random numbers of torch's own generators; ranks draw different ones.

    Raises:
        TypeError: `model` is no DistributedDataParallel.
        ValueError: `bits` or `block` is out of range; the message names it.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"model must be a DistributedDataParallel, whose gradients are exchanged, got {type(model).__name__}: "
            "wrap it first"
        )
    fmt = BlockFormat(bits, block, "uniform", torch.bfloat16)
    model.register_comm_hook(_Exchange(model.process_group, fmt, seed, {} if error_feedback else None), _exchange)
    return model


@dataclass
class _Exchange:
    """errors: what rounding has added to each parameter's gradient so far; None where that is not kept.

    sent: how many buckets.
    """

    group: dist.ProcessGroup
    fmt: BlockFormat
    seed: int
    errors: dict[Tensor, Tensor] | None
    sent: int = 0

    def draw_seed(self, device: torch.device) -> Tensor:
        """Another one for each bucket of each rank."""
        self.sent += 1
        with rounding_seeded(hash((self.seed, dist.get_rank(self.group), self.sent))):
            return draw_seed(1, device)


# DDP reads the annotations of its hook: this module may not leave them unevaluated.
def _exchange(state: _Exchange, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's hook: the mean over ranks of a bucket's gradients, in the bucket."""
    gradient, ranks = bucket.buffer(), dist.get_world_size(state.group)
    if gradient.dtype not in SENT:
        work = dist.all_reduce(gradient.div_(ranks), group=state.group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])
    errors = None
    if state.errors is not None:
        known = state.errors
        errors = torch.cat([known.get(p, torch.zeros_like(p)).flatten() for p in bucket.parameters()])
        gradient += errors
    fmt, seed = state.fmt, state.draw_seed(gradient.device)
    parts = quantize(gradient, seed, 0, fmt.bits, fmt.block, fmt.levels, fmt.metadata, fmt.words)
    message = torch.cat([part.view(torch.uint8).flatten() for part in parts])
    if errors is not None:
        _keep(state, bucket, gradient - _decoded(message, parts, gradient, fmt))
    received = message.new_empty(ranks, message.numel())

    def mean(future: torch.futures.Future[Tensor]) -> Tensor:
        future.value()  # raises what went wrong
        total = torch.zeros_like(gradient, dtype=torch.float32)
        for row in received:
            total += _decoded(row, parts, gradient, fmt)
        return gradient.copy_(total.div_(ranks))

    work = _gather(received.view(-1), message, group=state.group, async_op=True)
    return work.get_future().then(mean)


def _decoded(message: Tensor, parts: tuple[Tensor, ...], like: Tensor, fmt: BlockFormat) -> Tensor:
    """The gradients that a message holds, whose parts are as large as these."""
    sent = message.split([p.nbytes for p in parts])
    words, low, high = (s.clone().view(p.dtype).view(p.shape) for s, p in zip(sent, parts, strict=True))
    return dequantize(words, low, high, list(like.shape), like.dtype, fmt.bits, fmt.block, fmt.levels)


def _keep(state: _Exchange, bucket: dist.GradBucket, errors: Tensor) -> None:
    assert state.errors is not None
    errors = errors.nan_to_num(0.0, 0.0, 0.0)  # of infinite gradients: a scaler skips that step
    sizes = [p.numel() for p in bucket.parameters()]
    for parameter, error in zip(bucket.parameters(), errors.split(sizes), strict=True):
        state.errors[parameter] = error.view_as(parameter).clone()
