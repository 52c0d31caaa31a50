"""Saved plans as files: every codec and format comes back, what is wrong is named, and nothing in them is code."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actcompile import Config, SavedPlan, bits, cast, keep, lossless, low_rank, prune, sample_rows
from actcompile.config import PRESETS
from actcompile.kernels import BlockFormat
from actcompile.passes.codecs.codecs import Cast, Copy, Keep, LowRank, PackBits, Prune, Quantize, SampleRows
from actcompile.passes.plan.pins import DTYPES, Pin, PinnedGraph, codec_of, way_of
from tests.strategies import formats

COUNTS = st.integers(1, 1000)
CODECS = st.one_of(
    st.builds(Quantize, formats(), st.integers(0, 64), st.booleans()),
    st.builds(Cast, st.sampled_from([torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])),
    *(st.builds(kind, COUNTS) for kind in (Prune, LowRank, SampleRows)),
    st.just(Keep()),
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
PINS = st.builds(
    Pin, NAMES, st.sampled_from(sorted(DTYPES)), st.integers(1, 4), CODECS.map(way_of), st.integers(0), st.integers(0)
)
GRAPHS = st.builds(
    PinnedGraph,
    st.booleans(),
    st.lists(st.sampled_from(["64x32", "64", "scalar"])).map(tuple),
    st.lists(PINS, unique_by=lambda pin: pin.key, max_size=4).map(tuple),
)
RULES = st.sampled_from([keep(), lossless(), bits(8), prune(4), low_rank(2), sample_rows(8), cast("bfloat16")])
CONFIGS = st.builds(
    lambda preset, rules, block: Config.make(preset=preset, rules=rules, block=block),
    st.sampled_from(sorted(PRESETS)),
    st.dictionaries(NAMES, RULES, max_size=3),
    st.integers(8, 512),
)
PLANS = st.builds(
    lambda config, graphs: SavedPlan(config.settings, tuple(graphs)), CONFIGS, st.lists(GRAPHS, max_size=3)
)

PIN = Pin("convs.0/add", "float32", 2, way_of(Cast(torch.bfloat16)), 0, 8)
PLAN = SavedPlan(Config(rules={"head": bits(8)}).settings, (PinnedGraph(True, ("64x32",), (PIN,)),))


@given(PLANS)
def test_a_plan_comes_back_from_its_file_with_a_config_that_holds(tmp_path_factory, plan):
    path = tmp_path_factory.getbasetemp() / "drawn.json"
    plan.save(path)
    loaded, text = SavedPlan.load(path), path.read_text()
    assert loaded == plan and hash(loaded) == hash(plan) and not loaded.difference(plan)
    assert Config(plan=path).settings == plan.settings
    loaded.save(path)
    assert path.read_text() == text


@given(CODECS)
def test_a_codec_comes_back_from_its_way(codec):
    assert codec_of(way_of(codec)) == codec


def test_what_is_exact_is_kept():
    assert codec_of(way_of(PackBits(16))) == codec_of(way_of(Copy())) == Keep()


def wrong(**changes):
    """The plan's JSON with changes, of the first activation where the names are its fields or its codec's."""
    data = json.loads(json.dumps(_data()))
    (pin,) = data["graphs"][0]["pins"]
    for name, value in changes.items():
        place = next((p for p in (data, data["graphs"][0], pin) if name in p), pin["way"])
        place[name] = value
    return data


def _data():
    (graph,) = PLAN.graphs
    pin = {"key": PIN.key, "dtype": "float32", "dims": 2, "way": dict(PIN.way), "averaged_over": 0, "nbytes": 8}
    graphs = [{"training": True, "parameters": list(graph.parameters), "pins": [pin]}]
    settings = dict(PLAN.settings)
    return {"format": "actcompile plan", "version": 1, "settings": settings, "graphs": graphs}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "another"}, "is no saved plan"),
        ({"version": 2}, "plan of version 2, and this actcompile reads version 1: make a new plan"),
        ({"version": "1"}, "plan of version '1'"),
        ({"settings": []}, "plan: settings must be of type dict"),
        ({"graphs": {}}, "plan: graphs must be of type list"),
        ({"key": 3}, r"graphs\[0\].pins\[0\]: key must be of type str, got 3"),
        ({"parameters": [3]}, r"graphs\[0\]: parameters must be texts"),
        ({"dims": True}, "dims must be of type int"),
        ({"nbytes": 1.5}, "nbytes must be of type int"),
        ({"way": {}}, "codec must be one of keep, quantize"),
        ({"codec": "exec"}, "codec must be one of keep, quantize"),
        ({"dtype": 4}, "dtype must be of type str"),
        ({"way": {"codec": "cast"}}, "'dtype' is missing"),
        ({"way": {"codec": "cast", "dtype": "os.system"}}, "'dtype' must be of type dtype, got 'os.system'"),
        ({"way": {"codec": "keep", "bits": 2}}, "'bits' is no field of keep"),
        ({"way": {"codec": "prune", "kept": True}}, "'kept' must be of type int, got True"),
        ({"way": {**dict(way_of(Quantize(BlockFormat()))), "bits": 3}}, "bits must be one of"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_place(tmp_path, changes, message):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(wrong(**changes)))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        SavedPlan.load(path)


def test_what_is_no_json_or_no_file_is_an_error(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="plan.json is no saved plan: "):
        SavedPlan.load(tmp_path / "plan.json")
    with pytest.raises(OSError, match="none.json"):
        Config(plan=str(tmp_path / "none.json"))


def test_an_activation_that_is_named_twice_is_an_error(tmp_path):
    replace(PLAN, graphs=(PinnedGraph(True, (), (PIN, PIN)),)).save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="has convs.0/add twice"):
        SavedPlan.load(tmp_path / "plan.json")


def test_a_difference_shows_ways_bytes_and_settings():
    other = replace(
        PLAN,
        settings=Config(bits=4, rules={"head": bits(8)}).settings,
        graphs=(PinnedGraph(True, (), (replace(PIN, way=way_of(Keep()), nbytes=16), replace(PIN, key="new/mul"))),),
    )
    found = PLAN.difference(other)
    text = str(found)
    assert found and [row[1] for row in found.rows] == ["convs.0/add", "new/mul"]
    assert re.search(r"0 +convs.0/add +cast\(bfloat16\) +8 B +keep +16 B", text)
    assert re.search(r"0 +new/mul +- +- +cast\(bfloat16\) +8 B", text)
    assert "bits: 'auto' here, 4 there" in text and "2 activations kept otherwise; 8 B here, 24 B there" in text
    assert "0 activations kept otherwise" in str(PLAN.difference(PLAN)) and not PLAN.difference(PLAN)


def test_a_plan_decides_and_what_contradicts_it_is_an_error():
    config = Config(plan=replace(PLAN, settings=Config(bits=4, replay=0).settings))
    assert config.bits == 4 and config.replay == 0 and config.inner == "inductor"
    assert Config.make(config, plan=None, bits=2).bits == 2
    assert Config(plan=config.plan, bits=4, inner="aot_eager").inner == "aot_eager"
    for name, value in (("bits", 8), ("rules", {"a": keep()}), ("method", prune(4)), ("fuse", False)):
        with pytest.raises(ValueError, match=f"^{name}: .* the plan was made with .* leave {name} out"):
            Config(plan=config.plan, **{name: value})
    with pytest.raises(ValueError, match="^bits: 2 was asked for"):
        Config.make(plan=config.plan, bits=2)
    for name, value in (("budget", "1GiB"), ("max_gradient_error", 0.1), ("fitted", (("a", "0,1,2,3"),))):
        with pytest.raises(ValueError, match=f"^{name}: a plan decides instead"):
            Config(plan=PLAN, **{name: value})
    with pytest.raises(TypeError, match="^plan must be None, a SavedPlan or the path of one, got 3"):
        Config(plan=3)


def test_wrong_settings_in_a_plan_are_errors():
    with pytest.raises(ValueError, match="knows no setting 'tiles'"):
        Config(plan=replace(PLAN, settings=(("tiles", 3),)))
    with pytest.raises(ValueError, match="^bits must be one of"):
        Config(plan=replace(PLAN, settings=(("bits", 3),)))
    with pytest.raises(ValueError, match="^plan: rules must be pairs"):
        Config(plan=replace(PLAN, settings=(("rules", 3),)))
    with pytest.raises(ValueError, match="there is no rule 'eval'"):
        Config(plan=replace(PLAN, settings=(("rules", (("*", ("eval", "1")),)),)))
