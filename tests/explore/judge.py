"""Runs a case, compares it with eager, and says what is wrong.

Compared are: that it compiles where plain `torch.compile` does; outputs, buffers, and, where nothing is rounded,
gradients, up to a multiple of what float32 itself is off from float64, and in float64 to a millionth of that; that
gradients are finite where eager's are; the bytes that autograd really holds with those of the report; and for a share
of the cases the mean of many roundings with the claims of the plan, as `actcompile.check` does.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

import actcompile
from actcompile.backend import compile_plain
from actcompile.checking.check import examine
from actcompile.checking.draws import Task
from actcompile.kernels.blocks.random_bits import rounding_seeded
from actcompile.kernels.edges import ops as edges_ops
from bench.measure import saved_bytes
from tests.explore.draw import Case, Model, batch, loss

TOLERATED = 0.02  # of a gradient that matters; one matters with a twentieth of all gradients together
CONFIRMING = 80  # roundings for a second look, in which chance would have to strike again
FINER = 1e-6  # what float64 may be off, of what float32 may; its numbers are finer by 5e8
COARSER = 10.0  # what bfloat16 may be off beside what it is off from float64, which is not known with random numbers
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """kind: "right", "skipped" or what is wrong, in a word or two; detail: the figures."""

    kind: str
    detail: str = ""

    @property
    def wrong(self) -> bool:
        return self.kind not in ("right", "skipped")


@dataclass
class Run:
    """held: bytes of what compiled graphs save, without `returned`: those of what the model returns, too."""

    outputs: list[Tensor]
    gradients: Gradients
    buffers: Gradients
    held: int
    returned: int


def judge(case: Case, means: bool = False) -> Outcome:
    """Runs a case. `means` also tests the mean of many roundings."""
    torch._dynamo.reset()
    with warnings.catch_warnings(), _kernels(case.kernels):
        warnings.simplefilter("ignore")
        try:
            model, inputs = Model(case), batch(case)
            eager = run(case, copy.deepcopy(model), inputs)
        except Exception as error:
            return Outcome("skipped", f"eager: {_words(error)}")
        if not all(torch.isfinite(o).all() for o in eager.outputs):
            return Outcome("skipped", "eager's outputs are not finite")
        try:
            ours, module = _ours(case, model, inputs)
        except Exception as error:
            return _unless_plain_fails(case, model, inputs, Outcome("does not run", _words(error)))
        found = _compare(case, model, inputs, eager, ours)
        if found.kind == "right":
            found = _bytes(case, ours, module)
        if found.kind == "right" and means and case.rounds and not case.changing:
            found = _means(case, model, inputs)
        return found


@contextmanager
def _kernels(compiled: bool) -> Iterator[None]:
    """Has fused message passing run compiled, or by its reference."""
    edges_ops._kernels.clear()
    with nullcontext() if compiled else mock.patch.object(edges_ops, "compile_source", lambda *_: None):
        yield
    edges_ops._kernels.clear()


def run(case: Case, model: nn.Module, inputs: tuple[Tensor, ...], call: Callable[..., Any] | None = None) -> Run:
    """One step of a model, called through `call` where that is given."""
    inputs = (inputs[0].detach().requires_grad_(case.input_gradient), *inputs[1:])
    torch.manual_seed(case.seed)
    with rounding_seeded(case.seed):  # dropout draws as without us
        outputs = (model if call is None else call)(*inputs)
    leaves = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,))]
    alive = [*inputs, *model.parameters(), *model.buffers()]
    end = torch.stack([o.sum() for o in leaves]).sum()
    held = saved_bytes(end, [*leaves, *alive], _is_compiled)
    returned = saved_bytes(end, alive, _is_compiled) - held
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if case.input_gradient:
        wanted["x"] = inputs[0]
    found = torch.autograd.grad(loss(case, outputs), list(wanted.values()), allow_unused=True)
    gradients = {n: g.detach() for n, g in zip(wanted, found, strict=True) if g is not None}
    return Run([o.detach() for o in leaves], gradients, dict(model.named_buffers()), held, returned)


def _ours(case: Case, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Run, nn.Module]:
    module = copy.deepcopy(model)
    call: Callable[..., Any]
    if case.way == "compress":
        call = actcompile.compress(module, dynamic=case.dynamic, **case.options)
    elif case.way == "backend":
        call = torch.compile(module, backend="actcompile", dynamic=case.dynamic, options=case.options)
    else:
        call = torch.compile(lambda *a: module(*a), backend="actcompile", dynamic=case.dynamic, options=case.options)
    return _after_another(case, module, inputs, call), module


def _plain(case: Case, model: nn.Module, inputs: tuple[Tensor, ...]) -> Run:
    torch._dynamo.reset()
    module, config = copy.deepcopy(model), actcompile.Config.make(**case.options)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_plain(gm, inputs, config)  # it drops what ours drops

    return _after_another(case, module, inputs, torch.compile(module, backend=backend, dynamic=case.dynamic))


def _after_another(case: Case, module: nn.Module, inputs: tuple[Tensor, ...], call: Callable[..., Any]) -> Run:
    if case.changing:
        buffers = {n: b.clone() for n, b in module.named_buffers()}
        run(case, module, batch(case, 1), call)
        for name, buffer in module.named_buffers():
            buffer.data.copy_(buffers[name])
    return run(case, module, inputs, call)


def _unless_plain_fails(case: Case, model: nn.Module, inputs: tuple[Tensor, ...], found: Outcome) -> Outcome:
    try:
        _plain(case, model, inputs)
    except Exception as error:
        return Outcome("skipped", f"plain torch.compile: {_words(error)}")
    return found


def _compare(case: Case, model: nn.Module, inputs: tuple[Tensor, ...], eager: Run, ours: Run) -> Outcome:
    off = _largest_error(case, model, inputs, eager)
    found = _difference(case, eager, ours, off)
    if found.kind == "right":
        return found
    # Another order of operations, or other random numbers: what does torch.compile itself give?
    try:
        plain = _plain(case, model, inputs)
    except Exception as error:
        return Outcome("skipped", f"plain torch.compile: {_words(error)}")
    return _difference(case, _with_zeros(plain, ours), _with_zeros(ours, plain), off)


def _with_zeros(run: Run, other: Run) -> Run:
    """A run with zeros for gradients that only another one has, in which they are zero.

    What is not used behind a graph break has a gradient of zero there, and none in eager; where graphs break differs.
    """
    zeros = {name: torch.zeros_like(g) for name, g in other.gradients.items() if not g.any()}
    return replace(run, gradients=zeros | run.gradients)


def _difference(case: Case, reference: Run, ours: Run, off: dict[str, float]) -> Outcome:
    finer = {"float64": FINER, "bfloat16": COARSER}.get(case.dtype, 1.0)
    for i, (a, b) in enumerate(zip(reference.outputs, ours.outputs, strict=True)):
        if _relative(a, b) > 1e-3 * finer + 30 * off.get(f"output {i}", 0.0):
            return Outcome("outputs", f"output {i} is off by {_relative(a, b):.2g}")
    for name, a in reference.buffers.items():
        if name not in ours.buffers or _relative(a, ours.buffers[name]) > (0.1 if case.dtype == "bfloat16" else 1e-3):
            return Outcome("buffers", name)
    if reference.gradients.keys() != ours.gradients.keys():
        return Outcome("which gradients", str(sorted(reference.gradients.keys() ^ ours.gradients.keys())))
    everything = sum(float(g.double().square().sum()) for g in reference.gradients.values()) ** 0.5
    for name, a in reference.gradients.items():
        b = ours.gradients[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            return Outcome("shapes", name)
        if a.isfinite().all() and not b.isfinite().all():
            return Outcome("not finite", name)
        if not case.rounds:
            error, allowed = _norm(a, b), finer * (1e-4 * float(a.double().norm()) + 1e-5 * everything)
            allowed += 30 * off.get(name, 0.0)
            if error > allowed:
                figures = f"{error:.2g}, of {float(a.norm()):.2g} ({allowed:.2g} are {case.dtype}'s)"
                return Outcome("gradients", f"{name} is off by {figures}")
    return Outcome("right")


def _largest_error(case: Case, model: nn.Module, inputs: tuple[Tensor, ...], eager: Run) -> dict[str, float]:
    """How far eager is from float64: for each gradient in its norm, for each output relative.

    Of float64 itself that is guessed from float32.
    """
    other, finer = (torch.float32, FINER) if case.dtype == "float64" else (torch.float64, 1.0)
    try:
        given = [t.to(other) if t.is_floating_point() else t for t in inputs]
        exact = run(case, copy.deepcopy(model).to(other), tuple(given))
    except Exception:
        return {}
    if case.random:
        return {}
    off = {n: _norm(eager.gradients[n], g) for n, g in exact.gradients.items() if n in eager.gradients}
    for i, (a, b) in enumerate(zip(exact.outputs, eager.outputs, strict=True)):
        off[f"output {i}"] = _relative(a, b)
    return {name: finer * error for name, error in off.items() if math.isfinite(error)}


def _is_compiled(node: torch.autograd.graph.Node) -> bool:
    return "CompiledFunction" in node.name()


def _norm(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())


def _relative(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    error = torch.where(a == b, 0.0, a.double() - b.double()).nan_to_num(0.0, float("inf"), float("inf"))
    return float(error.norm()) / (float(a.double().nan_to_num(0, 0, 0).norm()) + 1e-6)


def _bytes(case: Case, ours: Run, module: nn.Module) -> Outcome:
    report = actcompile.explain(module)
    said, slack = report.saved_bytes_after, 0.02 * ours.held + 2048
    returned = ours.returned if len(report.graphs) > 1 else 0  # a graph does not know what a later one returns
    if case.changing or ours.held - slack <= said <= ours.held + returned + slack:
        return Outcome("right")
    if case.way != "compress" and said < ours.held and len(report.graphs) > 1:
        return Outcome("right")  # graphs between breaks that use no parameter are not known to be the model's
    kind = "bytes" if len(report.graphs) == 1 else "bytes across breaks"
    return Outcome(kind, f"says {said}, holds {ours.held}, in {len(report.graphs)} graphs")


def _means(case: Case, model: nn.Module, inputs: tuple[Tensor, ...]) -> Outcome:
    """Claims against many roundings, twice where the first look says that one is wrong."""
    inputs = (inputs[0].detach().requires_grad_(case.input_gradient), *inputs[1:])
    task = Task(model, inputs, {}, lambda outputs: loss(case, outputs), case.dynamic)
    found = []
    for seeds in (20, CONFIRMING):
        torch._dynamo.reset()
        try:
            report = examine(task, actcompile.Config.make(**case.options), seeds, blame=False)
        except Exception as error:
            return _unless_plain_fails(case, model, inputs, Outcome("check", _words(error)))
        found = [outcome for gradient in report.gradients if (outcome := _wrong(case, gradient)).wrong]
        if not found:
            return Outcome("right")
    return found[0]


def _wrong(case: Case, gradient: Any) -> Outcome:
    """As `check` says it; a bias that is claimed may be large in gradients that do not matter, and with own options."""
    figures = f"{gradient.name}: bias {gradient.bias:.3f}, z {gradient.z:.1f}, claim {gradient.claim!r}"
    if "claims that it is not" in gradient.wrong:
        return Outcome("bias not claimed", figures)
    if "not finite" in gradient.wrong:
        return Outcome("not finite", figures)
    if "exact" in gradient.wrong:
        return Outcome("gradients", f"{gradient.name}: {gradient.arithmetic:.2g} without rounding")
    defaults = not {"bits", "nonlinear_bits", "levels", "block", "projection"} & case.options.keys()
    matters = gradient.bias * min(1.0, gradient.share / 0.05)
    if gradient.wrong and defaults and matters > TOLERATED:
        return Outcome("bias too large", figures)
    return Outcome("right")


def _words(error: BaseException) -> str:
    inner = getattr(error, "inner_exception", None) or error
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[0][:200] if lines else ''}"


def shrink(case: Case, kind: str, means: bool, tries: int = 30) -> Case:
    """The smallest case found, by leaving out blocks and options, that is wrong in the same way."""
    smaller = True
    while smaller and tries > 0:
        smaller = False
        for less in case.smaller():
            tries -= 1
            if judge(less, means).kind == kind:
                case, smaller = less, True
                break
            if tries <= 0:
                break
    return case
