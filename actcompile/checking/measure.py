"""Measure how much noise rounding each activation brings into the gradients, in every format that it may have.

To first order, rounding an activation `s` changes the gradients by `J (rounded - s)`, with `J` the derivative of
backward's outputs by that saved value. Elements are rounded independently, so the variance of all gradients together is
`sum over elements e of var(e) |J[:, e]|**2`. The variance of an element is known from its block and its levels; and
with random signs `v`, one for each element of each gradient, the square of `(v J)[e]` has the mean `|J[:, e]|**2`
(Hutchinson). One run of backward, differentiated once by all saved values together, gives `v J` for all of them.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from actcompile.kernels.blocks.levels import level_values
from actcompile.kernels.blocks.quantize import round_outward
from actcompile.kernels.edges.group import row_of
from actcompile.kernels.edges.ops import aggregation
from actcompile.kernels.edges.program import parse, run_reference
from actcompile.passes.codecs.codecs import Cast, Codec, Quantize
from actcompile.passes.graph import _torch
from actcompile.passes.graph.find import memory_order
from actcompile.passes.plan.costs import codec_name
from actcompile.passes.plan.fit import BLOCKS, ways_of
from actcompile.passes.plan.plan import Choice, Plan
from actcompile.passes.plan.policy import Policy

from ..api import _configs
from ..config import Config
from .observe import Watcher, unrounded

ops = torch.ops.actcompile
LIMIT = 2**22  # elements of an activation that are looked at for one format
Loss = Callable[[Any], Tensor]


def measure(
    model: nn.Module,
    *inputs: Any,
    loss: Loss | None = None,
    steps: int = 1,
    probes: int = 2,
    config: Config | None = None,
    **options: Any,
) -> Config:
    """A config that knows the noise that each activation's rounding adds to the gradients, for `max_gradient_error`
    and for budgets.

        config = actcompile.measure(model, x, edge_index, loss=lambda out: F.cross_entropy(out[train], y[train]))
        model = actcompile.compress(model, config, budget=0.3)

    A copy of the model runs `steps` times, op by op and with nothing rounded, and its backward is differentiated
    `probes` times: that takes the memory of three or four uncompressed steps, so use a part of the graph where the
    whole one does not fit. Noise is relative, and keeps from part to whole. Neither the model nor the state of random
    generators changes.

    Args:
        model: a module, compressed or not, in the mode in which it is trained.
        inputs: what it is called with.
        loss: from what the model returns to the scalar that is differentiated; by default half the sum of squares of
            all floats that it returns. How strong gradients are beside their noise depends on it: give the real one.
        steps: runs, each with other dropout.
        probes: random signs for each step; more make the measurement more exact, at 2 a few per cent off.
        config: what is rounded, and how; by default that of `compress`, or the defaults.
        options: fields of `Config` to change.

    Returns:
        the config with `measured` filled.

    Raises:
        TypeError, ValueError: the model is no module, a number is less than 1, or an option is wrong.
        RuntimeError: backward cannot be differentiated: it has an op without a derivative.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: wrap the function in one")
    for name, number in (("steps", steps), ("probes", probes)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {number!r}")
    made = replace(Config.make(config or _configs.get(model), **options), plan=None)  # it is for a new plan
    found = noises(model, inputs, loss, made, steps, probes)
    tables = {key: {codec_name(codec): noise for codec, noise in n.by_codec.items()} for key, n in found.items()}
    return replace(made, measured=tuple((key, tuple(sorted(table.items()))) for key, table in sorted(tables.items())))


@dataclass
class Noises:
    """Of one activation: its number of elements, and what each way of rounding it adds to the gradients' noise."""

    numel: int
    by_codec: dict[Codec, float] = field(default_factory=lambda: defaultdict(float))


def noises(
    model: nn.Module,
    inputs: Sequence[Any],
    loss: Loss | None,
    config: Config,
    steps: int,
    probes: int,
    blocks: Sequence[int] = BLOCKS,
) -> dict[str, Noises]:
    """What `measure` measures, by activation, for blocks of these numbers of elements."""
    unbound = replace(config, budget=None, max_gradient_error=None, max_slowdown=None, measured=())
    found: dict[str, Noises] = {}
    forward = unrounded(copy.deepcopy(model), unbound, lambda: _Probe(found, blocks, steps, probes))
    with torch.random.fork_rng(), torch.enable_grad():
        for _ in range(steps):
            (loss or _half_of_squares)(forward(*inputs)).backward()
    return found


def _half_of_squares(output: Any) -> Tensor:
    floats = [t for t in _torch.pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.stack([t.square().sum() / 2 for t in floats]).sum()


class _Probe(Watcher):
    """Notes the noise of every format of every activation of a graph: means over so many steps and probes."""

    def __init__(self, found: dict[str, Noises], blocks: Sequence[int], steps: int, probes: int) -> None:
        self.found, self.blocks, self.steps, self.probes = found, blocks, steps, probes

    def planned(self, plan: Plan, policy: Policy) -> None:
        ways = [ways_of(choice, plan, policy, self.blocks) for choice in plan.choices]
        rounding = [[c for c in choices if isinstance(c.codec, Quantize | Cast)] for choices in ways]
        self.watched = {choices[0].activation.placeholder.name: choices for choices in rounding if choices}

    def backward(self, graph: fx.GraphModule, inputs: list[Any]) -> Any:
        names = [n.name for n in graph.graph.find_nodes(op="placeholder")]
        return _torch.make_boxed_func(lambda *given: self.run(graph, dict(zip(names, given, strict=True))))

    def run(self, backward: fx.GraphModule, given: dict[str, Any]) -> Any:
        """Runs backward on what it is given, and notes what rounding would do; returns its outputs."""
        leaves = {name: given[name].detach().requires_grad_() for name in self.watched}
        with torch.enable_grad():
            outputs = _Differentiable(backward).run(*({**given, **leaves}.values()))
        flat = [o for o in _torch.pytree.tree_leaves(outputs) if isinstance(o, Tensor) and o.is_floating_point()]
        size = sum(float(o.detach().double().square().sum()) for o in flat)
        depending = [o for o in flat if o.requires_grad]
        if depending and size:
            for name, squares in self.columns(depending, leaves).items():
                for choice in self.watched[name]:
                    noted = self.found.setdefault(choice.activation.key, Noises(leaves[name].numel()))
                    noise = _noise(leaves[name].detach(), squares, choice) / size
                    noted.by_codec[choice.codec] += noise / self.steps
        return _torch.pytree.tree_map_only(Tensor, Tensor.detach, outputs)

    def columns(self, outputs: Sequence[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """For each element of the leaves, an estimate of the squared norm of the outputs' derivative by it."""
        squares: dict[str, Tensor] = {}
        for _ in range(self.probes):
            signs = [torch.randint_like(o, 2).mul_(2).sub_(1) for o in outputs]
            slopes = torch.autograd.grad(outputs, list(leaves.values()), signs, retain_graph=True, allow_unused=True)
            for name, slope in zip(leaves, slopes, strict=True):
                if slope is not None:
                    squares[name] = squares.get(name, 0) + slope.square() / self.probes
        return squares


def _noise(value: Tensor, squares: Tensor, choice: Choice) -> float:
    """The variance that rounding `value` gives the gradients, from the squared norms of its derivative's columns."""
    if isinstance(choice.codec, Cast):  # to nearest: the same error each time
        error = value.to(choice.codec.dtype).to(value.dtype) - value
        return float((error.square() * squares).sum(dtype=torch.float64))
    assert isinstance(choice.codec, Quantize)
    order = memory_order(choice.activation.value)
    value, squares = (t.permute(order).contiguous().float() for t in (value, squares))
    if choice.codec.standardised:  # what is rounded has mean 0 and deviation 1 by column
        rows = list(range(value.dim() - 1))
        deviation = value.std(rows, keepdim=True, unbiased=False).clamp_min(1e-12)
        value, squares = (value - value.mean(rows, keepdim=True)) / deviation, squares * deviation.square()
    block = choice.codec.format.block
    blocks, weights = _blocks(value, block), _blocks(squares, block)
    wanted = max(1, LIMIT // block)
    scale = 1.0
    if len(blocks) > wanted:
        some = torch.linspace(0, len(blocks) - 1, wanted, dtype=torch.float64, device=value.device).long()
        scale = len(blocks) / wanted
        blocks, weights = blocks[some], weights[some]
    return scale * float((rounding_variance(blocks, choice.codec) * weights).sum(dtype=torch.float64))


def _blocks(x: Tensor, block: int) -> Tensor:
    """In rows of `block` elements; the last one is filled up with the last element, which widens no block."""
    flat = x.reshape(-1)
    missing = -flat.numel() % block
    if missing:
        flat = torch.cat([flat, flat[-1:].expand(missing) if x.dtype.is_floating_point else flat[:0]])
    return flat.view(-1, block)


def rounding_variance(blocks: Tensor, codec: Quantize) -> Tensor:
    """The variance of each element after stochastic rounding, `(right - x)(x - left)` for its neighbouring levels.

    Args:
        blocks: float32 (blocks, block).
    """
    fmt = codec.format
    low, high = (end[:, None] for end in round_outward(blocks.amin(1), blocks.amax(1), fmt.metadata))
    step = ((high - low) / fmt.top).clamp_min(torch.finfo(torch.float32).tiny)
    code = ((blocks - low) / step).clamp(0, fmt.top)
    levels = torch.tensor(level_values(fmt.bits, fmt.block, fmt.levels), dtype=torch.float32, device=blocks.device)
    right = torch.searchsorted(levels, code).clamp(1, fmt.top)
    return (levels[right] - code) * (code - levels[right - 1]) * step.square()


class _Differentiable(fx.Interpreter):
    """Runs a backward graph so that autograd follows: our ops on edges by what they are made of."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is ops.edges.default and _needs_gradient(args):
            return _Differentiable._edges(*args)
        if target is ops.aggregate.default and _needs_gradient(args):
            return _Differentiable._aggregate(*args)
        return super().call_function(target, args, kwargs)

    @staticmethod
    def _edges(
        program: str, by: Tensor, by_row: int, nodes: int, heads: int, columns: int,
        indices: Sequence[Tensor], rows: Sequence[int], operands: Sequence[Tensor], grouped: Sequence[Tensor],
    ) -> list[Tensor]:  # fmt: skip
        others = [row_of(index, row).long() for index, row in zip(indices, rows, strict=True)]
        reference = functools.partial(run_reference, parse(program))
        return checkpoint(  # type: ignore[no-any-return]  # the values of edges live for one region at a time
            reference, [o.contiguous() for o in operands], row_of(by, by_row).long(), others, nodes, heads, columns,
            use_reentrant=False,
        )  # fmt: skip

    @staticmethod
    def _aggregate(
        matrix: Tensor, weight: Tensor | None, take: Tensor, take_row: int, by: Tensor, by_row: int, nodes: int,
        grouped: Sequence[Tensor],
    ) -> Tensor:  # fmt: skip
        if weight is None or not weight.requires_grad:
            return _Aggregate.apply(matrix, weight, take, take_row, by, by_row, nodes)  # type: ignore[no-any-return]
        text = aggregation(str(matrix.dtype)[6:], str(weight.dtype)[6:])
        width = matrix[0].numel()
        (out,) = _Differentiable._edges(text, by, by_row, nodes, 1, width, [take], [take_row], [matrix, weight], [])
        return out.view(nodes, *matrix.shape[1:])


class _Aggregate(torch.autograd.Function):
    """`aggregate`, whose derivative by the matrix is itself, from the other end of each edge."""

    @staticmethod
    def forward(
        ctx: Any,
        matrix: Tensor,
        weight: Tensor | None,
        take: Tensor,
        take_row: int,
        by: Tensor,
        by_row: int,
        nodes: int,
    ) -> Tensor:
        ctx.save_for_backward(weight, take, by)
        ctx.rows, ctx.nodes = (take_row, by_row), matrix.shape[0]
        return ops.aggregate(matrix, weight, take, take_row, by, by_row, nodes, [])  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        weight, take, by = ctx.saved_tensors
        take_row, by_row = ctx.rows
        back = ops.aggregate(grad.contiguous(), weight, by, by_row, take, take_row, ctx.nodes, [])
        return back, None, None, None, None, None, None


def _needs_gradient(args: Any) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in _torch.pytree.tree_leaves(args))
