"""One compiled graph as SVG: forward reads downwards on the left, backward upwards on the right.

Saved activations cross between them. Both sides are stretched so that as many crossings as possible run level.
"""

from dataclasses import dataclass, field
from xml.etree.ElementTree import Element, SubElement

from .condense import Box, Crossing, condense, crossings, short
from .data import GraphNode, GraphReport
from .text import biased, clean, cut, human

PITCH, HEIGHT, CHARACTER = 32, 22, 6.7  # pixels: from row to row, of a box, of a letter at 11 px
BOX, PILL, CHIP, GUTTER, LANE = 236, 116, 330, 34, 11
HEAD = 34
CODED = 4  # how much more an encoded crossing matters than a kept one, where not all can be level

STYLE = """
.ac text { font: 11px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; fill: #1f2937; }
.ac .dim { fill: #6b7280; } .ac .head { font-weight: bold; font-size: 13px; } .ac .end { text-anchor: end; }
.ac .middle { text-anchor: middle; } .ac .page { fill: #ffffff; }
.ac rect.box { fill: #e8eef9; stroke: #a9bce0; } .ac rect.quiet { fill: #f3f4f6; stroke: #d1d5db; }
.ac rect.inserted { fill: #c2410c; stroke: #9a3412; } .ac text.inserted { fill: #ffffff; font-weight: bold; }
.ac rect.rounded { fill: #fff1e6; stroke: #ea580c; } .ac rect.biased { fill: #fdeef7; stroke: #be185d; }
.ac rect.lossless { fill: #e8f7ee; stroke: #16a34a; } .ac rect.keep { fill: #f3f4f6; stroke: #9ca3af; }
.ac rect.gone { fill: none; stroke: #9ca3af; stroke-dasharray: 4 3; }
.ac path { fill: none; stroke: #94a3b8; stroke-width: 1.2; } .ac path.tip { fill: #94a3b8; stroke: none; }
.ac path.coded { stroke: #ea580c; stroke-width: 2; } .ac path.tip.coded { fill: #ea580c; stroke: none; }
.ac path.seed { stroke: #ea580c; stroke-dasharray: 2 3; stroke-width: 1; }
@media (prefers-color-scheme: dark) {
.ac text { fill: #e5e7eb; } .ac .dim { fill: #9ca3af; } .ac .page { fill: #11161f; }
.ac rect.box { fill: #1e2a44; stroke: #41588a; } .ac rect.quiet { fill: #1f2530; stroke: #3a4352; }
.ac rect.inserted { fill: #ea580c; stroke: #fb923c; } .ac text.inserted { fill: #ffffff; }
.ac rect.rounded { fill: #3a2415; stroke: #fb923c; } .ac rect.biased { fill: #3a1a2c; stroke: #f472b6; }
.ac rect.lossless { fill: #14301f; stroke: #4ade80; } .ac rect.keep { fill: #1f2530; stroke: #6b7280; }
.ac path { stroke: #64748b; } .ac path.tip { fill: #64748b; stroke: none; }
}
"""


@dataclass
class Side:
    """The boxes of one graph in the order in which they are drawn, from the top.

    Attributes:
        slots: per row, its box and the crossing that starts or ends there.
        y: per row, its middle.
        extent: top and bottom of every box.
    """

    boxes: list[Box]
    home: dict[str, int]
    returned: set[int]
    slots: list[tuple[int, Crossing | None]] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    extent: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def rank(self) -> dict[int, int]:
        """The place of every box in the order of drawing."""
        return {b: i for i, b in enumerate(dict.fromkeys(b for b, _ in self.slots))}


def draw(graph: GraphReport) -> Element:
    """The drawing of one graph as an `svg` element without style, of a size that suits its content."""
    crossing = crossings(graph)
    forward, backward = _forward(graph, crossing), _backward(graph, crossing)
    _align(forward, backward)
    edges = _far_edges(forward), _far_edges(backward)
    lanes = [max(lane.values(), default=-1) + 1 for lane in edges]
    left = 14 + LANE * (lanes[0] + 1)
    inner = left + BOX, left + BOX + 3 * GUTTER + 2 * PILL + CHIP + GUTTER
    width = inner[1] + BOX + LANE * (lanes[1] + 1) + 14
    bottom = max([*forward.y, *backward.y, HEAD + PITCH]) + PITCH
    svg = Element("svg", xmlns="http://www.w3.org/2000/svg", width=f"{width:.0f}", height=f"{bottom:.0f}")
    svg.set("viewBox", f"0 0 {width:.0f} {bottom:.0f}")
    svg.set("class", "ac")
    middle = (inner[0] + inner[1]) / 2
    for x, text in (
        (left + BOX / 2, f"forward \u2193  {len(graph.forward_nodes)} nodes"),
        (middle, f"saved for backward: {human(graph.bytes_before)} \u2192 {human(graph.bytes_after)}"),
        (inner[1] + BOX / 2, f"backward \u2191  {len(graph.backward_nodes)} nodes"),
    ):
        _text(svg, x, 20, text, "head middle")
    lines = SubElement(svg, "g")  # below the boxes
    _column(svg, lines, forward, left, edges[0], -1, "returned")
    _column(svg, lines, backward, inner[1], edges[1], 1, "gradient")
    nodes = {n.name: n for n in (*graph.forward_nodes, *graph.backward_nodes) if n.inserted}
    _crossings(svg, lines, forward, backward, inner, nodes)
    return svg


