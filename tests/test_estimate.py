"""What a step would take, from shapes alone."""

import pytest
import torch

import actcompile
from actcompile._estimate import OURS, PLAIN, deepest, largest, meta_inputs
from bench.models import build


def of(nodes, edges, **options):
    with torch.device("meta"):
        model = build("sage", 32, 8, hidden=64, layers=3)
    return actcompile.estimate(model, *meta_inputs(nodes, edges, 32), inner="aot_eager", **options)


def test_a_graph_of_billions_of_edges_takes_no_memory():
    small, large = of(10**5, 10**6), of(10**8, 10**9)
    for name in ("saved_before", "saved_after", "peak_before", "peak_after"):
        assert getattr(large, name) == pytest.approx(1000 * getattr(small, name), rel=0.01)
    assert large.alive == pytest.approx(10**8 * 32 * 4 + 2 * 10**9 * 8, rel=0.01)
    assert large.total(OURS) == large.alive + large.peak_after < large.total(PLAIN)


def test_it_is_what_explain_says():
    with torch.device("meta"):
        model = build("sage", 32, 8, hidden=64, layers=3)
    inputs = meta_inputs(10_000, 50_000, 32)
    (graph,) = actcompile.explain(model, *inputs, options={"inner": "aot_eager"}).graphs
    found = actcompile.estimate(model, *inputs, inner="aot_eager")
    assert found.saved_after == graph.bytes_after and found.peak_after == graph.memory_after.peak
    assert found.peak_before == graph.memory_before.peak


def test_bounds_are_planned_for():
    assert of(10_000, 50_000).error is None
    assert of(10_000, 50_000, max_gradient_error=0.1).error <= 0.1


@pytest.mark.parametrize("power", [0.5, 1, 2])
@pytest.mark.parametrize("memory", [100, 10**4, 10**7])
def test_largest_is_found(power, memory):
    def need(k):
        return 7 + 3 * k**power

    found = largest(need, memory)
    assert need(found) <= memory < need(1.02 * found)
    whole = largest(need, memory, 3, whole=True)
    assert need(whole) <= memory < need(whole + 1) and whole == int(whole)


def test_nothing_fits():
    assert largest(lambda k: 100 + k, 10) == 0
    assert largest(lambda k: 100 + k, 10, whole=True) == 0


def test_depth_follows_from_what_a_layer_adds():
    assert deepest(lambda n: 500 + 100 * n, 10_500) == 100
    assert deepest(lambda n: 500 + 100 * n, 900) == 4  # fewer than it looks at
    assert deepest(lambda n: 500 + 100 * n, 100) == 0
