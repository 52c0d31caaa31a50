"""Live bytes over a step: sums of what is alive, the same after JSON and at other sizes, and drawn as they are."""

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

import actcompile
from actcompile.report import GraphReport, Report
from actcompile.report.data import KINDS, Memory, MemoryRow
from actcompile.report.html import html_page, svg_drawing
from actcompile.report.memory import BARS, LAYERS, ROWS, at_peak, bars, columns
from actcompile.report.table import render
from tests import helpers

POSITIONS = 12


@st.composite
def rows(draw: st.DrawFn) -> MemoryRow:
    first = draw(st.integers(0, POSITIONS - 1))
    last = draw(st.integers(first, POSITIONS - 1))
    module, kind = draw(st.sampled_from([f"l{i}" for i in range(12)])), draw(st.sampled_from(KINDS))
    return MemoryRow("a", module, ("2",), "float32", kind, draw(st.integers(0, 10**9)), first, last, False)


MEMORIES = st.lists(rows(), max_size=20).map(lambda made: Memory(tuple(made), 5, POSITIONS - 5))


@given(MEMORIES)
def test_live_bytes_are_the_sums_of_what_is_alive(memory: Memory) -> None:
    live = memory.live()
    assert live == tuple(sum(r.nbytes for r in memory.rows if r.first <= i <= r.last) for i in range(POSITIONS))
    assert [sum(parts) for parts in zip(*map(memory.live, KINDS), strict=True)] == list(live)
    assert sum(r.nbytes for r in memory.at_peak()) == memory.peak == max(live)


@given(MEMORIES, MEMORIES, st.integers(5, 60))
def test_bars_are_as_high_as_what_is_alive(memory: Memory, other: Memory, width: int) -> None:
    most = columns(memory.live(), width)
    assert len(most) == width and max(most) == memory.peak
    top = max(memory.peak, other.peak)
    lines = bars(memory, width, top)
    heights = [sum(BARS.index(line[i]) for line in lines) for i in range(width)]
    for height, nbytes in zip(heights, most, strict=True):
        assert abs(height - ROWS * 8 * nbytes / max(top, 1)) <= 1
        assert (height > 0) == (nbytes > 0)


@given(MEMORIES, MEMORIES)
def test_every_view_takes_any_memory(before: Memory, after: Memory) -> None:
    report = Report((GraphReport((), "", "", (), (), "aot_eager", memory_before=before, memory_after=after),))
    assert Report.from_json(report.to_json()) == report
    heads, cells = at_peak(report.graphs[0])
    assert len(cells) <= LAYERS + 1 and all(len(row) == len(heads) for row in cells)
    text = render(report)
    assert ("live bytes" in text) == bool(before.peak or after.peak)
    for page in (svg_drawing(report), html_page(report)):
        ElementTree.fromstring(page)


def test_a_model_s_memory_by_kind() -> None:
    model, inputs = helpers.gnn("sage"), helpers.graph(64, 700)
    (graph,) = actcompile.explain(model, *inputs, options=helpers.FAST).graphs
    before, after = graph.memory_before, graph.memory_after
    assert {r.kind for r in before.rows} == {"edges", "nodes", "other"}
    assert {r.kind for r in after.rows} == set(KINDS) - {"edges"}
    assert sum(r.nbytes for r in after.rows if r.held) <= graph.bytes_after + 4096  # seeds, and what is returned
    assert max(before.live("edges")) >= 700 * 32 * 4 > max(after.live("edges"))
    assert after.peak < before.peak
    assert all(r.shape[0] == "64" for r in after.rows if r.kind == "nodes" and len(r.shape) == 2 and "64" in r.shape)


def test_memory_is_that_of_the_last_run() -> None:
    model = actcompile.compress(helpers.gnn("sage"), dynamic=True, **helpers.FAST)
    peaks = []
    for nodes in (64, 128, 256):
        helpers.step(model, helpers.graph(nodes, 4 * nodes), model.parameters())
        (graph,) = actcompile.explain(model).graphs
        peaks.append(graph.memory_before.peak)
    assert peaks[0] < peaks[1] < peaks[2]
