"""`bits="auto"`: four bits where what is saved hardly adds to a step's peak, two where it makes it."""

import pytest
import torch

import actcompile
from actcompile import Config
from actcompile.pipeline import ROOM
from tests.helpers import build, graph

META = [t.to("meta") for t in graph(nodes=20_000, edges=140_000, features=128)]


def report(layers: int, **options: object) -> actcompile.report.Report:
    torch._dynamo.reset()
    model = build("sage", 128, 40, hidden=256, layers=layers, dropout=0.5).to("meta")
    return actcompile.explain(model, *META, options={"inner": "aot_eager", **options})


def bits(made: actcompile.report.Report) -> set[str]:
    codecs = [row.codec for graph in made.graphs for row in graph.rows]
    return {codec.split("(")[1].split(",")[0] for codec in codecs if codec.startswith("quantize")}


@pytest.mark.parametrize("layers", [2, 3, 6, 12])
def test_more_bits_take_no_more_than_their_share_of_the_peak(layers: int) -> None:
    auto, two, four = (report(layers, replay=0, **options) for options in ({}, {"bits": 2}, {"bits": 4}))
    peaks = [made.graphs[0].memory_after.peak for made in (auto, two, four)]
    if bits(auto) == {"4 bits"}:
        assert auto.saved_bytes_after - two.saved_bytes_after <= ROOM * peaks[0]
        assert peaks[0] <= (1 + ROOM) * peaks[1]
    else:
        assert bits(auto) == {"2 bits"} and four.saved_bytes_after - two.saved_bytes_after > ROOM * peaks[1]
        assert (auto.saved_bytes_after, peaks[0]) == (two.saved_bytes_after, peaks[1])


def test_the_report_says_what_decided() -> None:
    shallow, deep = report(3), report(12)
    assert bits(shallow) == {"4 bits"} and "floats have 4 bits, which take" in str(shallow)
    assert bits(deep) == {"2 bits"} and "floats have 2 bits: 4 would take" in str(deep)
    assert not report(3, bits=4).graphs[0].precision and not report(3, budget=0.9).graphs[0].precision


def test_levels_are_fitted_for_all_bits_that_may_be_chosen() -> None:
    model, inputs = build("sage", 16, 4, layers=3), graph()
    config = actcompile.calibrate(model, *inputs, steps=1, inner="aot_eager", min_bytes=0, replay=0)
    for bits in (2, 4):
        made = actcompile.explain(model, *inputs, config=Config.make(config, bits=bits))
        rounded = [row.codec for g in made.graphs for row in g.rows if row.codec.startswith("quantize")]
        assert rounded and all("fitted" in codec for codec in rounded)
