"""What a user can set: `Config`, and presets by name."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from actcompile.kernels.blocks.format import BITS, LEVELS, Levels
from actcompile.passes.plan.policy import Policy

from .report.data import Settings
from .report.saved_plan import SavedPlan
from .rules import METHODS, Rule, rule_of, with_rule

Inner = Literal["inductor", "aot_eager"]
METADATA = {"float32": torch.float32, "bfloat16": torch.bfloat16}


SETTINGS = (  # what decides which activations there are and may be rounded: part of a saved plan
    *("bits", "nonlinear_bits", "block", "levels", "metadata", "min_bytes", "rules", "when", "rows_per_block"),
    *("projection", "method", "rebuild", "replay", "fast_dropout", "standardise", "fuse"),
)
CHOOSING = ("fitted", "budget", "max_gradient_error", "max_slowdown", "measured")  # what a saved plan stands for
COARSE, FINE = 2, 4  # bits of "auto"


@dataclass(frozen=True)
class Config:
    """How activations are kept.

    Args:
        bits: bits per element of floats whose rounding leaves every gradient unbiased: 1, 2, 4, 8, or None (exact).
            "auto" is 4 where what is saved takes no more for it than an eighth of a step's predicted peak, and
            gradients have a fifth of the noise; else 2. Within bounds (`budget` and others) these choose.
        nonlinear_bits: the same for floats whose rounding biases some gradient; "auto" gives `bits` where the bias is
            the rounding's variance over 1024 elements or more (BatchNorm's input), 4 where over 8 or more, else 8.
        block: elements that share a minimum and a maximum; fitted to each tensor's width.
        rows_per_block: instead of `block`: rows that share them (i-EXACT's G/R), as many as fit 1024 elements.
        projection: floats used linearly are first projected at random to one in `projection` columns (EXACT's D/R).
        method: another codec for floats used linearly: `prune(8)`, `low_rank(8)`, `sample_rows(8)`; or for all floats:
            `cast("float8_e4m3fn")`. `bits` still holds for what a method does not fit.
        rebuild: what backward can do without is not saved: the result of BatchNorm, ReLU and dropout, which it computes
            from the norm's input; a layer's aggregate, where it can aggregate the gradient instead.
        replay: what a first layer makes of the model's inputs is not saved but computed again in backward, exactly, as
            long as that takes at most this share of the forward's work: one layer of three fits 0.4; 0 for never.
            "auto" is 0.4 where the predicted peak of a step is no higher for it, else 0.
        fast_dropout: on the CPU, what dropout drops is hashed from a seed, much faster than drawn numbers, and made
            anew in backward; False leaves torch's own random numbers.
        standardise: what a BatchNorm reads, or a linear layer returns, is rounded after each column was brought to mean
            0 and deviation 1, so that no column has more noise for its width than another.
        fitted: levels fitted to single activations, as `calibrate` returns them.
        levels: "uniform", "variance-minimising" for normal values, "half-normal" for those that ReLU has passed, or
            "auto", which takes the latter for what is never negative.
        metadata: dtype of a block's minimum and maximum, "float32" or "bfloat16".
        min_bytes: smaller tensors are kept.
        rules: from a pattern of module paths, such as "convs.0.*", to `keep()`, `lossless()` or `bits(8)`. A pattern
            also matches what is inside the module it names; the first match wins; "*" matches everything, also what the
            model computes outside its submodules.
        when: floats are rounded where the compiled module is in "training" mode, as `model.training` has it, and stay
            exact in eval mode, for forces or saliency maps; "always" rounds them in eval mode, too, to train there.
        budget: the peak of a training step, over what is alive before it, in bytes or as "2GiB" or "500MB"; or, from 0
            to 1, as a share of the peak that `torch.compile` alone would have. Of all ways to keep the floats that are
            rounded, those of least noise are taken that fit; for each graph, where a model has several.
        max_gradient_error: relative error at most that rounding adds to the gradients of a step; with a budget, the
            fastest plan is taken, else the smallest. `measure` tells noise from a run; else it is roughly guessed.
        max_slowdown: at most so many times the seconds of a step that encodes nothing, such as 1.05.
        measured: noise by activation and format, as `measure` returns it.
        plan: a plan that was made before, as `explain(...).plan()` returns it, or the file that it was saved in: every
            float that may be rounded is kept in exactly the way that the plan has for it, without looking for a better
            one. The plan also has the settings that it was made with, from `bits` to `fuse` and `rules`, and they hold:
            giving other ones beside it is an error, and so are bounds. Only `inner` is free. A model whose activations
            are not those of the plan is an error when it is compiled, never compressed by the rules instead.
        fuse: message passing runs as ops that hold no tensor of [edges, features]; on CUDA all but sums of rows in
            float32 and float64, for which Inductor holds none either.
        inner: the compiler of the rewritten graphs: "inductor", or "aot_eager", which runs them as they are.

    Raises:
        ValueError, TypeError: a field is wrong; the message names it.
    """

    bits: int | Literal["auto"] | None = "auto"
    nonlinear_bits: int | Literal["auto"] | None = "auto"
    block: int = 64
    levels: Levels | Literal["auto"] = "auto"
    metadata: Literal["float32", "bfloat16"] = "bfloat16"
    min_bytes: int = 16384
    rules: Mapping[str, Rule] | tuple[tuple[str, Rule], ...] = field(default=())
    inner: Inner = "inductor"
    when: Literal["training", "always"] = "training"
    rows_per_block: int | None = None
    projection: int | None = None
    method: Rule | None = None
    rebuild: bool = True
    replay: float | Literal["auto"] = "auto"
    fast_dropout: bool = True
    standardise: bool = True
    fuse: bool = True
    fitted: tuple[tuple[str, str], ...] = ()
    budget: str | int | float | None = None
    max_gradient_error: float | None = None
    max_slowdown: float | None = None
    measured: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = ()
    plan: SavedPlan | str | Path | None = None

    def __post_init__(self) -> None:
        if self.plan is not None:
            self._pin()
        _one_of("bits", self.bits, (*BITS, "auto", None))
        _one_of("nonlinear_bits", self.nonlinear_bits, (*BITS, "auto", None))
        _one_of("levels", self.levels, ("auto", *LEVELS))
        _one_of("metadata", self.metadata, tuple(METADATA))
        _one_of("inner", self.inner, ("inductor", "aot_eager"))
        _one_of("when", self.when, ("training", "always"))
        for name in ("rebuild", "fast_dropout", "standardise", "fuse"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.replay != "auto" and (type(self.replay) not in (int, float) or not 0 <= self.replay <= 1):
            raise ValueError(f'replay must be a number from 0 to 1 or "auto", got {self.replay!r}')
        for name, least in (("block", 8), ("min_bytes", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name, least in (("rows_per_block", 1), ("projection", 2)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} must be None or an integer of at least {least}, got {value!r}")
        parse_budget(self.budget)
        for name, least in (("max_gradient_error", 0), ("max_slowdown", 1)):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= least
            ):
                raise ValueError(f"{name} must be None or a number of at least {least}, got {value!r}")
        if self.method is not None and (not isinstance(self.method, Rule) or self.method.name not in METHODS):
            raise TypeError(
                f"method must be None, prune(n), low_rank(n), sample_rows(n) or cast(dtype), got {self.method!r}"
            )
        pairs = tuple(self.rules.items()) if isinstance(self.rules, Mapping) else self.rules
        if not isinstance(pairs, (tuple, type({}.items()))) or not all(
            isinstance(p, tuple) and len(p) == 2 for p in pairs
        ):
            raise TypeError(f'rules must map module patterns to rules, like {{"head": bits(8)}}, got {self.rules!r}')
        for pattern, rule in pairs:
            if not isinstance(pattern, str) or not isinstance(rule, Rule):
                raise TypeError(f"rules[{pattern!r}] must be keep(), lossless(), bits(n) or a method, got {rule!r}")
        object.__setattr__(self, "rules", pairs)  # hashable, and with a stable order

    @classmethod
    def make(cls, config: "Config | None" = None, preset: str | None = None, **options: Any) -> "Config":
        """A config from another one, or from a preset by name, and single fields.

        Raises:
            TypeError: an unknown field, or both a config and a preset.
            ValueError: an unknown preset, or a wrong value; the message lists what is known.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"unknown option {name!r}; known are {', '.join([*known, 'preset'])}")
        if preset is not None:
            if config is not None:
                raise TypeError("pass config or preset, not both; config=Config.make(preset=...) changes a preset")
            if preset not in PRESETS:
                raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
            config = PRESETS[preset]()
        made = replace(config or cls(), **options)
        for name in SETTINGS if made.plan is not None else ():
            if name in options and _plain(options[name]) != _plain(getattr(made, name)):  # to a default, even so
                raise _decided(name, options[name], getattr(made, name))
        return made

    def _pin(self) -> None:
        """Takes over the settings of a saved plan.

        Raises:
            TypeError, ValueError: it is none, or a field that the plan decides was given another value.
        """
        if not isinstance(self.plan, (SavedPlan, str, Path)):
            raise TypeError(f"plan must be None, a SavedPlan or the path of one, got {self.plan!r}")
        plan = self.plan if isinstance(self.plan, SavedPlan) else SavedPlan.load(self.plan)
        default = {f.name: f.default for f in fields(self)}
        for name in CHOOSING:
            if getattr(self, name) != default[name]:
                raise ValueError(
                    f"{name}: a plan decides instead; leave {name} out, or leave plan out to make a new one"
                )
        for name, value in plan.settings:
            if name not in SETTINGS:
                raise ValueError(f"plan: this actcompile knows no setting {name!r}; known are {', '.join(SETTINGS)}")
            given = _plain(getattr(self, name))
            if given != value and given != default[name]:
                raise _decided(name, given, value)
            object.__setattr__(self, name, _unplain(name, value))
        object.__setattr__(self, "plan", plan)

    @property
    def pinned(self) -> SavedPlan | None:
        """The saved plan that decides, if there is one."""
        assert self.plan is None or isinstance(self.plan, SavedPlan)
        return self.plan

    @property
    def settings(self) -> Settings:
        """The fields that a saved plan has, as plain data."""
        return tuple((name, _plain(getattr(self, name))) for name in SETTINGS)

    @property
    def bounded(self) -> bool:
        """Whether a plan has to meet bounds."""
        return any(b is not None for b in (self.budget, self.max_gradient_error, self.max_slowdown))

    def policy(self, training: bool = True, bits: int = COARSE) -> Policy:
        """The planner's view of this config, for a graph of a module that is in training mode or not.

        bits: those of "auto".
        """
        base = Policy(
            bits=bits if self.bits == "auto" else self.bits,
            nonlinear_bits=self.nonlinear_bits,
            block=self.block,
            levels=self.levels,
            metadata=METADATA[self.metadata],
            min_bytes=self.min_bytes,
            rows_per_block=self.rows_per_block,
            projection=self.projection,
            standardise=self.standardise,
            fitted=self.fitted,
        )
        if self.method is not None:
            base = with_rule(base, self.method)
        rules = tuple((pattern, with_rule(base, rule)) for pattern, rule in dict(self.rules).items())
        if not training and self.when == "training":
            base, *others = (_exact(policy) for policy in (base, *(policy for _, policy in rules)))
            rules = tuple((pattern, policy) for (pattern, _), policy in zip(rules, others, strict=True))
        return replace(base, rules=rules)


def _exact(policy: Policy) -> Policy:
    reason = 'the model is in eval mode: gradients are exact (when="always" rounds here, too)'
    return replace(policy, bits=None, nonlinear_bits=None, method=None, exact=reason)


def exact() -> Config:
    """EXACT (Liu et al., ICLR 2022): a random projection to one in eight columns, one block to a row, 2 bits.

    BatchNorm's input is not projected; masks take one bit; metadata are bfloat16. Nothing is rebuilt, replayed, drawn
    again or standardised.
    """
    return Config(
        bits=2,
        nonlinear_bits=2,
        block=256,
        levels="uniform",
        metadata="bfloat16",
        rows_per_block=1,
        projection=8,
        rebuild=False,
        replay=0,
        fast_dropout=False,
        standardise=False,
    )


def iexact(group: int = 8, levels: Levels = "uniform") -> Config:
    """i-EXACT (Eliassen & Selvan, arXiv 2309.11856): EXACT with `group` projected rows to a block (its G/R).

    Args:
        group: rows to a block, of at most 1024 elements; the paper has 2 to 64.
        levels: "variance-minimising" for the paper's second method.
    """
    return replace(exact(), rows_per_block=group, levels=levels)


def smallest() -> Config:
    """A third of i-EXACT's smallest bytes for its network: BatchNorm's input has 1 bit, all else is projected as in
    EXACT.

    A step's gradients are noisy, if less so than those of EXACT or i-EXACT.
    """
    return Config(bits=2, nonlinear_bits=1, rows_per_block=2, projection=8, replay=0.4)


GROUPS = (2, 4, 8, 16, 32, 64)
PRESETS: dict[str, Callable[[], Config]] = {
    "default": Config,
    "smallest": smallest,
    "exact": exact,
    **{f"iexact-{g}": functools.partial(iexact, g) for g in GROUPS},
    **{f"iexact-{g}-vm": functools.partial(iexact, g, "variance-minimising") for g in GROUPS},
}


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_budget(budget: str | int | float | None) -> tuple[int | None, float | None]:
    """A budget in bytes, or as a share of what `torch.compile` alone would need; one of the two, or neither.

    Raises:
        ValueError: it is none of the forms that `Config.budget` has.
    """
    message = f'budget must be None, bytes such as 2 * 2**30 or "2GiB", or a share from 0 to 1, got {budget!r}'
    if budget is None:
        return None, None
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget)
        if match is None or match[2].upper() not in UNITS or not float(match[1]):
            raise ValueError(message)
        return int(float(match[1]) * UNITS[match[2].upper()]), None
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise ValueError(message)
    if isinstance(budget, float) and budget <= 1:
        return None, budget
    return int(budget), None


def _decided(name: str, asked: object, value: object) -> ValueError:
    return ValueError(
        f"{name}: {asked!r} was asked for, but the plan was made with {value!r} and decides; leave {name} out, or "
        "leave plan out to make a new one"
    )


def _plain(value: Any) -> Any:
    """A field's value as JSON has it, with tuples for lists."""
    if isinstance(value, Rule):
        return value.name, value.value
    if isinstance(value, Mapping):
        value = value.items()
    return tuple(map(_plain, value)) if isinstance(value, (tuple, type({}.items()))) else value


def _unplain(name: str, value: Any) -> Any:
    """The inverse, of the field `name`."""
    if name == "method" and value is not None:
        return rule_of(value)
    if name != "rules":
        return value
    if not isinstance(value, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        raise ValueError(f"plan: rules must be pairs of a pattern and a rule, got {value!r}")
    return tuple((pattern, rule_of(rule)) for pattern, rule in value)


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or isinstance(value, bool):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
