"""The order of a compiler that schedules for memory is one that a graph can run in, and holds less."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from actcompile.passes.plan.order import least_first

aten = torch.ops.aten
VALUE = torch.empty(4)


@st.composite
def graphs(draw):
    """A graph of sums, views and ops that write into what they read, with a size for each tensor that it makes."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(draw(st.integers(1, 3)))]
    for _ in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(["add", "add", "view", "add_"]))
        of = [draw(st.sampled_from(nodes)) for _ in range(2)]
        if kind == "view":
            nodes.append(graph.call_function(aten.view.default, (of[0], [4])))
        else:
            nodes.append(graph.call_function(aten.add.Tensor if kind == "add" else aten.add_.Tensor, tuple(of)))
    for node in nodes:
        node.meta["val"] = VALUE
    graph.output(tuple(draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=3))))
    made = [n for n in nodes if n.target is aten.add.Tensor]
    return graph, {n: draw(st.integers(0, 100)) for n in made}, set(draw(st.lists(st.sampled_from(nodes), max_size=4)))


@given(graphs())
@settings(deadline=None)
def test_nodes_come_after_what_they_need_and_writes_keep_their_place(case):
    graph, nbytes, loops = case
    kept = {n for n in graph.output_node().all_input_nodes if n in nbytes}
    order = least_first(graph, nbytes, kept, _readers, lambda node: node in loops and node in nbytes)
    assert sorted(order) == list(graph.nodes)
    place = {node: i for i, node in enumerate(order)}
    assert all(place[n] < place[node] for node in order for n in node.all_input_nodes)
    steps = [n for n in graph.nodes if n.target in (aten.add.Tensor, aten.add_.Tensor)]
    for i, early in enumerate(steps):
        for later in steps[i + 1 :]:
            shared = {_memory(n) for n in early.all_input_nodes} & {_memory(n) for n in later.all_input_nodes}
            one_writes = aten.add_.Tensor in (early.target, later.target)
            if shared and one_writes and early not in loops and later not in loops:
                assert place[early] < place[later]


def _readers(node):
    return [n for user in node.users for n in (_readers(user) if user.target is aten.view.default else [user])]


def _memory(node):
    while node.target in (aten.view.default, aten.add_.Tensor):
        node = node.args[0]
    return node


@pytest.mark.parametrize("branches", [2, 5])
def test_each_branch_is_finished_before_the_next(branches):
    graph = fx.Graph()
    x = graph.placeholder("x")
    wide = [graph.call_function(aten.exp.default, (x,)) for _ in range(branches)]
    small = [graph.call_function(aten.sum.default, (w,)) for w in wide]
    graph.output(tuple(small))
    for node in graph.nodes:
        node.meta["val"] = VALUE
    nbytes = dict.fromkeys(wide, 100) | dict.fromkeys(small, 1)
    order = [n for n in least_first(graph, nbytes, set(small), _readers, lambda node: False) if n in nbytes]
    assert order == [n for pair in zip(wide, small, strict=True) for n in pair]
