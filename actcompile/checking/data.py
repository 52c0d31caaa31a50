"""What `check` returns: numbers for every gradient, who is to blame for a bias, and the rule that mends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..report.data import Row


def claim(rows: Sequence[Row]) -> tuple[str, bool]:
    """What the plan claims of a gradient that these rounded activations reach, and whether that is a bias."""
    biased = [row for row in rows if row.biased]
    if not rows:
        return "exact", False
    if not biased:
        return "unbiased", False
    worst = min(biased, key=lambda row: row.averaged_over)
    if not worst.averaged_over:
        return "biased: the codec itself is", True
    how = "element by element" if worst.averaged_over == 1 else f"by variance / {worst.averaged_over:,}"
    return f"biased {how}, {'.'.join(worst.through.split('.')[:2])}", True


@dataclass(frozen=True)
class GradientCheck:
    """One parameter's gradient, or an input's. Errors are relative to the gradient's norm; to a thousandth of all
    gradients' norm where it is smaller than that.

    Attributes:
        size, share: its norm, and that over the norm of all gradients together.
        arithmetic: what our exact passes change, without any rounding: the order of float operations.
        one_step: error of one step, root mean square over the seeds.
        mean: error of the mean of all steps.
        bias: what of that is no noise, estimated; 0 where noise explains it.
        z, visible: how improbable the errors are without a bias, as normal standard deviations; beyond the limit?
        claim: what the plan says.
        wrong: what is wrong with it, in words; empty where nothing is.
    """

    name: str
    shape: tuple[int, ...]
    size: float
    share: float
    arithmetic: float
    one_step: float
    mean: float
    bias: float
    z: float
    visible: bool
    claim: str
    wrong: str


@dataclass(frozen=True)
class Suspect:
    """A rounded activation that biases a gradient when it alone is rounded.

    Attributes:
        module, name, source, codec, claim: where it is made, how it is kept, and what the plan says of it.
        gradient, bias, z: the gradient that shows it most clearly, its bias then, and how visible that is.
        together: number of activations that were rounded for this, where none of them biases visibly alone; else 1.
    """

    module: str
    name: str
    source: str
    codec: str
    claim: str
    gradient: str
    bias: float
    z: float
    together: int


@dataclass(frozen=True)
class Remedy:
    """Rules that were tried.

    Attributes:
        rules: all rules of the config with the new ones, from module pattern to rule, as Python text.
        bias: the largest visible bias that is left, among the gradients that were wrong.
        mended: whether nothing is wrong with any of them.
        bytes_after: what is saved with these rules.
    """

    rules: dict[str, str]
    bias: float
    mended: bool
    bytes_after: int

    def __str__(self) -> str:
        return "rules={" + ", ".join(f'"{pattern}": {rule}' for pattern, rule in self.rules.items()) + "}"


@dataclass(frozen=True)
class CheckData:
    """What was found.

    Attributes:
        gradients: a line for every gradient.
        suspects, remedy: for those that are wrong: which activations are to blame, and rules to paste.
        seeds: number of roundings.
        limit, alarm: |z| beyond which a bias is called visible, and the probability that a check of a model without any
            bias calls one visible.
        rounded, graphs: number of rounded activations, and of compiled graphs.
        bytes_before, bytes_after: saved for backward, by torch and now.
        inner: the inner compiler that ran.
        loss: what was differentiated.
    """

    gradients: tuple[GradientCheck, ...]
    suspects: tuple[Suspect, ...]
    remedy: Remedy | None
    seeds: int
    limit: float
    alarm: float
    rounded: int
    graphs: int
    bytes_before: int
    bytes_after: int
    inner: str
    loss: str
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no gradient is wrong: biased though the plan claims that it is not, or by more than 2 %, not finite,
        or changed by passes that are exact."""
        return not any(gradient.wrong for gradient in self.gradients)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}
