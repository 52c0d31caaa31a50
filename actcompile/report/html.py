"""A report as a picture: an SVG drawing of the rewritten graphs, and a page that holds it with the table and the code.

Both are single files that load nothing. They follow the reader's light or dark setting.
"""

from collections.abc import Iterable
from html import escape
from xml.etree.ElementTree import Element, SubElement, tostring

from .data import EdgeRow, GraphReport, ReportData, Row
from .memory import STYLE as MEMORY_STYLE
from .memory import at_peak, draw_memory, is_drawn, peaks
from .svg import STYLE, draw
from .table import NO_GRAPH, NO_ROW, about_edges, about_plan, heading, summed, summed_edges, totals
from .text import because, biased, clean, human, made_in, shape_of

PAGE_STYLE = """
.actcompile { font: 14px/1.45 system-ui, sans-serif; color: #1f2937; background: #ffffff; padding: 16px 24px; }
.actcompile h1 { font-size: 20px; margin: 8px 0; } .actcompile h2 { font-size: 16px; margin: 28px 0 8px; }
.actcompile .wide { overflow-x: auto; } .actcompile .totals { font-size: 16px; }
.actcompile table { border-collapse: collapse; font-size: 13px; }
.actcompile th { text-align: left; cursor: pointer; border-bottom: 2px solid #9ca3af; padding: 3px 12px 3px 0; }
.actcompile td { text-align: left; border-bottom: 1px solid #e5e7eb; padding: 3px 12px 3px 0; vertical-align: top; }
.actcompile .number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.actcompile code, .actcompile pre { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.actcompile pre { overflow-x: auto; background: #f3f4f6; padding: 12px; } .actcompile .dim { color: #6b7280; }
.actcompile .less { color: #15803d; } .actcompile summary { cursor: pointer; margin: 8px 0; }
.actcompile .key { display: inline-block; border: 1px solid; border-radius: 4px; padding: 0 8px; margin-right: 8px; }
.actcompile .inserted { background: #c2410c; color: #ffffff; } .actcompile .rounded { border-color: #ea580c; }
.actcompile .biased { border-color: #be185d; } .actcompile .lossless { border-color: #16a34a; }
.actcompile .keep { border-color: #9ca3af; } .actcompile .gone { border: 1px dashed #9ca3af; }
@media (prefers-color-scheme: dark) {
.actcompile { color: #e5e7eb; background: #11161f; } .actcompile pre { background: #1b2230; }
.actcompile td { border-color: #2b3443; } .actcompile .dim { color: #9ca3af; } .actcompile .less { color: #4ade80; }
}
"""
SORT = """
document.querySelectorAll('.actcompile th').forEach(function (head) { head.onclick = function () {
  var body = head.closest('table').tBodies[0], at = head.cellIndex, up = head.dataset.up !== 'yes';
  function key(row) { var cell = row.cells[at];
    return cell.dataset.value ? Number(cell.dataset.value) : cell.innerText; }
  head.dataset.up = up ? 'yes' : 'no';
  Array.from(body.rows).sort(function (a, b) { a = key(a); b = key(b);
    return (a > b ? 1 : b > a ? -1 : 0) * (up ? 1 : -1); }).forEach(function (row) { body.append(row); });
}; });
"""
KEYS = {
    "inserted": "op that actcompile inserted",
    "rounded": "rounded, gradients unbiased",
    "biased": "rounded, biases a gradient",
    "lossless": "lossless",
    "keep": "kept as it is",
    "gone": "not saved any more",
}
COLUMNS = ("layer", "node", "source line", "shape", "before", "after", "codec", "biased", "reason")
EDGE_COLUMNS = ("layer", "node", "source line", "shape", "made in", "bytes", "held", "reason")
NUMBERS = ("before", "after", "bytes", "held")


def svg_drawing(report: ReportData) -> str:
    """Both rewritten graphs of every compiled graph as one SVG file, one below the other; inserted ops are filled."""
    svg = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "ac"})
    SubElement(svg, "style").text = STYLE + MEMORY_STYLE
    SubElement(svg, "rect", {"class": "page", "width": "100%", "height": "100%"})
    top, width = 0.0, 900.0
    for number, graph in enumerate(report.graphs):
        SubElement(svg, "text", {"class": "head", "x": "14", "y": f"{top + 24:.0f}"}).text = heading(report, number)
        top += 34
        for drawing in (*([draw_memory(graph)] if is_drawn(graph) else []), draw(graph)):
            drawing.attrib.pop("xmlns")
            drawing.set("y", f"{top:.0f}")
            svg.append(drawing)
            top += float(drawing.get("height", 0))
            width = max(width, float(drawing.get("width", 0)))
    for line in [] if report.graphs else NO_GRAPH.replace("; ", ";\n").replace(". ", ".\n").splitlines():
        top += 20
        SubElement(svg, "text", x="14", y=f"{top + 4:.0f}").text = line
    height = f"{top + 20:.0f}"
    svg.attrib.update(width=f"{width:.0f}", height=height, viewBox=f"0 0 {width:.0f} {height}")
    return tostring(svg, encoding="unicode")


