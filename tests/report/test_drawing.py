"""The drawing shows every inserted op and every saved activation; the files are well-formed and load nothing."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actcompile
from actcompile.report import EdgeRow, GraphNode, GraphReport, Report, Row
from actcompile.report.condense import condense, crossings, is_quiet, short
from actcompile.report.html import html_page, svg_drawing
from actcompile.report.table import NO_GRAPH
from actcompile.report.text import human
from tests import helpers

OPTIONS = {"inner": "aot_eager", "min_bytes": 512, "replay": 0}
SIZE_CHECK = "aten._assert_scalar.default"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module", params=["static", "dynamic", "gat"])
def report(request: pytest.FixtureRequest) -> Report:
    model = helpers.gnn("gat" if request.param == "gat" else "sage", layers=3 if request.param == "static" else 2)
    return actcompile.explain(model, *helpers.graph(), options=OPTIONS, dynamic=request.param == "dynamic" or None)


def highlighted(svg: ElementTree.Element, want: bool = True) -> list[str]:
    """The tooltip lines of all boxes that stand out, or of all others."""
    lines: list[str] = []
    for group in svg.iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        if rect is not None and ("inserted" in rect.get("class", "").split()) == want:
            lines += group.findtext(f"{SVG}title", "").splitlines()
    return lines


def test_every_inserted_op_stands_out_and_nothing_else(report: Report) -> None:
    svg = ElementTree.fromstring(svg_drawing(report))
    inserted = [n for g in report.graphs for n in (*g.forward_nodes, *g.backward_nodes) if n.inserted]
    assert {short(n.op) for n in inserted} >= {"draw_seed", "quantize", "dequantize", "pack_bits", "unpack_bits"}
    expected = [f"{n.name} = {n.op}({', '.join(n.inputs)})  {n.shape}".rstrip() for n in inserted]
    assert sorted(highlighted(svg)) == sorted(expected)
    others = [line for line in highlighted(svg, want=False) if "actcompile." in line]
    # the model's own, and casts
    own = ("random_mask", "draw_seed", "aggregate", "degree", "edges", "to_mask", "to_bytes")
    assert all(any(name in line for name in own) for line in others)


def test_crossings_join_what_belongs_together(report: Report) -> None:
    for graph in report.graphs:
        made = crossings(graph)
        there = {n.name for n in graph.forward_nodes}  # what fused message passing does without is not
        costly = [r.name for r in graph.rows if (r.bytes_before or r.bytes_after) and r.name in there]
        assert sorted(c.node for c in made) == sorted(costly)
        shapes = {n.name: n.shape for n in graph.backward_nodes}
        forward = {n.name: n for n in graph.forward_nodes}
        for c in made:
            coded = c.row.codec.split("(")[0] not in ("keep", "recompute", "drop", "fused")
            assert bool(c.encoder) == bool(c.decoders) == coded
            assert bool(c.placeholders) == bool(c.row.bytes_after)
            if c.encoder:  # what is decoded has the shape of what was encoded
                assert {shapes[d] for d in c.decoders} == {forward[forward[c.encoder].inputs[0]].shape}
                assert c.placeholders[0].startswith(c.node)  # how rewrite names them


def test_the_drawing_is_small_and_complete(report: Report) -> None:
    for graph in report.graphs:
        made = crossings(graph)
        coders = {c.encoder for c in made}
        boxes, home = condense(graph.forward_nodes, coders, (), {c.node for c in made})
        assert len(boxes) < len(graph.forward_nodes) / 2
        for number, box in enumerate(boxes):
            assert all(i < number for i in box.inputs)  # topological order, so no cycle
        for node in graph.forward_nodes:
            heavy = node.op not in ("placeholder", "output", "get_attr", SIZE_CHECK) and not is_quiet(node.op)
            if heavy and node.name not in coders and "sym" not in node.op and not node.op.startswith("<"):
                assert node.name in home
            for i in node.inputs:  # every dependence of a boxed node on a boxed node is inside a box or an edge
                if node.name in home and i in home:
                    assert home[i] == home[node.name] or home[i] in boxes[home[node.name]].inputs


def test_chips_carry_the_bytes_of_their_rows(report: Report) -> None:
    texts = [t.text or "" for t in ElementTree.fromstring(svg_drawing(report)).iter(f"{SVG}text")]
    for graph in report.graphs:
        for row in graph.rows:
            if row.codec.startswith("quantize"):
                assert f"{human(row.bytes_before)} \u2192 {human(row.bytes_after)}" in texts
        assert f"saved for backward: {human(graph.bytes_before)} \u2192 {human(graph.bytes_after)}" in texts


def test_boxes_of_a_side_do_not_overlap(report: Report) -> None:
    for graph in report.graphs:
        svg = ElementTree.fromstring(svg_drawing(Report((graph,))))
        for drawing in svg.findall(f"{SVG}svg"):
            rects = [rect for rect in drawing.iter(f"{SVG}rect") if rect.get("x") is not None]
            drawn = [[float(rect.get(k, "")) for k in ("x", "y", "width", "height")] for rect in rects]
            for k, (x, y, w, h) in enumerate(drawn):
                for x2, y2, w2, h2 in drawn[k + 1 :]:
                    assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def test_both_files_are_the_same_every_time_and_load_nothing(report: Report) -> None:
    again = Report.from_json(report.to_json())
    assert svg_drawing(again) == svg_drawing(report)
    assert html_page(again) == html_page(report)
    for text in (svg_drawing(report), html_page(report)):
        without_namespace = text.replace("http://www.w3.org/2000/svg", "")
        for loads in ("http:", "https:", "@import", "url(", "src=", "<link"):
            assert loads not in without_namespace


def test_the_page_holds_table_totals_drawing_and_code(report: Report) -> None:
    page = ElementTree.fromstring(html_page(report))
    text = "".join(page.itertext())
    assert f"{human(report.saved_bytes_before)} -> {human(report.saved_bytes_after)}" in text
    shown = [tr for tr in page.iter("tr") if tr.find("td") is not None]
    values = [[int(td.get("data-value", "")) for td in tr if td.get("data-value")] for tr in shown]
    rows = [(r.bytes_before, r.bytes_after) for g in report.graphs for r in g.rows]
    rows += [(r.nbytes, r.held) for g in report.graphs for r in g.edges]
    assert all((value[0], value[1]) in rows for value in values if value)  # none where the peak is told
    assert len(list(page.iter(f"{SVG}svg"))) == 2 * len(report.graphs)  # memory, and graphs
    code = [pre.text for pre in page.iter("pre")]
    assert code == [c.replace("\x1b", " ") for g in report.graphs for c in (g.forward, g.backward)]


def test_a_report_without_graphs() -> None:
    assert NO_GRAPH in "".join(ElementTree.fromstring(html_page(Report(()))).itertext())
    words = " ".join(ElementTree.fromstring(svg_drawing(Report(()))).itertext())
    assert "has not run yet" in words
    empty = Report((GraphReport((), "", "", (), (), "aot_eager"),))
    ElementTree.fromstring(svg_drawing(empty))
    ElementTree.fromstring(html_page(empty))


HOSTILE = ["<script>", "a&b", '"', "'><b>", "]]>", "\x00", "\ud800", "\ufffe", "&lt;"]
TEXT = st.text(max_size=12) | st.sampled_from(HOSTILE)
BYTES = st.integers(0, 10**12)
OPS = ["aten.mm.default", "aten.add.Tensor", "aten.view.default", "actcompile.quantize.default"]


@st.composite
def graphs(draw: st.DrawFn) -> GraphReport:
    """A forward and a backward graph of arbitrary ops, names and edges."""
    ops = st.sampled_from(OPS) | TEXT

    def side(given: list[str]) -> tuple[GraphNode, ...]:
        names = draw(st.lists(TEXT, max_size=8, unique=True))
        nodes = [GraphNode(n, "placeholder", "2", (), False) for n in given if n not in names]
        for name in names:
            inputs = draw(st.lists(st.sampled_from([n.name for n in nodes]), max_size=3, unique=True)) if nodes else []
            op = draw(ops)
            nodes.append(GraphNode(name, op, draw(TEXT), tuple(inputs), op.startswith("actcompile.")))
        returned = tuple(n.name for n in nodes if draw(st.booleans()))
        return (*nodes, GraphNode("output", "output", "", returned, False))

    forward = side(draw(st.lists(TEXT, max_size=3, unique=True)))
    backward = side([*forward[-1].inputs, "tangents_1"])
    rows = []
    for node in forward[:-1]:
        if draw(st.booleans()):
            codec = draw(TEXT | st.sampled_from(["quantize(2 bits, block 8)", "keep", "recompute"]))
            fields = [draw(TEXT) for _ in range(7)]
            biased = draw(st.none() | st.booleans())
            sizes = draw(BYTES), draw(BYTES)
            module, source, op, size, dtype, through, reason = fields
            rows.append(Row(node.name, module, source, op, (size,), dtype, (), *sizes, codec, biased, through, reason))
    edges = draw(
        st.lists(st.builds(EdgeRow, *[TEXT] * 4, st.tuples(TEXT), TEXT, st.booleans(), BYTES, BYTES, TEXT, TEXT))
    )
    counted = {"fused": draw(BYTES), "remembered": draw(BYTES)}
    return GraphReport(
        tuple(rows), draw(TEXT), draw(TEXT), forward, backward, draw(TEXT), edges=tuple(edges), **counted
    )


@settings(max_examples=80)
@given(st.lists(graphs(), min_size=1, max_size=2), st.lists(TEXT, max_size=2))
def test_any_text_in_any_field_of_any_graph(made: list[GraphReport], notes: list[str]) -> None:
    report = Report(tuple(made), tuple(notes))
    svg = ElementTree.fromstring(svg_drawing(report).encode())
    page = ElementTree.fromstring(html_page(report).encode())
    assert len(list(svg.iter(f"{SVG}svg"))) == 1 + len(made)
    assert len(list(page.iter("script"))) == 1  # ours
    allowed = {"html", "head", "meta", "title", "style", "body", "div", "h1", "h2", "p", "span", "ul", "li", "script"}
    allowed |= {"table", "thead", "tbody", "tr", "th", "td", "code", "details", "summary", "pre"}
    allowed |= {f"{SVG}{name}" for name in ("svg", "g", "rect", "text", "title", "path")}
    assert {e.tag for e in page.iter()} <= allowed


def test_a_long_chain_of_layers_is_drawn_in_reasonable_time() -> None:
    nodes = [GraphNode(f"n{i}", "aten.mm.default", "2x2", (f"n{i - 1}",) if i else (), False) for i in range(3000)]
    output = GraphNode("output", "output", "", ("n2999",), False)
    graph = GraphReport((), "", "", (*nodes, output), (), "aot_eager")
    svg = ElementTree.fromstring(svg_drawing(Report((replace(graph, rows=()),))))
    assert len(list(svg.iter(f"{SVG}title"))) == 3000
