"""The papers' methods as presets, and other codecs for the same bytes: what the plan becomes, and that it trains."""

import pytest
import torch

import actcompile
from actcompile import Config, cast, exact, iexact, low_rank, prune, sample_rows
from actcompile.config import PRESETS
from tests.helpers import FAST, SAVED, assert_close, gnn, graph, step

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def rows(config, model=None):
    model = model or gnn(layers=3, dropout=0.0)
    report = actcompile.explain(model, *graph(nodes=256, edges=1024), config=config)
    return [row for g in report.graphs for row in g.rows if row.codec != "keep"]


def made_of_rows(row):
    return row.codec.startswith("quantize") and len(row.shape) == 2 and row.shape[1] != "1"


def small(config):
    return Config.make(config, inner="aot_eager", min_bytes=512)  # not the statistics of BatchNorm


def distance(ours, reference):
    """Of all gradients together, relative to their norm: some are zero but for float32's rounding."""
    a, b = (torch.cat([t.flatten() for t in tensors]) for tensors in (ours, reference))
    return float((a - b).norm() / b.norm())


def test_presets_have_names():
    assert Config.make(preset="default") == Config()
    assert Config.make(preset="exact") == exact()
    assert Config.make(preset="iexact-64-vm", bits=4) == Config.make(iexact(64, "variance-minimising"), bits=4)
    assert all(isinstance(make(), Config) for make in PRESETS.values())


def test_a_wrong_preset_is_named():
    with pytest.raises(ValueError, match="preset must be one of default, smallest, exact, iexact-2"):
        actcompile.compress(gnn(), preset="exacct")
    with pytest.raises(TypeError, match="config or preset, not both"):
        actcompile.compress(gnn(), exact(), preset="exact")


@pytest.mark.parametrize("wrong", [1, 0, True, "8"])
def test_wrong_fields_are_named(wrong):
    with pytest.raises(ValueError, match="projection must be None or an integer of at least 2"):
        Config(projection=wrong)
    with pytest.raises(ValueError, match="prune\\(ratio\\): ratio must be an integer of at least 2"):
        prune(wrong)
    with pytest.raises(TypeError, match="method must be None, prune"):
        Config(method=actcompile.keep())
    with pytest.raises(ValueError, match="cast\\(dtype\\): dtype must be one of 'bfloat16'"):
        cast("int8")


def test_exact_projects_what_is_used_linearly_and_nothing_else():
    made = rows(small(exact()))
    floats = [row for row in made if made_of_rows(row)]
    assert all("2 bits" in row.codec and "minimal" not in row.codec for row in floats)
    assert {("projected" in row.codec, row.biased) for row in floats} == {(True, False), (False, True)}
    assert {row.codec for row in floats if row.biased} == {"quantize(2 bits, block 32)"}  # BatchNorm's input, by row
    assert {row.codec for row in made if row.dtype == "bool"} == {"pack_bits"}


@pytest.mark.parametrize("group", [2, 8, 64])
def test_iexact_has_blocks_of_several_projected_rows(group):
    codecs = {row.codec for row in rows(small(iexact(group))) if made_of_rows(row)}
    assert codecs == {
        f"quantize(projected to 2, 2 bits, block {2 * group})",  # of the 16 features
        f"quantize(projected to 4, 2 bits, block {4 * group})",
        f"quantize(2 bits, block {32 * min(group, 1024 // 32)})",
    }


def test_blocks_of_several_rows_save_metadata_only():
    by_group = [sum(r.bytes_after for r in rows(small(iexact(g)))) for g in (1, 2, 4, 8)]
    steps = [a - b for a, b in zip(by_group, by_group[1:], strict=False)]
    assert steps == sorted(steps, reverse=True) and steps[0] == pytest.approx(2 * steps[1], rel=0.02)


@pytest.mark.parametrize("preset", ["exact", "iexact-8", "iexact-64-vm"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_preset_trains(preset, dynamic):
    model, inputs = gnn(layers=3, hidden=64, dropout=0.0), graph(nodes=256, edges=1024)
    reference = step(model, inputs, model.parameters())
    ours = actcompile.compress(gnn(layers=3, hidden=64, dropout=0.0), preset=preset, dynamic=dynamic, **FAST)
    got = step(ours, inputs, ours.parameters())
    assert_close(got[:1], reference[:1], within=1e-5)  # forward is exact
    assert distance(got[1:], reference[1:]) < 8  # a projection to an eighth has a large variance, but no bias
    again = step(ours, inputs, ours.parameters())
    assert distance(got[1:], again[1:]) < 1e-5, "a seed reproduces a step, up to the order of additions"
    other = step(ours, inputs, ours.parameters(), seed=1)
    assert distance(got[1:], other[1:]) > 1e-2


METHODS = {
    "prune(4)": (prune(4), 1.0),
    "low_rank(4)": (low_rank(4), 1.0),
    "sample_rows(4)": (sample_rows(4), 3.0),
    "cast(bfloat16)": (cast("bfloat16"), 0.02),
    "cast(float8_e4m3fn)": (cast("float8_e4m3fn"), 0.2),
    "cast(float8_e5m2)": (cast("float8_e5m2"), 0.4),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_method_trains(name, dynamic):
    method, within = METHODS[name]
    inputs = graph(nodes=256, edges=1024)
    reference = step(model := gnn(dropout=0.0), inputs, model.parameters())
    ours = actcompile.compress(gnn(dropout=0.0), method=method, dynamic=dynamic, **SAVED)
    got = step(ours, inputs, ours.parameters())
    assert_close(got[:1], reference[:1], within=1e-5)
    assert distance(got[1:], reference[1:]) < within
    kept = [row for g in actcompile.explain(ours).graphs for row in g.rows if row.codec.startswith(method.name)]
    assert kept
    assert all(row.bytes_after < row.bytes_before for row in kept if row.bytes_before)
    assert all(row.biased == (method.name != "sample_rows") for row in kept)


def test_a_method_for_one_module():
    made = rows(Config(rules={"convs.1": sample_rows(4)}, **FAST))
    assert {row.module.startswith("convs.1") for row in made if row.codec.startswith("sample_rows")} == {True}
    assert any(row.codec.startswith("quantize") for row in made if not row.module.startswith("convs.1"))
