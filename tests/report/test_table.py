"""The table says per tensor what became of it; sums and totals are those of the rows; no field can spoil it."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import actcompile
from actcompile.report import EdgeRow, GraphReport, Report, Row
from actcompile.report.table import NO_GRAPH, NO_ROW, fused_by_layer, render, renderable, summed, summed_edges, totals
from actcompile.report.text import clean, human
from tests import helpers

OPTIONS = {"inner": "aot_eager", "min_bytes": 512, "replay": 0}


@pytest.fixture(scope="module")
def report() -> Report:
    return actcompile.explain(helpers.gnn(), *helpers.graph(), options=OPTIONS)


@pytest.fixture(params=[100, 160])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def row(**fields: object) -> Row:
    known = Row("add", "convs.0", "m.py:1 x + y", "aten.add.Tensor", ("4",), "float32", (), 800, 100, "", None, "", "")
    return replace(known, **fields)  # type: ignore[arg-type]


def report_of(*rows: Row) -> Report:
    return Report((GraphReport(rows, "", "", (), (), "aot_eager"),))


def test_every_row_is_shown_or_summed_up_and_the_totals_are_the_sums(report: Report, columns: int) -> None:
    text = render(report)
    assert max(map(len, text.splitlines())) <= columns
    assert "\x1b" not in text
    (graph,) = report.graphs
    shown, sums = summed(graph.rows)
    for r in shown:
        assert re.search(rf"\b{r.name}\b", text)
        assert human(r.bytes_before) in text and human(r.bytes_after) in text
    counted = sum(int(line.split()[0]) for line in sums)
    assert len(shown) + counted == len(graph.rows)
    assert all(line in text for line in sums)
    before, after = sum(r.bytes_before for r in graph.rows), sum(r.bytes_after for r in graph.rows)
    assert 0 < after < before
    assert f"{human(before)} -> {human(after)}, {before / after:.1f} times less" in text


def test_it_names_layer_line_codec_bias_and_reason(report: Report) -> None:
    words = " ".join(render(report).split())
    for expected in ("convs.0", "models.py:", "quantize(", "through", "aten.mul", "pack_bits", "float32", "bool"):
        assert expected in words
    assert any(r.biased is False for r in report.graphs[0].rows)
    assert any(r.biased is True for r in report.graphs[0].rows)


def test_small_ones_are_summed_up_unless_there_is_nothing_else() -> None:
    small = row(codec="keep", bytes_before=8, bytes_after=8, reason="small: under 16384 bytes")
    free = row(bytes_before=0, bytes_after=0, reason="an input, parameter or buffer: alive anyway")
    output = replace(free, reason="the model returns it, or a view of it")
    big = row(codec="quantize(2 bits, block 256)")
    assert summed([big, small, small, free, free, output]) == (
        [big],
        [
            "2 small tensors, 16 B in all: kept (small: under 16384 bytes)",
            "2 inputs and parameters: alive anyway",
            "1 tensor that cost no memory: the model returns it, or a view of it",
        ],
    )
    assert summed([small, small, free]) == ([small, small], ["1 input or parameter: alive anyway"])


def test_small_ones_that_are_gone_are_summed_up_by_what_became_of_them() -> None:
    large = row(bytes_before=90_000, bytes_after=9_000)
    gone = row(bytes_before=800, bytes_after=0, codec="drop", reason="a constant: backward does without it")
    new = row(bytes_before=0, bytes_after=700)
    line = "2 small tensors, 1.60 KB in all: drop (a constant: backward does without it)"
    assert summed([gone, large, gone, new]) == ([large, new], [line])
    assert summed([gone, gone]) == ([gone, gone], [])


def test_what_fused_message_passing_does_without_has_a_line_for_each_layer() -> None:
    first, second, other = (
        row(module=module, name=name, codec="fused", bytes_before=size, bytes_after=0)
        for module, name, size in (("convs.0", "mul", 500), ("convs.0", "exp", 300), ("convs.1", "mul_1", 600))
    )
    kept = row(codec="keep", bytes_before=700, bytes_after=700)
    merged = replace(first, name="mul and 1 more", bytes_before=800)
    assert fused_by_layer([first, kept, second, other]) == [merged, kept, other]


def edge_row(**fields: object) -> EdgeRow:
    known = EdgeRow(
        "addmm", "convs.0", "m.py:1 x", "aten.addmm.default", ("9",), "float32", False, 40_000, 0, "", "why"
    )
    return replace(known, **fields)  # type: ignore[arg-type]


def test_tensors_of_edges_are_shown_largest_first_and_small_ones_summed_up(columns: int) -> None:
    held = edge_row(name="mul", nbytes=90_000, held=5_000, codec="quantize(2 bits)", backward=True)
    small = edge_row(name="sub", nbytes=400, held=400, codec="keep", reason="a list")
    assert summed_edges([edge_row(), held, small, small]) == (
        [held, edge_row()],
        ["2 small tensors with a row for each edge, 800 B in all, 800 B held: a list"],
    )
    graph = GraphReport((row(),), "", "", (), (), "aot_eager", edges=(edge_row(), held, small), fused=3, remembered=70)
    words = " ".join(render(Report((graph,))).split())
    assert "message passing: 3 regions fused 3 tensors with a row for each edge in memory" in words
    assert "the largest of 90.0 KB; 5.40 KB held" in words
    assert "remembered across steps: 70 B" in words
    assert words.index("90.0 KB 5.00 KB") < words.index("40.0 KB - why")
    nothing = render(Report((replace(graph, edges=(), remembered=0),)))
    assert "no tensor with a row for each edge is in memory" in nothing and "remembered" not in nothing
    assert "message passing" not in render(report_of(row()))


def test_it_says_why_nothing_was_gained() -> None:
    kept = row(codec="keep", bytes_before=9000, bytes_after=9000, reason="the model returns it, or a view of it")
    text = render(report_of(kept))
    assert "nothing gained" in text
    assert "the model returns" in " ".join(text.split())
    assert "nothing gained" not in totals(report_of(row()))
    assert NO_ROW in " ".join(render(report_of()).split())
    assert " ".join(render(Report((), ("a note",))).split()) == f"{NO_GRAPH} note: a note"


def test_a_model_that_saves_nothing_of_its_own() -> None:
    text = render(actcompile.explain(nn.Linear(3, 3), torch.randn(2, 3), options=OPTIONS))
    assert "1 input or parameter: alive anyway" in text
    assert "0 B -> 0 B" in text


def test_colours_only_through_rich(report: Report) -> None:
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="standard", width=120).print(report)
    assert "\x1b[32m" in out.getvalue()
    assert "\x1b" not in str(report)


def test_plain_letters_where_the_terminal_knows_no_others(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert render(report).isascii()


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (9994, "9.99 KB"), (9996, "10.0 KB"), (99_960, "100 KB")]
    + [(999_499, "999 KB"), (999_500, "1.00 MB"), (16_396_096, "16.4 MB"), (1_388_000_000, "1,388 MB")],
)
def test_bytes_for_people(nbytes: int, text: str) -> None:
    assert human(nbytes) == text


HOSTILE = ["[bold]x[/bold]", "[/]", "\x1b[31m", "\ud800", "a\nb", "x" * 300, "\\["]
FIELDS = st.text(max_size=20) | st.sampled_from(HOSTILE)


@settings(max_examples=40)  # each prints a table
@given(st.lists(FIELDS, min_size=8, max_size=8), st.booleans(), st.booleans())
def test_any_text_in_any_field(texts: list[str], free: bool, roomy: bool) -> None:
    keys = ("name", "module", "source", "dtype", "codec", "through", "reason")
    fields = dict(zip(keys, texts, strict=False), shape=(texts[-1],), biased=True)
    made = report_of(row(**fields, bytes_before=0 if free else 7000, bytes_after=0 if free else 300))
    out = io.StringIO()
    Console(file=out, width=160, color_system=None).print(renderable(made, roomy=roomy))
    text = out.getvalue()
    assert all(c.isprintable() or c == "\n" for c in text)
    assert ("7.00 KB" in text) == (not free)
    assert f"{human(made.saved_bytes_before)} -> {human(made.saved_bytes_after)}" in text
    letters = "".join(text.split())
    if free:
        assert "".join(clean(texts[6]).split()) in letters
    elif roomy and len(texts[0]) + len(texts[1]) < 20:
        assert all(word in letters for word in clean(texts[0]).split())
