"""`check`: what rounding does to the gradients of a user's own model, on their own batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from actcompile.passes.graph import _torch

from ..api import _check_rules, _configs
from ..config import Config
from ..rules import Rule, bits, lossless
from .bias_test import Errors, score
from .data import GradientCheck, Remedy, Suspect, claim
from .draws import Graphs, Task, Variant, undisturbed
from .report import CheckReport

ALARM = 1e-3  # probability that a check of a model without any bias calls one visible, in one of all its gradients
TOLERATED = 0.02  # of a gradient: as much bias as the defaults may have where the plan says that there is one
FEWEST = 8
ROUNDS = 3  # of looking for activations to blame
ARITHMETIC = 0.01  # of a gradient: what our exact passes may change, in the order of float32 operations
FLOAT32 = 1e-6  # of all gradients together: errors of float32 sums, some ten units in the last place
LARGE = 1e-3  # of all gradients together: a smaller gradient's errors are relative to this


def check(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    config: Config | None = None,
    seeds: int = 20,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
    **keywords: Any,
) -> CheckReport:
    """Tells what compression does to the gradients of this model on this batch: noise and bias of every one.

        print(actcompile.check(model, x, edge_index, loss=lambda out: F.cross_entropy(out, y)))

    A copy of the model takes `seeds` steps that differ in the random bits of rounding only: the weights, the batch and
    dropout are the same. Their gradients are compared with those of the same graphs without rounding. Where the mean of
    the steps is off by more than chance explains, and by more than the plan claims, single activations are rounded
    alone to find the ones to blame, and a rule for them is tried. The model, its buffers, gradients, compiled code and
    the state of random generators stay as they are.

    Args:
        model: a module, compressed or not, in the mode that it is trained in; after some training rather than before.
        inputs, keywords: a batch, what the model is called with; gradients of inputs that require them are checked too.
        loss: from the model's outputs to the number that is differentiated; by default a fixed random projection of
            the outputs, or the output itself where that is one number.
        config: what is checked; by default that of `compress`, or the defaults.
        seeds: number of roundings, at least 8. With 20, a bias of a fifth of one step's error is visible in a gradient
            of 500 elements, half of that in one of 10,000.
        dynamic: as in `torch.compile`.
        options: fields of `Config` to change. Steps are run op by op (`inner="aot_eager"`), which rounds the same
            activations as Inductor with few exceptions, and compiles in seconds; `options={"inner": "inductor"}` checks
            what Inductor compiles.

    Raises:
        TypeError, ValueError: the model is no module or cannot be copied, an argument is wrong, the batch has no data,
            nothing requires a gradient, or two equal steps differ; the message names the argument and the remedy.
    """
    task = _task(model, inputs, keywords, loss, dynamic)
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < FEWEST:
        raise ValueError(f"seeds must be an integer of at least {FEWEST}, got {seeds!r}")
    known = config or _configs.get(task.model)
    made = Config.make(known, **{"inner": "aot_eager", **(options or {})})
    _check_rules(task.model, made)
    return examine(task, made, seeds)


def examine(task: Task, config: Config, seeds: int, blame: bool = True) -> CheckReport:
    """`check` of a task with a config; without `blame` no activation is rounded alone, and no remedy is tried."""
    with undisturbed(task):
        return _Check(task, config, seeds).run(blame)


def _task(model: Any, inputs: tuple[Any, ...], keywords: Mapping[str, Any], loss: Any, dynamic: bool | None) -> Task:
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: wrap the function in one")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of the model's outputs, got {type(loss).__name__}")
    if not inputs and not keywords:
        raise ValueError("check(model) needs a batch, since it runs the model: check(model, *inputs)")
    tensors = [t for t in _torch.pytree.tree_leaves((inputs, dict(keywords))) if isinstance(t, Tensor)]
    if any(t.is_meta or isinstance(t, _torch.FakeTensor) for t in tensors + list(model.parameters())):
        raise ValueError("check runs the model: its inputs and parameters must hold data, and not be meta tensors")
    return Task(model, inputs, keywords, loss, dynamic)


class _Check:
    """One check. `plain` and `exact` are gradients without our passes, and with them but without rounding."""

    def __init__(self, task: Task, config: Config, seeds: int) -> None:
        self.task, self.config, self.seeds = task, config, seeds
        with Variant(task, config, plain=True) as variant:
            outputs, self.plain = variant.step()
            _require_repeatable(outputs, variant.step()[0])
        with Variant(task, config, only=frozenset()) as variant:
            self.outputs, self.exact = variant.step()
            self.arithmetic = {n: float((g - self.exact[n]).double().norm()) for n, g in self.plain.items()}
            self.same_dropout = _alike(outputs, self.outputs)

    def run(self, blame: bool) -> CheckReport:
        errors, graphs = self.draws(self.config)
        checks = self.judge(errors, graphs)
        wrong = [c.name for c in checks if c.wrong]
        suspects, remedy = self.blame(wrong, graphs) if wrong and blame else ((), None)
        return CheckReport(
            gradients=tuple(checks),
            suspects=tuple(suspects),
            remedy=remedy,
            seeds=self.seeds,
            limit=self.limit,
            alarm=ALARM,
            rounded=len(graphs.rounded()),
            graphs=len(graphs.reports),
            bytes_before=sum(r.bytes_before for r in graphs.reports),
            bytes_after=sum(r.bytes_after for r in graphs.reports),
            inner=self.config.inner,
            loss="as given" if self.task.loss is not None else _default_loss(self.outputs),
            notes=tuple(self.notes(graphs)),
        )

    @property
    def limit(self) -> float:
        """The z that is called visible: `ALARM` divided among the gradients (Bonferroni)."""
        return score(ALARM / max(len(self.exact), 1))

    def draws(
        self, config: Config, only: frozenset[str] | None = None, names: Iterable[str] | None = None
    ) -> tuple[dict[str, Errors], Graphs]:
        """The errors of the gradients `names`, all by default, over all seeds."""
        choosing = max(3, round(0.4 * self.seeds))
        errors = {n: Errors(self.exact[n], choosing, self.resolution(n)) for n in names or self.exact}
        with Variant(self.task, config, only) as variant:
            for seed in range(self.seeds):
                outputs, found = variant.step(1000 * self.seeds + seed)  # a check of other length has others
                if not _alike(outputs, self.outputs):
                    raise ValueError("the model's outputs are not those of the same step without rounding; " + REPEAT)
                for name, error in errors.items():
                    error.add(found[name])
            return errors, variant.graphs

    @property
    def everything(self) -> float:
        """The norm of all gradients together."""
        return sum(float(g.double().square().sum()) for g in self.exact.values()) ** 0.5

    def resolution(self, name: str) -> float:
        """What float32 may add: a gradient that is small since large numbers cancel has their rounding errors."""
        return self.arithmetic.get(name, 0.0) + FLOAT32 * self.everything

    def judge(self, errors: Mapping[str, Errors], graphs: Graphs) -> list[GradientCheck]:
        rounded = graphs.rounded()
        everything = self.everything
        checks = []
        for name, e in errors.items():
            size = float(self.exact[name].double().norm())
            unit = max(size, LARGE * everything, 1e-300)
            words, biased = claim([row for row, reached in rounded if reached is None or name in reached])
            visible = e.z > self.limit
            checks.append(
                GradientCheck(
                    name=name,
                    shape=tuple(self.exact[name].shape),
                    size=size,
                    share=size / (everything or 1.0),
                    arithmetic=self.arithmetic.get(name, 0.0) / unit,
                    one_step=e.of_one_step / unit,
                    mean=e.of_the_mean / unit,
                    bias=e.bias / unit,
                    z=e.z,
                    visible=visible,
                    claim=words,
                    wrong=self.what_is_wrong(name, e, visible, biased, unit),
                )
            )
        return checks

    def what_is_wrong(self, name: str, e: Errors, visible: bool, claimed: bool, unit: float) -> str:
        if not e.finite:
            return "not finite, though exact it is" if bool(self.exact[name].isfinite().all()) else ""
        if self.same_dropout and self.arithmetic.get(name, 0.0) > ARITHMETIC * unit:
            return "changed by passes that are exact"
        if visible and not claimed:
            return "biased, and the plan claims that it is not"
        if visible and e.bias > TOLERATED * unit:
            return f"biased by more than {TOLERATED:.0%}"
        return ""

    def blame(self, wrong: list[str], graphs: Graphs) -> tuple[list[Suspect], Remedy | None]:
        """The activations that bias the gradients `wrong` when they alone are rounded, and the rules that mend it.

        The gentlest rules are tried first. Where exact modules are not enough, another activation had been hidden
        behind the noise of the first ones, and the search goes on with these rules.
        """
        suspects: list[Suspect] = []
        rules: dict[str, Rule] = {}
        config, remedy = self.config, None
        for _ in range(ROUNDS):
            found = self.suspects(config, wrong, graphs)
            suspects += found
            for rule in (bits(8), lossless()) if found else ():
                rules |= {suspect.module: rule for suspect in found}
                config = replace(self.config, plan=None, rules=tuple((rules | self.other_rules(rules)).items()))
                errors, graphs = self.draws(config, names=wrong)
                left = self.judge(errors, graphs)
                remedy = Remedy(
                    rules={pattern: str(rule) for pattern, rule in dict(config.rules).items()},
                    bias=max((c.bias for c in left if c.visible), default=0.0),
                    mended=not any(c.wrong for c in left),
                    bytes_after=sum(r.bytes_after for r in graphs.reports),
                )
                if remedy.mended:
                    return suspects, remedy
        return suspects, remedy

    def other_rules(self, new: Mapping[str, Rule]) -> dict[str, Rule]:
        return {pattern: rule for pattern, rule in dict(self.config.rules).items() if pattern not in new}

    def suspects(self, config: Config, wrong: list[str], graphs: Graphs) -> list[Suspect]:
        reaching = [row for row, reached in graphs.rounded() if reached is None or not reached.isdisjoint(wrong)]
        suspects = []
        for keys in self.guilty(config, [row.key for row in reaching], wrong):
            alone = self.draws(config, frozenset(keys), wrong)[0]
            worst = max(wrong, key=lambda n: alone[n].z)
            unit = max(float(self.exact[worst].double().norm()), 1e-300)
            for row in (row for row in reaching if row.key in keys):
                suspects.append(
                    Suspect(
                        module=row.module,
                        name=row.name,
                        source=row.source,
                        codec=row.codec,
                        claim=claim([row])[0],
                        gradient=worst,
                        bias=alone[worst].bias / unit,
                        z=alone[worst].z,
                        together=len(keys),
                    )
                )
        return suspects

    def guilty(self, config: Config, keys: list[str], wrong: list[str]) -> list[list[str]]:
        """Groups of `keys`, of one where possible, each of which biases when it alone is rounded; found by halving."""
        if not keys or not self.biased(config, keys, wrong):
            return []
        if len(set(keys)) == 1:
            return [keys]
        half = len(keys) // 2
        return [*self.guilty(config, keys[:half], wrong), *self.guilty(config, keys[half:], wrong)] or [keys]

    def biased(self, config: Config, keys: list[str], wrong: list[str]) -> bool:
        errors = self.draws(config, frozenset(keys), wrong)[0]
        return any(e.z > self.limit for e in errors.values())

    def notes(self, graphs: Graphs) -> Iterable[str]:
        if not graphs.reports:
            yield "no graph was compiled with a backward pass: explain(model, *inputs) tells why"
        elif not graphs.rounded() and self.task.model.training:
            yield (
                "nothing is rounded: every gradient is exact. Where tensors are small, "
                'options={"min_bytes": 0} checks what larger ones would do'
            )
        if not self.task.model.training and self.config.when == "training":
            yield "the model is in eval mode, where gradients are exact; after model.train() this checks training"
        if not self.same_dropout:
            yield "the inner compiler draws other random numbers with our passes: no arithmetic error can be told"


REPEAT = (
    "steps can be compared only where all randomness of the model comes from torch's, numpy's or Python's default "
    "generators, and nothing that it keeps besides buffers changes them"
)


def _require_repeatable(first: list[Tensor], second: list[Tensor]) -> None:
    if not _alike(first, second):
        raise ValueError("two steps of the model with the same seed give different outputs; " + REPEAT)


def _alike(a: list[Tensor], b: list[Tensor]) -> bool:
    """Up to the order in which threads add."""
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x, y, rtol=1e-3, atol=1e-4 * _largest(x), equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def _largest(x: Tensor) -> float:
    x = x[x.isfinite()] if x.is_floating_point() else x.new_zeros(0)
    return float(x.abs().max()) if x.numel() else 0.0


def _default_loss(outputs: list[Tensor]) -> str:
    if len(outputs) == 1 and outputs[0].numel() == 1:
        return "the output itself"
    return "a fixed random projection of the outputs (pass loss=... for your own)"
