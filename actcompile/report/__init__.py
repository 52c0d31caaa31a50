"""The report on a model: `data`, and views of it. Data know nothing of views, and views nothing of `Report`."""

import json
from pathlib import Path
from typing import Any

from actcompile.passes.plan.pins import Pin, PinnedGraph

from .data import EdgeRow, GraphNode, GraphReport, ReportData, Row
from .html import html_page, svg_drawing
from .saved_plan import SavedPlan
from .table import render, renderable

__all__ = ["EdgeRow", "GraphNode", "GraphReport", "Report", "Row"]


class Report(ReportData):
    """What `actcompile.explain` returns: one `GraphReport` per graph that Dynamo cut from the model.

    `print(report)` shows a table, in a notebook it shows as HTML. Nothing in it refers to the model.
    """

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, written to `path` too where one is given."""
        return _write(json.dumps(self.to_dict(), indent=1), path)

    @staticmethod
    def from_json(text: str) -> "Report":
        data = json.loads(text)
        return Report(tuple(GraphReport.from_dict(g) for g in data["graphs"]), tuple(data["notes"]))

    def plan(self) -> SavedPlan:
        """How each activation is kept that may be rounded, to be saved, compared, and taken again: `Config.plan`.

        Of a graph that was compiled several times, for other sizes, the last one counts.

        Raises:
            ValueError: the report has no graph, or graphs of different configs.
        """
        if not self.graphs:
            raise ValueError(
                "no graph was compiled with a backward pass, so that there is no plan: pass inputs to explain, or "
                "train for a step first"
            )
        if len({graph.settings for graph in self.graphs}) > 1:
            raise ValueError("the report has graphs of several configs: explain each compressed module by itself")
        made: dict[Any, PinnedGraph] = {}
        for graph in self.graphs:
            pins = [
                Pin(r.key, r.dtype, len(r.shape), r.way, r.averaged_over, r.bytes_after) for r in graph.rows if r.way
            ]
            if pins:
                found = PinnedGraph(graph.training, graph.parameters, tuple(sorted(pins, key=lambda p: p.key)))
                made[found.training, found.parameters, frozenset(found.keys)] = found
        return SavedPlan(self.graphs[0].settings, tuple(made.values()))

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one self-contained HTML page: table, drawing of both graphs (SVG), and their code."""
        return _write(html_page(self), path)

    def to_svg(self, path: str | Path | None = None) -> str:
        """Both rewritten graphs as an SVG drawing in which inserted ops stand out."""
        return _write(svg_drawing(self), path)

    def code(self) -> str:
        """Both rewritten graphs of every compiled graph, as readable Python."""
        parts = []
        for number, graph in enumerate(self.graphs):
            parts += [f"# graph {number}, forward", graph.forward, f"# graph {number}, backward", graph.backward]
        return "\n".join(parts)

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Any:
        return renderable(self)

    def _repr_html_(self) -> str:
        return self.to_html()


def _write(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
