"""Saved plans are taken exactly, at other sizes and in other processes, or refused in words; never by chance."""

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import graph_break
from torch_geometric.data import Data
from torch_geometric.nn import GATv2Conv, SAGEConv

import actcompile
from actcompile import Config, compress, explain
from actcompile.backend import Partitioner
from bench.sampling import neighbor_loader
from tests.helpers import FAST, assert_equal, gnn, graph, quickly, step

OPTIONS = {**FAST, "replay": 0}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Net(nn.Module):
    """A norm whose bias is averaged, GELUs that are biased element by element, products that are not."""

    def __init__(self, width=32, name="second", twice=False, broken=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.twice, self.broken = SAGEConv(16, width), nn.BatchNorm1d(width), twice, broken
        self.add_module(name, GATv2Conv(width, 8, heads=2))
        self.name, self.head = name, nn.Linear(16, 4)

    def forward(self, x, edge_index):
        x = F.gelu(self.norm(self.first(x, edge_index)))
        if self.broken:
            graph_break()
        x = F.gelu(getattr(self, self.name)(x, edge_index))
        return self.head(F.gelu(x) if self.twice else x)


torch.manual_seed(0)
INPUTS = graph(nodes=1500, edges=6000)


def plan_of(model, **options):
    return explain(model, *INPUTS, options={**OPTIONS, **options}).plan()


@functools.cache
def default():
    """The plan of the rules in 2 bits, with which several tests begin."""
    return plan_of(Net(), bits=2)


def pinned(model, plan, inputs=INPUTS, dynamic=None):
    return explain(model, *inputs, dynamic=dynamic, options={"inner": "aot_eager", "plan": plan})


def edited(plan, key, **fields):
    """The plan with other fields of one activation's codec."""

    def pin(p):
        return replace(p, way=tuple({**dict(p.way), **fields}.items())) if p.key == key else p

    return replace(plan, graphs=tuple(replace(g, pins=tuple(map(pin, g.pins))) for g in plan.graphs))


def keys(plan):
    return [pin.key for graph in plan.graphs for pin in graph.pins]


MODELS = ["net", "sage_max", "gat", "pna"]


@pytest.mark.parametrize("bounds", [{}, {"max_gradient_error": 0.1}], ids=["rules", "planned"])
@pytest.mark.parametrize("name", quickly(MODELS, slow=("gat", "pna")))
def test_a_pinned_plan_is_taken_as_it_is_without_planning(name, bounds, monkeypatch):
    def make():
        return Net() if name == "net" else gnn(name)

    free = explain(make(), *INPUTS, options={**OPTIONS, **bounds})
    plan = free.plan()
    monkeypatch.setattr(sys.modules["actcompile.pipeline"], "fit", None)
    found = pinned(make(), plan)
    assert found.plan() == plan and found.saved_bytes_after == free.saved_bytes_after
    assert [(r.key, r.codec, r.bytes_after) for r in found.graphs[0].rows] == [
        (r.key, r.codec, r.bytes_after) for r in free.graphs[0].rows
    ]
    assert all(dict(pin.way)["codec"] != "keep" for pin in plan.graphs[0].pins) or bounds


def test_gradients_are_those_of_the_rules_where_the_plan_is_theirs(tmp_path, one_thread):
    model = Net()
    compress(model, **OPTIONS)
    ours = step(model, INPUTS, model.parameters())
    plan = explain(model).plan()  # of the run, without inputs
    plan.save(tmp_path / "plan.json")
    torch._dynamo.reset()
    again = compress(Net(), plan=tmp_path / "plan.json", inner="aot_eager")
    assert_equal(step(again, INPUTS, again.parameters()), ours)
    assert explain(again).plan() == plan
    assert actcompile.estimate(Net(), *INPUTS, config=Config(plan=plan, inner="aot_eager")).saved_after > 0


OTHERS = [(5000, 9000, True), (1100, 20000, False), (5000, 9000, False), (1100, 20000, True)]


@pytest.mark.parametrize(("nodes", "edges", "dynamic"), quickly(OTHERS, slow=OTHERS[2:]))
def test_other_sizes_take_the_same_ways(nodes, edges, dynamic):
    plan = default()
    found = pinned(Net(), plan, graph(nodes=nodes, edges=edges), dynamic).plan()
    assert not found.difference(plan) and found.nbytes != plan.nbytes
    assert keys(found) == keys(plan)


@pytest.mark.parametrize("decided", [{"bits": 4}, {"bits": 2}, {"replay": 0.4}, {"replay": 0}], ids=str)
def test_what_a_peak_decided_where_the_plan_was_made_holds(decided):
    """Also where the same graph, of other sizes perhaps, would decide otherwise."""
    plan = replace(plan_of(Net(), **{"replay": "auto", **decided}), settings=Config(**FAST).settings)
    assert pinned(Net(), plan).plan().graphs == plan.graphs


def test_fewer_elements_to_average_over_take_more_bits_and_small_tensors_none():
    plan = default()
    (bn,) = [key for key in keys(plan) if key.startswith("first/")]
    (row,) = [r for r in pinned(Net(), plan, graph(nodes=300, edges=900)).graphs[0].rows if r.key == bn]
    assert row.codec.startswith("quantize(4 bits") and "more than the 2 bits that are pinned" in row.reason
    plan = plan_of(Net(), min_bytes=16384)
    assert pinned(Net(), plan, graph(nodes=40, edges=90)).saved_bytes_after > 0


def test_sampled_batches_of_changing_sizes(tmp_path):
    """Two compilations, and so two graphs that have the same activations: of their ways those of the last one count."""
    model = compress(Net(), **OPTIONS, max_gradient_error=0.2)
    x, edge_index = graph(nodes=3000, edges=12000)
    loader = neighbor_loader(Data(x=x, edge_index=edge_index), [5, 5], batch_size=400)
    batches = [(b.x, b.edge_index) for b in loader][:4]
    for batch in batches:
        model(*batch).sum().backward()
    last = explain(model).graphs[-1]
    (plan := explain(model).plan()).save(tmp_path / "plan.json")
    torch._dynamo.reset()
    again = compress(Net(), plan=tmp_path / "plan.json", inner="aot_eager")
    for batch in batches:
        again(*batch).sum().backward()
    assert explain(again).plan() == plan and explain(again).graphs[-1].bytes_after == last.bytes_after


def test_graphs_of_a_model_with_breaks_have_their_own_activations():
    plan = plan_of(Net(broken=True), max_gradient_error=0.05)
    assert len(plan.graphs) == 2
    turned = replace(plan, graphs=plan.graphs[::-1])
    assert pinned(Net(broken=True), turned).plan() == plan
    with pytest.raises(Exception, match="plan: the model saves .*, which the plan does not have"):
        pinned(Net(broken=True), replace(plan, graphs=plan.graphs[:1]))


def test_eval_mode_is_exact_and_needs_no_plan_unless_it_trains():
    plan = default()
    (eval_graph,) = pinned(Net().eval(), plan).graphs
    assert not any(row.way or row.biased is not None for row in eval_graph.rows)
    always = plan_of(Net(), when="always")
    with pytest.raises(Exception, match="no graph of a model in eval mode"):
        pinned(Net().eval(), always)
    mode = plan_of(Net().eval(), when="always")
    assert pinned(Net().eval(), mode).plan() == mode


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "which the (plan|model) does not have"),
        ({"name": "renamed"}, "the model saves renamed/.*the plan has second/.*, which the model does not have"),
        ({"width": 64}, "the plan's parameters are others: one of 32x16 where the model has 64x16"),
        ({"twice": True}, "the model saves .*which the plan does not have"),
        ({"broken": True}, "which the plan does not have|parameters are others"),
    ],
)
def test_another_model_is_refused_with_what_differs_and_the_remedy(changed, message):
    plan = default() if changed else plan_of(Net(twice=True))
    with pytest.raises(Exception, match=f"plan: .*{message}") as error:
        pinned(Net(**changed), plan)
    assert "Make a new one: explain(model, *inputs, dynamic=...).plan()" in str(error.value)


