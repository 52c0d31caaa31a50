"""Gradients of a model, exact and rounded, with everything else equal: what `check` measures with.

Every variant is a copy of the model, compiled on its own. A step restores buffers and the state of all random
generators, so that dropout draws the same in every step of every variant; the random bits of rounding come from a
generator of their own (`rounding_seeded`). So two steps of a variant differ by rounding alone.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from actcompile.kernels.blocks.random_bits import rounding_seeded
from actcompile.passes.graph import _torch

from ..api import compile_calls, compile_watched
from ..backend import compile_plain
from ..config import Config
from ..report.data import GraphReport, Row
from ..report.last_run import LastRun
from ..tracing.capture import whole_graphs
from ..tracing.trace import _region, _undisturbed

SEED = 0  # of all that is random in a model
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What is differentiated: a model, what it is called with, and a scalar loss of its outputs.

    Attributes:
        loss: None for a fixed random projection of the outputs; the output itself where that is one number.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    keywords: Mapping[str, Any]
    loss: Callable[[Any], Tensor] | None
    dynamic: bool | None = None

    def named_inputs(self) -> dict[str, Tensor]:
        """Tensors among the inputs that require gradients."""
        leaves = _torch.pytree.tree_leaves_with_path((self.inputs, dict(self.keywords)))
        tensors = {_input_name(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}
        return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


def _input_name(path: Sequence[Any]) -> str:
    (kind, *rest) = path
    first, *inside = rest
    name = f"input {first.idx}" if kind.idx == 0 else f"input {first.key}"
    return name + _torch.pytree.keystr(tuple(inside))


@dataclass
class Graphs:
    """What was compiled for a variant: the graphs' reports, and which gradients each saved activation reaches."""

    runs: list[LastRun] = field(default_factory=list)
    names: list[list[str | None]] = field(default_factory=list)  # of each graph's inputs; None: made by another graph

    @property
    def reports(self) -> list[GraphReport]:
        return [run.report for run in self.runs]

    def rounded(self) -> list[tuple[Row, frozenset[str] | None]]:
        """Every rounded activation, and the names of the gradients that it reaches; None for all of them.

        Where a graph is one of several, what goes back into another one may reach any gradient there.
        """
        found = []
        for report, names in zip(self.reports, self.names, strict=True):
            for row in report.rows:
                if row.biased is not None:
                    reached = [names[i] if 0 <= i < len(names) else None for i in row.reaches]
                    found.append((row, None if None in reached else frozenset(r for r in reached if r is not None)))
        return found


class Variant:
    """A copy of a task's model, compiled, whose steps give gradients.

    Args:
        config: how activations are kept.
        only: keys of the activations that may be rounded; None for all.
        plain: compiles with the same inner compiler and the same dropout, but without any of our passes.
    """

    def __init__(self, task: Task, config: Config, only: frozenset[str] | None = None, *, plain: bool = False) -> None:
        self.task = task
        self.graphs = Graphs()
        try:
            self.model = copy.deepcopy(task.model)
        except Exception as error:
            raise TypeError(f"a copy of the model is checked, but it cannot be copied: {error}") from error
        for parameter in self.model.parameters():
            parameter.grad = None
        self.buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.wanted = {n: p for n, p in self.model.named_parameters() if p.requires_grad} | task.named_inputs()
        names = {id(tensor): name for name, tensor in self.wanted.items()}

        @whole_graphs
        def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
            if plain:
                return compile_plain(gm, inputs, config)
            compiled, runs = compile_watched(gm, inputs, config, only)
            self.graphs.runs += runs
            self.graphs.names += [[names.get(id(tensor)) for tensor in inputs]] * len(runs)
            return compiled

        compiled = compile_calls(self.model, backend, task.dynamic)
        self.leaving = contextlib.ExitStack()
        self.leaving.enter_context(_undisturbed(backend, _region(compiled)))

    def __enter__(self) -> Variant:
        return self

    def __exit__(self, *error: object) -> None:
        """Frees the compiled code, and puts back what compiling it left behind in this process."""
        self.leaving.close()

    def step(self, rounding: int = 0) -> tuple[list[Tensor], Gradients]:
        """Outputs and gradients of one step; `rounding` seeds the random bits of rounding, and nothing else."""
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                if name in self.buffers:
                    buffer.copy_(self.buffers[name])
        _seed(SEED)
        with torch.enable_grad(), rounding_seeded(rounding):
            outputs = self.model(*self.task.inputs, **self.task.keywords)
            leaves = [leaf for leaf in _torch.pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
            loss = _projection(leaves) if self.task.loss is None else self.task.loss(outputs)
            _require_scalar(loss)
            found = torch.autograd.grad(loss, list(self.wanted.values()), allow_unused=True)
        gradients = {name: _dense(g) for name, g in zip(self.wanted, found, strict=True) if g is not None}
        return [leaf.detach() for leaf in leaves], gradients


def _projection(outputs: list[Tensor]) -> Tensor:
    outputs = [o for o in outputs if o.requires_grad]
    if not outputs:
        raise ValueError("no output of the model depends on a tensor that requires a gradient: there is none to check")
    if len(outputs) == 1 and outputs[0].numel() == 1:
        return outputs[0].sum()
    total = outputs[0].new_zeros((), dtype=torch.float32)
    for output in outputs:
        generator = torch.Generator(output.device).manual_seed(SEED)
        weights = torch.randn(output.shape, generator=generator, device=output.device)
        total = total + (output * weights.to(output.dtype)).sum()
    return total


def _require_scalar(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss(outputs) must return one number as a tensor, got {got}")
    if not loss.requires_grad:
        raise ValueError("loss(outputs) does not depend on a tensor that requires a gradient: there is none to check")


def _dense(gradient: Tensor) -> Tensor:
    gradient = gradient.detach()
    gradient = gradient if gradient.layout is torch.strided else gradient.to_dense()
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@contextlib.contextmanager
def undisturbed(task: Task) -> Iterator[None]:
    """Puts back the state of all random generators."""
    tensors = [*task.model.parameters(), *task.model.buffers(), *task.named_inputs().values()]
    devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
