"""Drawings of results, as SVG beside the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "actcompile"  # the same numbers give the same file

from matplotlib import pyplot, ticker  # noqa: E402  the backend must be chosen first

OURS, BASELINE = "#1f6feb", "#8c959f"


def bars(path: Path, title: str, panels: Mapping[str, Mapping[str, float | None]], ours: Sequence[str]) -> None:
    """One panel of horizontal bars for each quantity: {quantity: {variant: value}}; None is left blank."""
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), sharey=True, squeeze=False)
    for axis, (quantity, values) in zip(axes[0], panels.items(), strict=True):
        names = list(values)[::-1]
        heights = [values[n] or 0.0 for n in names]
        drawn = axis.barh(names, heights, color=[OURS if n in ours else BASELINE for n in names])
        axis.bar_label(drawn, [f"{values[n]:,.4g}" if values[n] is not None else "" for n in names], padding=2)
        axis.set_title(quantity, fontsize=10)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, path, title)


Series = Mapping[str, Sequence[tuple[float, float]]]


def lines(path: Path, title: str, x_label: str, y_label: str, series: Series) -> None:
    """One line for each series of (x, y); x is drawn on a scale of powers of two."""
    figure, axis = pyplot.subplots(figsize=(6, 4))
    for name, points in series.items():
        axis.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=name)
    axis.set_xscale("log", base=2)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.set_ylim(bottom=0)
    axis.legend()
    save(figure, path, title)


Growth = Mapping[str, Sequence[tuple[float, float, bool]]]
"""By who made it: (x, y, whether it was measured)."""


def growth(path: Path, title: str, x_label: str, y_label: str, series: Growth) -> None:
    """One line for each series, on logarithmic scales: hollow and dashed where it was not measured."""
    figure, axis = pyplot.subplots(figsize=(6, 4))
    sides = (7, -13) * len(series)  # numbers above the first line, below the second
    for (name, points), colour, mark, side in zip(series.items(), COLOURS, MARKS, sides, strict=False):
        colour = OURS if name == "default" else colour
        known = [p for p in points if p[2]]
        axis.plot([p[0] for p in points], [p[1] for p in points], color=colour, linestyle="--", linewidth=0.8)
        axis.plot([p[0] for p in known], [p[1] for p in known], color=colour, label=name)
        for x, y, measured in points:
            axis.plot(x, y, color=colour, marker=mark, markerfacecolor=colour if measured else "white")
            axis.annotate(f"{y:,.3g}", (x, y), (0, side), textcoords="offset points", fontsize=7, ha="center")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.margins(y=0.12)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(title="hollow: in proportion, not run", fontsize=8, title_fontsize=8)
    save(figure, path, title)


Points = Mapping[str, Sequence[tuple[str, float, float, float]]]
"""By family: (name, x, y, error of y)."""
COLOURS = ("#24292f", "#d9730d", "#2da44e", "#8250df", OURS, BASELINE)
MARKS = ("*", "o", "s", "^", "D", "x")
NAMED = {
    "actcompile": ((-5, -8), "right"),
    "other codecs": ((5, 4), "left"),
    "torch.compile": ((5, 4), "left"),
}  # where the names of their points go


def scatters(
    path: Path, title: str, x_label: str, y_label: str, panels: Mapping[str, Points], curves: bool = False
) -> None:
    """One panel for each set of points; x on a logarithmic scale, families told apart by colour and mark.

    `curves`: each family's points are joined, and y is logarithmic, too. Only the last two families' points are named:
    names of all would cover each other.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 3.8 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, families) in zip(axes.flat, panels.items(), strict=False):
        for colour, mark, (family, points) in zip(COLOURS, MARKS, families.items(), strict=False):
            if not points:
                continue
            joined = curves and family != "other codecs"
            _, x, y, error = zip(*sorted(points, key=lambda p: p[1]), strict=True)
            axis.errorbar(
                x, y, error, fmt=mark + "-" * joined, color=colour, label=family, markersize=6, elinewidth=1, alpha=0.85
            )
            if family in NAMED:
                (dx, dy), side = NAMED[family]
                for text, px, py, _ in points:
                    axis.annotate(
                        text, (px, py), (dx, dy), textcoords="offset points", fontsize=7, color=colour, ha=side
                    )
        _logarithmic(axis, "x")
        if curves:
            _logarithmic(axis, "y")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(x_label, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.22)
        axis.spines[["top", "right"]].set_visible(False)
    for row in axes:
        row[0].set_ylabel(y_label, fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, bbox_to_anchor=(0.5, -0.07))
    save(figure, path, title)


FAR = 1.1  # times as large, or as small: such points are named


def agreement(path: Path, title: str, panels: Mapping[str, Mapping[str, Sequence[tuple[str, float, float]]]]) -> None:
    """One panel for each quantity: {quantity: {family: (name, predicted, measured)}}, beside the line where they agree.

    Both scales are logarithmic; points that are far from the line have their names, others would cover each other.
    """
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.4), squeeze=False)
    for axis, (quantity, families) in zip(axes[0], panels.items(), strict=True):
        values = [v for points in families.values() for _, *both in points for v in both]
        ends = (0.8 * min(values), 1.25 * max(values)) if values else (1.0, 10.0)
        axis.plot(ends, ends, color=BASELINE, linewidth=0.8)
        for colour, mark, (family, points) in zip(COLOURS, MARKS, families.items(), strict=False):
            axis.scatter(
                [p[1] for p in points], [p[2] for p in points], marker=mark, color=colour, alpha=0.8, label=family
            )
            for name, predicted, measured in points:
                if not 1 / FAR <= measured / predicted <= FAR:
                    below = measured < predicted
                    place = {"xytext": (7, -9) if below else (-7, 3), "ha": "left" if below else "right"}
                    axis.annotate(
                        name, (predicted, measured), textcoords="offset points", fontsize=7, color=colour, **place
                    )
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            scale.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            scale.set_minor_formatter(ticker.NullFormatter())
        axis.set_title(quantity, fontsize=10)
        axis.set_xlabel("predicted", fontsize=8)
        axis.set_ylabel("measured", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, loc="upper left", frameon=False)
    save(figure, path, title)


def _logarithmic(axis: Any, which: str) -> None:
    """A logarithmic scale with ticks at 1, 2 and 5 times the powers of ten, in plain numbers."""
    axis.set(**{f"{which}scale": "log"})
    scale = getattr(axis, f"{which}axis")
    scale.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if which == "x" else (1.0,)))
    scale.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    scale.set_minor_formatter(ticker.NullFormatter())


def save(figure: Any, path: Path, title: str) -> None:
    """Writes a figure under its title, in the format that the path ends in."""
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