def test_another_dtype_is_refused():
    plan = default()
    with pytest.raises(Exception, match="is float64 of 2 dimensions in the model and float32 of 2 in the plan"):
        pinned(Net().double(), plan, (INPUTS[0].double(), INPUTS[1]))


def test_an_edited_plan_never_rounds_more_than_is_proved():
    plan = default()
    ways = {pin.key: dict(pin.way) for pin in plan.graphs[0].pins}
    eights = [key for key, way in ways.items() if way.get("bits") == 8]
    linear = next(k for k, w in ways.items() if w.get("bits") == 2)
    with pytest.raises(Exception, match=r"must not be quantize\(4 bits.*may be quantize\(8 bits.*element by element"):
        pinned(Net(), edited(plan, eights[0], bits=4, words=8, block=64))
    with pytest.raises(Exception, match="must not be quantize"):
        pinned(Net(), edited(plan, linear, columns=4))
    with pytest.raises(Exception, match="must not be prune"):
        pin = {"codec": "prune", "kept": 2}
        (graph_,) = plan.graphs
        pins = tuple(replace(p, way=tuple(pin.items())) if p.key == linear else p for p in graph_.pins)
        pinned(Net(), replace(plan, graphs=(replace(graph_, pins=pins),)))
    finer = pinned(Net(), edited(plan, linear, bits=1, words=2, block=64))  # unbiased in any number of bits
    assert any(r.key == linear and r.codec.startswith("quantize(1 bits") for r in finer.graphs[0].rows)


