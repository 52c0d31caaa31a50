"""A check as text: a line per gradient, a verdict, who is to blame, and what to paste."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..report.text import clean, human, simple_box, to_text
from .data import CheckData, GradientCheck, Remedy, Suspect


def render(report: CheckData) -> str:
    """The check as plain text without colour codes, as wide as the terminal."""
    return to_text(renderable(report))


def renderable(report: CheckData) -> Group:
    """The check as a rich renderable."""
    parts: list[RenderableType] = [Text(heading(report), style="bold"), Text(f"loss: {clean(report.loss)}")]
    parts += [_table(report), Text(verdict(report), style="bold green" if report.ok else "bold red")]
    parts += [Text(suspect(s)) for s in report.suspects]
    if report.remedy is not None:
        parts.append(Text(remedy(report.remedy, report.bytes_after)))
    parts += [Text(f"note: {clean(note)}") for note in report.notes]
    return Group(*parts)


def heading(report: CheckData) -> str:
    saved = f"{human(report.bytes_before)} -> {human(report.bytes_after)}"
    return (
        f"{report.seeds} roundings of {report.rounded} activations by {report.inner}, all else equal (dropout too); "
        f"saved for backward: {saved}"
    )


def _table(report: CheckData) -> Table:
    table = Table(box=simple_box(), padding=(0, 0, 0, 0))
    table.add_column("gradient of", overflow="fold")
    table.add_column("share\nof all", justify="right", no_wrap=True)
    table.add_column("without\nrounding", justify="right", no_wrap=True)
    table.add_column("error of\none step", justify="right", no_wrap=True)
    table.add_column(f"of the mean\nof {report.seeds}", justify="right", no_wrap=True)
    table.add_column("bias", justify="right", no_wrap=True)
    table.add_column("z", justify="right", no_wrap=True)
    table.add_column("the plan claims", overflow="fold")
    for gradient in report.gradients:
        colour = "red" if gradient.wrong else "yellow" if gradient.visible else ""
        table.add_row(
            Text(clean(gradient.name), style=colour),
            *(Text(percent(x)) for x in (gradient.share, gradient.arithmetic, gradient.one_step, gradient.mean)),
            Text(bias(gradient), style=colour),
            Text(f"{gradient.z:.1f}", style=colour),
            Text(clean(gradient.claim)),
        )
    return table


def percent(value: float) -> str:
    """Two digits: `0`, `3e-07`, `0.042 %`, `2.7 %`, `31 %`."""
    if value < 1e-5:
        return f"{value:.0e}" if value else "0"
    value *= 100
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.2g} %"


def bias(gradient: GradientCheck) -> str:
    return percent(gradient.bias) if gradient.visible else "not visible"


def verdict(report: CheckData) -> str:
    rate = f"limit {report.limit:.1f}: one check in {1 / report.alarm:,.0f} finds by chance what is not there"
    wrong = [g for g in report.gradients if g.wrong]
    if not report.gradients:
        return "there is no gradient to check"
    if wrong:
        kinds = {g.wrong: [h.name for h in wrong if h.wrong == g.wrong] for g in wrong}
        lines = [f"WRONG: {clean(', '.join(names))}: {kind}" for kind, names in kinds.items()]
        return "\n".join([*lines, f"({rate})"])
    largest = max(g.z for g in report.gradients)
    seen = [g for g in report.gradients if g.visible]
    if seen:
        most = percent(max(g.bias for g in seen))
        return f"fine: a bias is visible where the plan claims one, of at most {most} of a gradient ({rate})"
    return f"fine: no bias is visible (largest z {largest:.1f}, {rate})"


def suspect(s: Suspect) -> str:
    place = f"{clean(s.module) or '(model)'} {clean(s.name)}" + (f" ({clean(s.source)})" if s.source else "")
    alone = "rounded alone" if s.together == 1 else f"rounded with {s.together - 1} others"
    return (
        f"to blame: {place}, {clean(s.codec)}, {clean(s.claim)}\n"
        f"          {alone}, it biases {clean(s.gradient)} by {percent(s.bias)} (z {s.z:.1f})"
    )


def remedy(r: Remedy, bytes_before: int) -> str:
    left = f"{percent(r.bias)} of bias are left" if r.bias else "no bias is visible any more"
    left = f"tried: {left}{'' if r.mended else ', still too much'}"
    return f"to mend it: {r}\n            {left}; saved {human(bytes_before)} -> {human(r.bytes_after)}"
