"""Live bytes over a step, before and after: bars for a terminal, areas as SVG, and what is alive at the peak.

Both are drawn to one scale, forward on the left and backward on the right, in the order in which nodes run.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .data import KINDS, GraphReport, Memory
from .text import clean, cut, human, simple_box

BARS = " ▁▂▃▄▅▆▇█"
PLAIN_BARS = " .:-=+*%#"
ROWS = 6  # lines of text that the largest peak takes
LAYERS = 8  # that the table names, the largest
STYLE = """
.ac .edges { fill: #be185d; } .ac .nodes { fill: #4f74c8; }
.ac .encoded { fill: #ea580c; } .ac .other { fill: #9ca3af; }
.ac path.edges, .ac path.nodes, .ac path.encoded, .ac path.other { stroke: none; }
.ac path.axis { stroke: #6b7280; stroke-width: 1; } .ac path.turn { stroke: #6b7280; stroke-dasharray: 3 3; }
"""
PANEL, GAP, TOP, TALL = 420, 90, 44, 180  # pixels: a panel's width, before each, above and their height


def is_drawn(graph: GraphReport) -> bool:
    """Whether there is anything to see of a graph's memory."""
    return bool(graph.memory_before.peak or graph.memory_after.peak)


def peaks(graph: GraphReport) -> str:
    """`live bytes over a step, inputs and parameters left out: 1,388 MB -> 412 MB at the peak`."""
    before, after = human(graph.memory_before.peak), human(graph.memory_after.peak)
    return f"live bytes over a step, inputs and parameters left out: {before} -> {after} at the peak"


def plots(graph: GraphReport, width: int) -> list[RenderableType]:
    """Both as bars, side by side, in so many columns of text; and a table of what is alive at the peaks."""
    before, after = graph.memory_before, graph.memory_after
    top = max(before.peak, after.peak)
    marks = BARS if simple_box().ascii is False else PLAIN_BARS
    scale = [human(top), "", "", "", "", "0 B"]
    margin = max(map(len, scale))
    each = (width - margin - 6) // 2
    lines = [
        f"  {mark:>{margin}} {left} {right}"
        for mark, left, right in zip(scale, bars(before, each, top, marks), bars(after, each, top, marks), strict=True)
    ]
    heads = [f"{name}, peak {human(memory.peak)}" for name, memory in (("before", before), ("after", after))]
    turns = [_turn(memory, each) for memory in (before, after)]
    feet = [f"{'forward':<{turn}}{'backward':<{each - turn}}" if turn > 8 else "" for turn in turns]
    indent = " " * (margin + 3)
    text = [f"{indent}{heads[0]:<{each}} {heads[1]}", *lines, f"{indent}{feet[0]:<{each}} {feet[1]}"]
    return [Text("\n".join(line.rstrip() for line in text), no_wrap=True), _at_peak(graph)]


def bars(memory: Memory, width: int, top: int, marks: str = BARS) -> list[str]:
    """`ROWS` lines of so many letters, each column as high as the most that is alive at its positions."""
    heights = [round(most * ROWS * 8 / max(top, 1)) for most in columns(memory.live(), width)]
    heights = [max(h, 1) if most else 0 for h, most in zip(heights, columns(memory.live(), width), strict=True)]
    return ["".join(marks[min(max(h - 8 * row, 0), 8)] for h in heights) for row in reversed(range(ROWS))]


def columns(live: Sequence[int], width: int) -> list[int]:
    """The most of so many equal parts of a sequence."""
    ends = [i * len(live) // width for i in range(width + 1)]
    return [max(live[a : max(b, a + 1)], default=0) for a, b in zip(ends, ends[1:], strict=False)]


def _turn(memory: Memory, width: int) -> int:
    """The column where backward begins."""
    return width * memory.forward // max(memory.forward + memory.backward, 1)


def by_layer(memory: Memory) -> dict[str, Counter[str]]:
    """Bytes that are alive at the peak, by layer and kind."""
    layers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in memory.at_peak():
        layers[row.module or "(model)"][row.kind] += row.nbytes
    return layers


def at_peak(graph: GraphReport) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table of what is alive at the peaks: layers, and for before and after the kinds in bytes.

    The largest layers come first, and those after `LAYERS`, or of less than 1 % of the peaks, as one. A kind that is
    less than 1 % of its peak has no column.
    """
    both = {"before": by_layer(graph.memory_before), "after": by_layer(graph.memory_after)}
    kinds = {when: sum(layers.values(), Counter()) for when, layers in both.items()}
    shown = [(when, kind) for when, c in kinds.items() for kind in KINDS if c[kind] > c.total() / 100]
    total = sum((Counter({name: c.total() for name, c in layers.items()}) for layers in both.values()), Counter())
    ordered = [name for name, _ in total.most_common()]
    large = [name for name in ordered[:LAYERS] if total[name] > total.total() / 100]
    groups = {name: [name] for name in large}
    if rest := ordered[len(large) :]:
        groups[f"{len(rest)} other layer{'s' if len(rest) > 1 else ''}"] = rest
    rows = []
    for name, layers in groups.items():
        sums = (sum(both[when][layer][kind] for layer in layers) for when, kind in shown)
        rows.append([clean(name), *(human(nbytes) if nbytes else "-" for nbytes in sums)])
    return ["alive at the peak", *(f"{when}: {kind}" for when, kind in shown)], rows


def _at_peak(graph: GraphReport) -> Table:
    heads, rows = at_peak(graph)
    table = Table(box=simple_box(), padding=(0, 1, 0, 0))
    for i, head in enumerate(heads):
        table.add_column(head.replace(": ", ":\n"), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def draw_memory(graph: GraphReport) -> Element:
    """Both as areas, one kind on the other, as an `svg` element without style."""
    width, height = 2 * (GAP + PANEL) + 20, TOP + TALL + 44
    svg = Element("svg", xmlns="http://www.w3.org/2000/svg", width=f"{width}", height=f"{height}")
    svg.set("viewBox", f"0 0 {width} {height}")
    svg.set("class", "ac")
    top = max(graph.memory_before.peak, graph.memory_after.peak, 1)
    for i, (name, memory) in enumerate((("before", graph.memory_before), ("after", graph.memory_after))):
        _panel(svg, GAP + i * (GAP + PANEL), name, memory, top)
    x = GAP
    for kind in KINDS:
        if any(row.kind == kind for memory in (graph.memory_before, graph.memory_after) for row in memory.rows):
            SubElement(svg, "rect", {"class": kind, "x": f"{x}", "y": f"{height - 16}", "width": "10", "height": "10"})
            _text(svg, x + 15, height - 7, kind)
            x += 40 + 7 * len(kind)
    return svg


def _panel(svg: Element, left: float, name: str, memory: Memory, top: int) -> None:
    positions = max(memory.forward + memory.backward, 1)
    base = [0] * positions
    bottom, live = TOP + TALL, memory.live()

    def x(position: float) -> float:
        return left + PANEL * position / positions

    def y(nbytes: float) -> float:
        return bottom - TALL * nbytes / top

    for kind in KINDS[::-1]:
        above = [a + b for a, b in zip(base, memory.live(kind), strict=False)]
        if above != base:
            upper = "".join(f"V{y(n):.1f}H{x(i + 1):.1f}" for i, n in enumerate(above))
            lower = "".join(f"V{y(n):.1f}H{x(i):.1f}" for i, n in reversed(list(enumerate(base))))
            path = SubElement(svg, "path", {"class": kind, "d": f"M{x(0):.1f} {y(base[0]):.1f}{upper}{lower}Z"})
            SubElement(path, "title").text = f"{kind}: {human(max(memory.live(kind)))} at most"
            base = above
    SubElement(svg, "path", {"class": "axis", "d": f"M{left} {TOP}V{bottom}H{left + PANEL}"})
    turn = x(memory.forward)
    SubElement(svg, "path", {"class": "turn", "d": f"M{turn:.1f} {TOP}V{bottom}"})
    _text(svg, left, TOP - 22, f"{name}: {human(memory.peak)} at the peak", "head")
    _text(svg, left - 6, TOP + 10, human(top), "end dim")
    _text(svg, left - 6, bottom, "0 B", "end dim")
    _text(svg, turn - 6, bottom + 16, "forward", "end dim")
    _text(svg, turn + 6, bottom + 16, "backward", "dim")
    if memory.peak:
        at = live.index(memory.peak)
        largest = memory.at_peak()[0]
        words = f"largest: {clean(largest.module) or '(model)'} {clean(largest.name)}"
        end = " end" if x(at) > left + PANEL / 2 else ""
        _text(svg, x(at), y(memory.peak) - 5, cut(words, 48), f"dim{end}")


def _text(parent: Element, x: float, y: float, text: str, kind: str = "") -> None:
    SubElement(parent, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "class": kind}).text = text
