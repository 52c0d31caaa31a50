"""Drawings of results, as SVG beside the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "actcompile"  # the same numbers give the same file

from matplotlib import pyplot  # noqa: E402  the backend must be chosen first

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
    _save(figure, path, title)


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
    _save(figure, path, title)


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
