"""A report as a table of text: one line per saved activation, what became of it, and why."""

import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .data import EdgeRow, GraphReport, ReportData, Row
from .memory import is_drawn, peaks, plots
from .text import ROOMY, because, biased, clean, count, cut, human, made_in, shape_of, share, simple_box, to_text, width

R = TypeVar("R", Row, EdgeRow)
K = TypeVar("K")
NO_GRAPH = (
    "No graph was compiled with a backward pass. Either the model has not run yet; or it ran only where nothing is "
    "saved for backward (under torch.no_grad(), in inference mode, or with no tensor that requires a gradient); or "
    "torch.compile fell back to eager for all of it (TORCH_LOGS=graph_breaks tells where)."
)
NO_ROW = "This graph saves no tensor for backward: there is nothing to compress."


def render(report: ReportData) -> str:
    """The report as plain text without colour codes, as wide as the terminal (`COLUMNS`, 100 where there is none).

    For colours, print the report through rich: `rich.print(report)`.
    """
    return to_text(renderable(report, roomy=width() >= ROOMY))


def renderable(report: ReportData, roomy: bool | None = None) -> Group:
    """The report as a rich renderable: a table and a summary per graph, then totals and notes.

    Args:
        roomy: whether source lines show their code and codecs all their fields; None asks the terminal.
    """
    if roomy is None:
        roomy = shutil.get_terminal_size((100, 24)).columns >= ROOMY
    parts: list[RenderableType] = []
    for number, graph in enumerate(report.graphs):
        parts += [
            Text(heading(report, number), style="bold"),
            *_graph(graph, roomy),
            *_memory(graph),
            *_plan(graph),
            Text(),
        ]
    if not report.graphs:
        parts.append(Text(NO_GRAPH))
    else:
        parts.append(Text(totals(report), style="bold"))
    parts += [Text(f"note: {clean(note)}") for note in report.notes]
    return Group(*parts)


def heading(report: ReportData, number: int) -> str:
    """`graph 0 of 2, compiled by inductor: 16.40 MB -> 1.46 MB`, the mode, and the sizes that this is for."""
    graph = report.graphs[number]
    change = f"{human(graph.bytes_before)} -> {human(graph.bytes_after)}"
    mode = "" if graph.training else ", in eval mode"
    said = dict.fromkeys(graph.bounds, "at most") | dict.fromkeys(graph.guesses, "perhaps")
    sizes = [f"{name} {said.get(name, '=')} {size:,}" for name, size in graph.sizes.items()]
    at = f", with {', '.join(map(clean, sizes))}" if sizes else ""
    return f"graph {number} of {len(report.graphs)}, compiled by {clean(graph.inner)}{mode}: {change}{at}"


def totals(report: ReportData) -> str:
    """What is saved for backward, before and after, and the ratio; or that nothing got smaller."""
    before, after = report.saved_bytes_before, report.saved_bytes_after
    line = f"saved for backward: {human(before)} -> {human(after)}"
    if after >= before:
        return f"{line}: nothing gained; the reasons above say why" if before else line
    return f"{line}, {before / after:.1f} times less" if after else f"{line}: all of it is rebuilt"


def _graph(graph: GraphReport, roomy: bool) -> list[RenderableType]:
    if not graph.rows:
        return [Text(NO_ROW), *_edges(graph, roomy)]
    shown, sums = summed(graph.rows)
    parts: list[RenderableType] = [_table(fused_by_layer(shown), roomy)] if shown else []
    return [*parts, *(Text(f"  {line}") for line in sums), *_edges(graph, roomy)]


def _edges(graph: GraphReport, roomy: bool) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(f"  {line}") for line in about_edges(graph)]
    shown, sums = summed_edges(graph.edges)
    if shown:
        parts.append(_edge_table(shown, roomy))
    return [*parts, *(Text(f"  {line}") for line in sums)]


def _memory(graph: GraphReport) -> list[RenderableType]:
    return [Text(f"  {peaks(graph)}"), *plots(graph, width())] if is_drawn(graph) else []