class Quotient(nn.Module):
    """A quotient, steep where what it is divided by is near zero."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.above, self.below, self.head = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x, edge_index):
        return self.head(F.gelu(self.above(x)) / self.below(x).abs())


def test_an_edited_plan_casts_to_nothing_coarser():
    plan = plan_of(Quotient())
    cast = next(pin.key for pin in plan.graphs[0].pins if dict(pin.way)["codec"] == "cast")
    with pytest.raises(Exception, match=r"must not be cast\(float8_e5m2\); it may be cast\(bfloat16\)"):
        pinned(Quotient(), edited(plan, cast, dtype="float8_e5m2"))


def test_an_edited_plan_rounds_nothing_that_is_kept():
    report = explain(Net(), *INPUTS, options={**OPTIONS, "rules": {"norm": actcompile.keep()}})
    plan = report.plan()
    (graph_,) = plan.graphs
    kept = next(
        r for r in report.graphs[0].rows if r.codec == "keep" and r.key not in keys(plan) and r.bytes_after > 1e4
    )
    added = replace(graph_.pins[0], key=kept.key, dtype=kept.dtype, dims=len(kept.shape))
    with pytest.raises(Exception, match=f"the plan rounds {re.escape(kept.key)}, which must be kept exact: "):
        pinned(Net(), replace(plan, graphs=(replace(graph_, pins=(*graph_.pins, added)),)))


METHODS = [actcompile.sample_rows(4), actcompile.low_rank(4), actcompile.cast("float8_e4m3fn")]


@pytest.mark.parametrize("method", quickly(METHODS, slow=METHODS[1:]), ids=str)
def test_methods_of_other_codecs_are_pinned_too(method):
    plan = plan_of(Net(), method=method)
    assert pinned(Net(), plan).plan() == plan
    assert Config(plan=plan).method == method


SCRIPT = """
import sys, torch
from tests.passes.plan.test_pins import Net, plan_of, pinned
plan = plan_of(Net(), max_gradient_error=0.1)
plan.save(sys.argv[1])
if len(sys.argv) > 2:
    print(pinned(Net(), sys.argv[2]).plan().difference(plan))
"""


def test_processes_of_other_hash_seeds_agree(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for seed, arguments in (("1", paths[:1]), ("2", paths[::-1])):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "0 activations kept otherwise" in done.stdout
    texts = [Path(path).read_text() for path in paths]
    assert texts[0] == texts[1] and json.loads(texts[0])["version"] == 1


def test_the_plan_is_part_of_what_names_a_graph_in_caches():
    plan = default()
    other = replace(plan, graphs=())
    names = [Partitioner(Config(plan=p)).uuid() for p in (None, plan, other)]
    assert len(set(names)) == 3 and Partitioner(Config(plan=plan)).uuid() == names[1]


def test_no_plan_without_a_graph():
    with pytest.raises(ValueError, match="no graph was compiled with a backward pass"):
        explain(Net()).plan()


def test_levels_and_noise_are_found_at_sizes_that_change():
    """Their keys are those of plans: names of nodes are others where sizes are symbols."""
    fitted = actcompile.calibrate(Net(), *INPUTS, config=Config(**OPTIONS))
    measured = actcompile.measure(Net(), *INPUTS, config=Config(**OPTIONS))
    assert explain(Net(), *INPUTS, dynamic=True, config=measured).graphs[0].outlook.measured
    rows = explain(Net(), *INPUTS, dynamic=True, config=fitted).graphs[0].rows
    assert all("fitted" in row.codec for row in rows if row.codec.startswith(("quantize(2", "quantize(4")))