def _forward(graph: GraphReport, crossing: list[Crossing]) -> Side:
    encoders = {c.encoder for c in crossing}
    boxes, home = condense(graph.forward_nodes, encoders, (), {c.node for c in crossing})
    made: dict[int, list[Crossing]] = {}
    for c in crossing:
        if c.node in home:
            made.setdefault(home[c.node], []).append(c)
    kept = {c.node for c in crossing if not c.encoder}
    side = Side(boxes, home, {home[i] for i in _outputs(graph.forward_nodes) if i in home and i not in kept})
    for i in range(len(boxes)):
        side.slots += [(i, c) for c in made.get(i, ())] or [(i, None)]
    return side


def _backward(graph: GraphReport, crossing: list[Crossing]) -> Side:
    decoders = {d: c for c in crossing for d in c.decoders}
    kept = {p: c for c in crossing if not c.decoders for p in c.placeholders}
    saved = set(_outputs(graph.forward_nodes)) | {p for c in crossing for p in c.placeholders}
    given = {n.name for n in graph.backward_nodes if n.op == "placeholder" and n.shape and n.name not in saved}
    boxes, home = condense(graph.backward_nodes, decoders, kept, given)
    side = Side(boxes, home, {home[i] for i in _outputs(graph.backward_nodes) if i in home})
    seen: set[int] = set()
    for i, box in enumerate(boxes):
        read = {id(c): c for s in box.sources if (c := decoders.get(s) or kept.get(s))}
        side.slots += [(i, c) for key, c in read.items() if key not in seen] or [(i, None)]
        seen.update(read)
    side.slots.reverse()
    return side


def _outputs(nodes: tuple[GraphNode, ...]) -> list[str]:
    return [name for n in nodes if n.op == "output" for name in n.inputs]


def _align(forward: Side, backward: Side) -> None:
    """Gives every row its height: the heaviest run of crossings in the same order on both sides becomes level."""
    where = {id(c): j for j, (_, c) in enumerate(backward.slots) if c is not None}
    begun = [(i, c) for i, (_, c) in enumerate(forward.slots) if c is not None and id(c) in where]
    level = [(i, where[id(c)], CODED if c.encoder else 1) for i, c in begun]
    anchors = [(-1, -1), *_heaviest(level), (len(forward.slots), len(backward.slots))]
    top = float(HEAD)
    for (i, j), (k, m) in zip(anchors, anchors[1:], strict=False):
        rows = max(k - i, m - j) * PITCH
        for side, start, end in ((forward, i, k), (backward, j, m)):
            for slot in range(start + 1, min(end + 1, len(side.slots))):
                side.y.append(top + rows * (slot - start) / (end - start))
        top += rows
    for side in (forward, backward):
        for (box, _), y in zip(side.slots, side.y, strict=True):
            upper = side.extent.get(box, (y - HEIGHT / 2,))[0]
            side.extent[box] = upper, y + HEIGHT / 2