def _plan(graph: GraphReport) -> list[RenderableType]:
    return [Text(f"  {line}") for line in about_plan(graph)]


def about_plan(graph: GraphReport) -> list[str]:
    """What decided the bits, and what the planner predicts: the gradients' error, a greedy plan's, and the front."""
    if (plan := graph.outlook) is None:
        return [graph.precision] if graph.precision else []
    basis = "measured" if plan.measured else "guessed: actcompile.measure tells it from a run"
    time = f"{1e3 * plan.seconds:,.1f} ms to encode and decode"
    lines = [f"planned: rounding adds {share(plan.error)} to the gradients' error ({basis}), {time}"]
    if plan.gap > 1e-3 and plan.gap < float("inf"):
        lines.append(f"the search was cut short: the best plan may be better by {share(plan.gap)}")
    if plan.greedy is not None:
        peak, error, _ = plan.greedy
        lines.append(f"a greedy plan would have {share(error)}, at a peak of {human(int(peak))}")
    points = ", ".join(f"{human(int(peak))}: {share(error)}" for peak, error, _ in plan.front)
    return [*lines, f"least error by predicted peak: {points}"]


def about_edges(graph: GraphReport) -> list[str]:
    """What is fused of a graph's message passing, and what of it is in memory all the same; none without any."""
    lines = []
    if graph.fused or graph.edges:
        fused = f"message passing: {graph.fused} region{'s' if graph.fused != 1 else ''} fused"
        lines.append(fused if graph.edges else f"{fused}; no tensor with a row for each edge is in memory")
    if graph.edges:
        held, largest = sum(row.held for row in graph.edges), max(row.nbytes for row in graph.edges)
        tensors = f"{len(graph.edges)} tensor{'s' if len(graph.edges) != 1 else ''} with a row for each edge in memory"
        lines.append(f"{tensors}, the largest of {human(largest)}; {human(held)} held for backward")
    if graph.remembered:
        lines.append(f"edges grouped by node, remembered across steps: {human(graph.remembered)}")
    return lines


def summed_edges(rows: Iterable[EdgeRow]) -> tuple[list[EdgeRow], list[str]]:
    """The rows worth a line of their own, largest first, and lines that sum up those of under 1 % of the largest."""
    rows = sorted(rows, key=lambda r: -r.nbytes)
    small = [r for r in rows if r.nbytes < rows[0].nbytes / 100]
    lines = []
    for reason, group in _by_reason(small).items():
        total, held = human(sum(r.nbytes for r in group)), human(sum(r.held for r in group))
        number = f"{len(group)} small tensor{'s' if len(group) != 1 else ''}"
        lines.append(f"{number} with a row for each edge, {total} in all, {held} held: {clean(reason)}")
    return rows[: len(rows) - len(small)], lines


