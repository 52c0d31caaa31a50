"""Axes are followed op by op: sizes that are equal by chance don't join them."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from actcompile.passes.graph.axes import Axes

SAME = 4  # every size, so that nothing can be told by sizes


def axes(function, *inputs):
    """The axes of `function`, and its inputs' and its output's nodes."""
    module = make_fx(function, tracing_mode="fake")(*inputs)
    for node in module.graph.nodes:
        if "val" not in node.meta and node.op == "call_function":
            raise AssertionError(node)
    found = Axes()
    found.read(module.graph)
    return found, module.graph.find_nodes(op="placeholder"), module.graph.output_node().args[0]


def joined(function, *inputs):
    """For every dimension of the output, the dimensions (input, dimension) that are the same."""
    found, given, out = axes(function, *inputs)
    places = [(i, d) for i, node in enumerate(given) for d in range(node.meta["val"].dim())]
    return [
        {(i, d) for i, d in places if found.of(given[i], d) == found.of(out, dim)}
        for dim in range(out.meta["val"].dim())
    ]


def square():
    return torch.randn(SAME, SAME)


def test_products():
    assert joined(torch.mm, square(), square()) == [{(0, 0)}, {(1, 1)}]
    assert joined(lambda a, b, c: torch.addmm(c, a, b), square(), square(), torch.randn(SAME)) == [
        {(0, 0)},
        {(1, 1), (2, 0)},
    ]
    assert joined(lambda a, b: a.t() @ b, square(), square()) == [{(0, 1)}, {(1, 1)}]


def test_rows_are_those_of_their_index():
    index = torch.randint(SAME, (SAME,))
    assert joined(lambda x, i: x[i], square(), index) == [{(1, 0)}, {(0, 1)}]
    assert joined(lambda x, i: x.index_select(0, i), square(), index) == [{(1, 0)}, {(0, 1)}]
    assert joined(lambda x, i, y: y.index_add(0, i, x), square(), index, square()) == [{(2, 0)}, {(0, 1), (2, 1)}]
    assert joined(lambda x, i, y: y.scatter_add(0, i.view(-1, 1).expand(SAME, SAME), x), square(), index, square()) == [
        {(2, 0)},
        {(0, 1), (2, 1)},
    ]


def test_views_sums_and_pieces():
    cube = torch.randn(SAME, SAME, SAME)
    assert joined(lambda x: x.view(SAME, -1).view(SAME, SAME, SAME), cube)[0] == {(0, 0)}
    assert joined(lambda x: x.unsqueeze(0).permute(2, 0, 1), square()) == [{(0, 1)}, set(), {(0, 0)}]
    assert joined(lambda x: x.sum(1), square()) == [{(0, 0)}]
    assert joined(lambda x: x.sum(0, keepdim=True), square()) == [set(), {(0, 1)}]
    assert joined(lambda x: x[1], square()) == [{(0, 1)}]
    assert joined(lambda x, y: torch.cat([x, y], 1), square(), square()) == [{(0, 0), (1, 0)}, set()]
    assert joined(lambda x, y: x + y, square(), torch.randn(SAME)) == [{(0, 0)}, {(0, 1), (1, 0)}]
    assert joined(lambda x, y: x * y, square(), torch.randn(SAME, 1)) == [{(0, 0), (1, 0)}, {(0, 1)}]


def test_a_number_is_summed_up_over_a_dimension_that_it_has_not():
    assert joined(lambda x: x.sum().sum(-1) + x.amax().mean(0), square()) == []
