"""Keys of values are those of the same model in another graph: other sizes, symbols for sizes, another process."""

import pytest
import torch

from actcompile import explain
from tests.helpers import FAST, gnn, graph


def keys(model, nodes, edges, dynamic):
    torch._dynamo.reset()
    (found,) = explain(model, *graph(nodes, edges), dynamic=dynamic, options=FAST).graphs
    rows = [row for row in found.rows if row.way]
    return {row.key for row in rows}, {f"{row.module}/{row.name}" for row in rows}


@pytest.mark.parametrize("name", ["sage_max", "gin"])
def test_keys_are_the_same_where_sizes_are_symbols_and_names_are_not(name):
    fixed, names = keys(gnn(name), 1500, 6000, False)
    symbolic, others = keys(gnn(name), 2000, 5000, True)
    assert fixed == symbolic and len(fixed) == len(names)
    assert names != others