def _edge_table(rows: list[EdgeRow], roomy: bool) -> Table:
    table = Table(box=simple_box(), padding=(0, int(roomy), 0, 0))
    table.add_column("layer" if roomy else "layer, source line", overflow="fold", max_width=26 if roomy else 21)
    if roomy:
        table.add_column("source line", no_wrap=True)
    table.add_column("shape", overflow="fold", max_width=18 if roomy else 11)
    table.add_column("made in")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("held", justify="right", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for row in rows:
        table.add_row(
            *_where(row, roomy),
            made_in(row),
            human(row.nbytes),
            Text(human(row.held) if row.held else "-", style="yellow" if row.held else "dim"),
            Text(because(row)),
        )
    return table


def _where(row: Row | EdgeRow, roomy: bool) -> list[Text]:
    """The first cells of a row: layer, node, source line, and shape."""
    module, name, source = clean(row.module) or "(model)", clean(row.name), clean(row.source)
    shape = Text(f"{clean(shape_of(row))} {clean(row.dtype)}")
    if roomy:
        return [Text.assemble(module, (f" {name}", "dim")), Text(cut(source, 29)), shape]
    return [Text.assemble(module, (f"\n{name} {source.partition(' ')[0]}", "dim")), shape]


def summed(rows: Iterable[Row]) -> tuple[list[Row], list[str]]:
    """The rows worth a line of their own, and lines that sum up the others: those that cost nothing, small ones."""
    rows = list(rows)
    largest = max((r.bytes_before for r in rows), default=0)
    gone = [r for r in rows if not r.bytes_after and 0 < r.bytes_before < largest / 100]
    small = [r for r in rows if r.bytes_after and r.codec == "keep" and r.reason.startswith("small")]
    if not any((r.bytes_before or r.bytes_after) and r not in small for r in rows):
        small = []  # all that costs anything is small: then these are what the reader came for
    free = [r for r in rows if not (r.bytes_before or r.bytes_after)]
    lines = []
    for reason, group in _by_reason(small).items():
        total = human(sum(r.bytes_after for r in group))
        lines.append(f"{count(group, 'small tensor')}, {total} in all: kept ({clean(reason)})")
    for (codec, reason), group in _by(gone, lambda r: (r.codec, r.reason)).items():
        total = human(sum(r.bytes_before for r in group))
        lines.append(f"{count(group, 'small tensor')}, {total} in all: {clean(codec)} ({clean(reason)})")
    alive = [r for r in free if r.reason.endswith("alive anyway")]
    if alive:
        things = "input or parameter" if len(alive) == 1 else "inputs and parameters"
        lines.append(f"{len(alive)} {things}: alive anyway")
    for reason, group in _by_reason(r for r in free if r not in alive).items():
        lines.append(f"{count(group, 'tensor')} that cost no memory: {clean(reason)}")
    return [r for r in rows if r not in small and r not in free and r not in gone], lines


def fused_by_layer(rows: Iterable[Row]) -> list[Row]:
    """The rows, with one for all of a layer that fused message passing does without: its largest, and a count."""
    rows = list(rows)
    groups = _by((row for row in rows if row.codec == "fused"), lambda row: row.module)
    merged = {
        group[0]: replace(
            group[0],
            name=f"{group[0].name} and {len(group) - 1} more",
            bytes_before=sum(row.bytes_before for row in group),
        )
        for group in groups.values()
        if len(group) > 1
    }
    left = [merged.get(row, row) for row in rows if row.codec != "fused" or row is groups[row.module][0]]
    return sorted(left, key=lambda row: (-row.bytes_before, -row.bytes_after))


def _by_reason(rows: Iterable[R]) -> dict[str, list[R]]:
    return _by(rows, lambda row: row.reason)


def _by(rows: Iterable[R], key: Callable[[R], K]) -> dict[K, list[R]]:
    groups: dict[K, list[R]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def _table(rows: list[Row], roomy: bool) -> Table:
    table = Table(box=simple_box(), padding=(0, int(roomy), 0, 0))
    table.add_column("layer" if roomy else "layer, source line", overflow="fold", max_width=26 if roomy else 21)
    if roomy:
        table.add_column("source line", no_wrap=True)
    table.add_column("shape", overflow="fold", max_width=18 if roomy else 11)
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True)
    table.add_column("codec", overflow="fold", max_width=23 if roomy else 16)
    table.add_column("biased", overflow="fold", max_width=9)
    table.add_column("reason", overflow="fold")
    for row in rows:
        table.add_row(
            *_where(row, roomy),
            Text(human(row.bytes_before)),
            Text(human(row.bytes_after), style=_colour(row)),
            Text(clean(row.codec) if roomy else re.sub(r", [\w-]+ levels\)$", ")", clean(row.codec))),
            Text(biased(row)),
            Text(clean(row.reason.removeprefix(f"biased through {row.through}, "))),
        )
    return table


def _colour(row: Row) -> str:
    return "green" if row.bytes_after < row.bytes_before else "yellow" if row.bytes_after else "dim"