def html_page(report: ReportData) -> str:
    """The report as one HTML page (also well-formed XML): totals, and per graph the table, the drawing and the code."""
    graphs = [_section(report, number) for number in range(len(report.graphs))]
    notes = "".join(f"<li>{_safe(note)}</li>" for note in report.notes)
    keys = "".join(f'<span class="key {name}">{text}</span>' for name, text in KEYS.items())
    first = totals(report) if graphs else NO_GRAPH
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><title>actcompile: saved activations</title>
<meta name="viewport" content="width=device-width"/><style>{PAGE_STYLE}{STYLE}{MEMORY_STYLE}</style></head>
<body style="margin: 0"><div class="actcompile"><h1>Saved activations</h1>
<p class="totals">{_safe(first)}</p>{f"<ul>{notes}</ul>" if notes else ""}{f"<p>{keys}</p>" if graphs else ""}
{"".join(graphs)}
</div><script>{SORT}</script></body></html>
"""


def _section(report: ReportData, number: int) -> str:
    graph = report.graphs[number]
    drawing = tostring(draw(graph), encoding="unicode")
    code = "".join(
        f"<details><summary>code of the {name} graph</summary><pre>{_safe(text)}</pre></details>"
        for name, text in (("forward", graph.forward), ("backward", graph.backward))
    )
    return f"""<h2>{_safe(heading(report, number))}</h2>
<div class="wide">{_table(graph)}</div>
{_edges(graph)}{_memory(graph)}{_plan(graph)}
<details open="open"><summary>drawing (point at a box to see its nodes)</summary>
<div class="wide">{drawing}</div></details>
{code}"""


def _table(graph: GraphReport) -> str:
    if not graph.rows:
        return f"<p>{NO_ROW}</p>"
    shown, sums = summed(graph.rows)
    table = _of_columns(COLUMNS, map(_row, shown)) if shown else ""
    return f"{table}{_dim_list(sums)}"


def _edges(graph: GraphReport) -> str:
    shown, sums = summed_edges(graph.edges)
    lines = "".join(f"<p>{_safe(line)}</p>" for line in about_edges(graph))
    table = _of_columns(EDGE_COLUMNS, map(_edge_row, shown)) if shown else ""
    return f'{lines}<div class="wide">{table}{_dim_list(sums)}</div>\n' if lines else ""


def _memory(graph: GraphReport) -> str:
    if not is_drawn(graph):
        return ""
    heads, rows = at_peak(graph)
    cells = (
        _cells(*(f'<td class="{"number" if i else ""}">{_safe(c)}</td>' for i, c in enumerate(row))) for row in rows
    )
    table = _of_columns(tuple(heads), cells)
    drawing = tostring(draw_memory(graph), encoding="unicode")
    return f'<p>{_safe(peaks(graph))}</p><div class="wide">{drawing}</div><div class="wide">{table}</div>\n'


def _plan(graph: GraphReport) -> str:
    return "".join(f"<p>{_safe(line)}</p>" for line in about_plan(graph))


def _of_columns(columns: tuple[str, ...], rows: Iterable[str]) -> str:
    heads = "".join(f'<th class="{"number" if c in NUMBERS else ""}">{c}</th>' for c in columns)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _dim_list(lines: Iterable[str]) -> str:
    items = "".join(f'<li class="dim">{_safe(line)}</li>' for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _row(row: Row) -> str:
    less = " less" if row.bytes_after < row.bytes_before else ""
    return _cells(
        *_where(row),
        _number(row.bytes_before),
        _number(row.bytes_after, less),
        *(f"<td>{_safe(text)}</td>" for text in (row.codec, biased(row), row.reason)),
    )


def _edge_row(row: EdgeRow) -> str:
    made = f"<td>{made_in(row)}</td>"
    return _cells(*_where(row), made, _number(row.nbytes), _number(row.held), f"<td>{_safe(because(row))}</td>")


def _where(row: Row | EdgeRow) -> list[str]:
    return [
        f"<td>{_safe(row.module or '(model)')}</td>",
        f"<td><code>{_safe(row.name)}</code></td>",
        f"<td><code>{_safe(row.source)}</code></td>",
        f"<td>{_safe(shape_of(row))} {_safe(row.dtype)}</td>",
    ]


def _right(text: str) -> str:
    return f'<td class="number">{_safe(text)}</td>'


def _number(nbytes: int, kind: str = "") -> str:
    return f'<td class="number{kind}" data-value="{nbytes}">{human(nbytes)}</td>'


def _cells(*cells: str) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def _safe(text: str) -> str:
    return escape(clean(text, keep="\n\t"))