def _heaviest(triples: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Of (first, second, weight), ordered by the first, the heaviest subsequence whose second members increase."""
    best: list[
        tuple[int, int]
    ] = []  # per triple, the weight of the best subsequence that ends there, and what precedes
    for k, (_, second, weight) in enumerate(triples):
        before = max(((best[m][0], m) for m in range(k) if triples[m][1] < second), default=(0, -1))
        best.append((before[0] + weight, before[1]))
    at = max(range(len(best)), key=lambda k: best[k][0], default=-1)
    chain = []
    while at >= 0:
        chain.append(triples[at][:2])
        at = best[at][1]
    return chain[::-1]


def _far_edges(side: Side) -> dict[int, int]:
    """The lane of every box that feeds a box other than its neighbour; no two in a lane overlap."""
    rank = side.rank
    reach: dict[int, list[int]] = {}
    for b in rank:
        for i in side.boxes[b].inputs:
            if abs(rank[b] - rank[i]) > 1:
                reach.setdefault(i, [rank[i]]).append(rank[b])
    lanes: dict[int, int] = {}
    busy: list[list[tuple[int, int]]] = []
    for b, ranks in sorted(reach.items(), key=lambda item: (max(item[1]) - min(item[1]), rank[item[0]])):
        span = min(ranks), max(ranks)
        free = (i for i, taken in enumerate(busy) if all(span[1] < s or e < span[0] for s, e in taken))
        lanes[b] = next(free, len(busy))
        if lanes[b] == len(busy):
            busy.append([])
        busy[lanes[b]].append(span)
    return lanes


def _column(svg: Element, lines: Element, side: Side, x: float, lanes: dict[int, int], out: int, note: str) -> None:
    """Draws the boxes of one side, and their edges: straight to the neighbour, else along a lane on the side `out`."""
    rank = side.rank
    far: dict[int, list[int]] = {b: [] for b in lanes}
    down = -out  # forward reads downwards
    edge = x if out < 0 else x + BOX
    for b, box in enumerate(side.boxes):
        for i in box.inputs:
            if abs(rank[b] - rank[i]) > 1:
                far[i].append(b)
    for b, box in enumerate(side.boxes):
        top, bottom = side.extent[b]
        for i in sorted(box.inputs):
            if abs(rank[b] - rank[i]) == 1:
                start = side.extent[i][1 if down > 0 else 0]
                _arrow(lines, x + BOX / 2, start, x + BOX / 2, top if down > 0 else bottom)
        if b in lanes:
            at = edge + out * LANE * (lanes[b] + 1)
            leave = bottom - 6 if down > 0 else top + 6
            ends = [side.extent[u][0] + 6 if down > 0 else side.extent[u][1] - 6 for u in far[b]]
            for end in ends:
                _arrow(lines, at, end, edge, end)
            last = max(ends) if down > 0 else min(ends)
            SubElement(lines, "path", d=f"M{edge:.1f} {leave:.1f}H{at:.1f}V{last:.1f}")
        kind = "inserted" if box.inserted else "quiet" if box.quiet else ""
        group = _box(svg, x, top, BOX, bottom - top, f"box {kind}", _tooltip(box.nodes))
        shape = f"{clean(box.shape)} {note}" if b in side.returned else clean(box.shape)
        white = "inserted" if box.inserted else ""
        rows = _wrap(clean(box.label), int((BOX - 16) / CHARACTER), len(shape) + 1, int((bottom - top) / 15))
        first = (top + bottom) / 2 + 4 - 7.5 * (len(rows) - 1)
        for line, text in enumerate(rows):
            _text(group, x + 8, first + 15 * line, text, white)
        _text(group, x + BOX - 8, first, cut(shape, 26), f"end {white or 'dim'}")


def _wrap(text: str, width: int, taken: int, lines: int) -> list[str]:
    """The text in up to so many lines, the first of which has `taken` fewer letters."""
    made = [""]
    for word in text.split():
        room = width - (taken if len(made) == 1 else 0)
        if made[-1] and len(made[-1]) + 1 + len(word) > room and len(made) < lines:
            made.append(word)
        else:
            made[-1] = f"{made[-1]} {word}".strip()
    return [cut(line, max(width - (taken if i == 0 else 0), 8)) for i, line in enumerate(made)]


def _crossings(
    svg: Element,
    lines: Element,
    forward: Side,
    backward: Side,
    inner: tuple[float, float],
    nodes: dict[str, GraphNode],
) -> None:
    encode, chip = inner[0] + GUTTER, inner[0] + GUTTER + PILL + GUTTER / 2
    decode = inner[1] - GUTTER - PILL
    ends = {id(c): y for (_, c), y in zip(backward.slots, backward.y, strict=True) if c is not None}
    seeds: dict[str, list[float]] = {}
    for (_, c), y in zip(forward.slots, forward.y, strict=True):
        if c is None:
            continue
        coded = "coded" if c.encoder else ""
        if c.encoder:
            _arrow(lines, inner[0], y, encode, y, "coded")
            _pill(svg, encode, y, [nodes[c.encoder]], c)
            SubElement(lines, "path", {"class": "coded", "d": f"M{encode + PILL:.1f} {y:.1f}H{chip:.1f}"})
            for name in nodes[c.encoder].inputs[1:]:
                seeds.setdefault(name, []).append(y)
        else:
            SubElement(lines, "path", d=f"M{inner[0]:.1f} {y:.1f}H{chip:.1f}")
        _chip(svg, chip, y, c)
        if id(c) in ends:
            end = ends[id(c)]
            target = decode if c.decoders else inner[1]
            bend = chip + CHIP, decode - 4
            half = (bend[0] + bend[1]) / 2
            d = f"M{bend[0]:.1f} {y:.1f}C{half:.1f} {y:.1f} {half:.1f} {end:.1f} {bend[1]:.1f} {end:.1f}"
            SubElement(lines, "path", {"class": coded, "d": d})
            _arrow(lines, bend[1], end, target, end, coded)
            if c.decoders:
                _pill(svg, decode, end, [nodes[d] for d in c.decoders], c)
                _arrow(lines, decode + PILL, end, inner[1], end, "coded")
            sources = c.decoders or c.placeholders[:1]
            home = next(i for i, other in backward.slots if other is c)
            for b, box in enumerate(backward.boxes):
                if b != home and any(s in box.sources for s in sources):  # a later reader, further up
                    low = backward.extent[b][1] - 6
                    x = inner[1] - GUTTER / 2
                    _arrow(lines, x, low, inner[1], low, coded)
                    SubElement(lines, "path", {"class": coded, "d": f"M{x:.1f} {end:.1f}V{low:.1f}"})
    for name, taps in seeds.items():
        if name in forward.home and forward.boxes[forward.home[name]].inserted:
            top, x = forward.extent[forward.home[name]][1] - 6, inner[0] + GUTTER / 2
            SubElement(lines, "path", {"class": "seed", "d": f"M{inner[0]:.1f} {top:.1f}H{x:.1f}V{max(taps):.1f}"})


def _pill(svg: Element, x: float, y: float, same: list[GraphNode], c: Crossing) -> None:
    """One mark for all nodes that do the same to a crossing at one of its ends."""
    bits = c.row.codec.partition("(")[2].partition(" bit")[0] if c.row and "bit" in c.row.codec else ""
    label = f"{short(same[0].op)} {bits} bit" if bits.isdigit() else short(same[0].op)
    group = _box(svg, x, y - HEIGHT / 2, PILL, HEIGHT, "inserted", _tooltip(same), round_=HEIGHT / 2)
    _text(group, x + PILL / 2, y + 4, cut(label, int(PILL / CHARACTER)), "inserted middle")


def _chip(svg: Element, x: float, y: float, c: Crossing) -> None:
    row = c.row
    if row is None:
        return
    kind = "biased" if row.biased else "rounded" if row.biased is not None else "lossless" if c.encoder else "keep"
    about = [f"{row.module or '(model)'} {row.name}", f"{row.op} {'x'.join(row.shape)} {row.dtype}", row.source]
    title = "\n".join([*about, row.codec, f"biased: {biased(row)}", row.reason])
    group = _box(svg, x, y - HEIGHT / 2, CHIP, HEIGHT, kind if c.placeholders else "gone", title)
    sizes = f"{human(row.bytes_before)} \u2192 {human(row.bytes_after)}"
    if not c.placeholders:
        sizes = f"{clean(row.codec)} {sizes}"
    elif not c.encoder and row.bytes_before == row.bytes_after:
        sizes = f"kept {human(row.bytes_after)}"
    room = int((CHIP - 16) / CHARACTER) - len(sizes) - 1
    _text(group, x + 8, y + 4, cut(f"{clean(row.module)} {clean(row.name)}".strip(), max(room, 8)), "")
    _text(group, x + CHIP - 8, y + 4, sizes, "end dim")


def _tooltip(nodes: list[GraphNode]) -> str:
    return "\n".join(f"{n.name} = {n.op}({', '.join(n.inputs)})  {n.shape}".rstrip() for n in nodes)


def _box(
    svg: Element, x: float, y: float, width: float, height: float, kind: str, title: str, round_: float = 4
) -> Element:
    group = SubElement(svg, "g")
    SubElement(group, "title").text = clean(title, keep="\n")
    size = {"x": x, "y": y, "width": width, "height": height, "rx": round_}
    SubElement(group, "rect", {"class": kind.strip(), **{k: f"{v:.1f}" for k, v in size.items()}})
    return group


def _text(parent: Element, x: float, y: float, text: str, kind: str) -> None:
    SubElement(parent, "text", {"class": kind.strip(), "x": f"{x:.1f}", "y": f"{y:.1f}"}).text = text


def _arrow(parent: Element, x0: float, y0: float, x1: float, y1: float, kind: str = "") -> None:
    """A straight level or upright line with a tip."""
    SubElement(parent, "path", {"class": kind, "d": f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"})
    dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
    back = x1 - 6 * dx, y1 - 6 * dy
    corners = ((back[0] + 3 * dy, back[1] + 3 * dx), (back[0] - 3 * dy, back[1] - 3 * dx))
    points = "L".join(f"{x:.1f} {y:.1f}" for x, y in corners)
    SubElement(parent, "path", {"class": f"tip {kind}".strip(), "d": f"M{x1:.1f} {y1:.1f}L{points}Z"})
