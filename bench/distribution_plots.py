"""Drawings of observed distributions: shapes, Q-Q points, and what levels save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.distributions import CELLS, PROBABILITIES, TOP, Sample, cells, normal_cells, normal_quantiles
from bench.plots import OURS as BLUE
from bench.plots import pyplot, save

GREY, ORANGE = "#c3c9d0", "#d9730d"
PER_ROW = 4


def shapes(path: Path, title: str, samples: Mapping[str, Sample]) -> None:
    """One histogram for each activation, with the clipped normal's and the uniform density; ends as separate bars."""
    figure, axes = _grid(len(samples))
    merged = 4  # cells to a bar
    width = TOP * merged / CELLS
    middles = (np.arange(CELLS // merged) + 0.5) * width
    for axis, (name, s) in zip(axes, samples.items(), strict=False):
        observed, model = (c[1:-1].reshape(-1, merged).sum(1) / width for c in (cells(s.h), normal_cells(s.block)))
        ends, expected = cells(s.h)[[0, -1]], normal_cells(s.block)[0]
        axis.bar(middles, observed, width, color=GREY, label="observed")
        axis.plot(middles, model, color=BLUE, label="clipped normal")
        axis.axhline(1 / TOP, color=ORANGE, linestyle="--", linewidth=1, label="uniform")
        axis.set_title(f"{name}\nzero {s.zero:.0%}", fontsize=8)
        axis.text(0.97, 0.95, _ends(ends, expected), transform=axis.transAxes, fontsize=7, ha="right", va="top")
        axis.set_ylim(0, 1.35 * min(3.0, max(observed.max(), model.max())))
        axis.set_yticks([])
    _finish(figure, axes, len(samples), "normalised element h")
    save(figure, path, f"{title}, last epoch, blocks of {_block(samples)}: density of the normalised elements")


def _ends(ends: np.ndarray, expected: float) -> str:
    return f"at 0: {ends[0]:.1%}\nat 3: {ends[1]:.1%}\nnormal: {expected:.1%} each"


def quantiles(path: Path, title: str, samples: Mapping[str, Sample]) -> None:
    """Q-Q points of each activation against the clipped normal and the uniform distribution."""
    figure, axes = _grid(len(samples))
    for axis, (name, s) in zip(axes, samples.items(), strict=False):
        observed = np.quantile(s.h, PROBABILITIES)
        axis.plot([0, TOP], [0, TOP], color=GREY, linewidth=1)
        axis.plot(normal_quantiles(s.block), observed, "o", markersize=3, color=BLUE, label="clipped normal")
        axis.plot(TOP * PROBABILITIES, observed, "x", markersize=4, color=ORANGE, label="uniform")
        axis.set_title(name, fontsize=8)
        axis.set_xlim(-0.1, TOP + 0.1)
        axis.set_ylim(-0.1, TOP + 0.1)
        axis.set_aspect("equal")
    _finish(figure, axes, len(samples), "quantile of the model")
    axes[0].set_ylabel("observed quantile", fontsize=8)
    save(figure, path, f"{title}, last epoch, blocks of {_block(samples)}: quantiles (on the line: the model is right)")


def variances(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """For every later observation, what levels save, against the share of elements at the ends of their blocks."""
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4), sharey=True)
    shown = [r for r in records if r["less_variance"] and r["later"]]
    panels = {
        "normal": "levels of the clipped normal",
        "histogram": "levels fitted in the first epoch",
        "previous": "levels fitted at the previous look",
    }
    for axis, (quantity, label) in zip(axes, panels.items(), strict=True):
        for model, mark in zip(sorted({r["model"] for r in shown}), "os^D", strict=False):
            chosen = [r for r in shown if r["model"] == model]
            x = [100 * sum(r["ends"]) for r in chosen]
            y = [100 * r["less_variance"][quantity] for r in chosen]
            axis.plot(x, y, mark, markersize=4, alpha=0.6, label=model)
        axis.axhline(0, color=GREY, linewidth=1)
        axis.set_title(label, fontsize=9)
        axis.set_xlabel("elements at an end of their block, %", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("rounding variance saved against uniform levels, %", fontsize=9)
    axes[0].legend(fontsize=8)
    save(figure, path, "2 bits, later epochs, every saved float: what non-uniform levels save")


def _block(samples: Mapping[str, Sample]) -> int:
    return next((s.block for s in samples.values()), 0)


def _grid(count: int) -> tuple[Any, list[Any]]:
    rows = max(1, -(-count // PER_ROW))
    figure, axes = pyplot.subplots(rows, PER_ROW, figsize=(2.6 * PER_ROW, 2.4 * rows + 0.6), squeeze=False)
    return figure, list(axes.flat)


def _finish(figure: Any, axes: Sequence[Any], count: int, label: str) -> None:
    for axis in axes[count:]:
        axis.set_visible(False)
    for i, axis in enumerate(axes[:count]):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
        if i + PER_ROW >= count:  # the last of its column
            axis.set_xlabel(label, fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8, bbox_to_anchor=(0.5, -0.04))
