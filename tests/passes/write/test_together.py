"""Regions that read the same rows are one pass over the edges, with the results of each."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch_geometric import nn as gnn

from actcompile import compress, explain
from actcompile.kernels.edges.program import Operand, Output, Program, Step
from actcompile.passes.graph import _torch
from actcompile.passes.graph.split import call
from actcompile.passes.write.together import together
from tests.kernels.edges.programs import data, graph, programs

ops = torch.ops.actcompile
EDGES = torch.randint(0, 40, (2, 300), generator=torch.Generator().manual_seed(0))


def written(parts, by, others, nodes, heads, columns):
    """A graph that calls `edges` for each program, with the operands that they have in common once."""
    traced, inputs, known = fx.Graph(), [], []

    def given_as(tensor):
        place = next((i for i, t in enumerate(inputs) if t is tensor), None)
        if place is None:
            place = len(inputs)
            inputs.append(tensor)
            known.append(traced.placeholder(f"x{place}"))
        return known[place]

    nodes_of = [[given_as(t) for t in (by, *others, *operands)] for _, operands in parts]
    with _torch.fake_mode() as mode:
        for node, tensor in zip(known, inputs, strict=True):
            node.meta["val"] = mode.from_tensor(tensor)
    results = []
    for (program, _), (of, *rest) in zip(parts, nodes_of, strict=True):
        indices = max([o.index for o in program.operands if o.where == "take"] + [-1]) + 1
        made = call(
            traced, ops.edges.default, program.dump(), of, -1, nodes, heads, columns, rest[:indices], [-1] * indices,
            rest[len(others) :], [],
        )  # fmt: skip
        results += [call(traced, torch._C._get_operation_overload and __import__("operator").getitem, made, i) for i in range(len(program.outputs))]
    traced.output(tuple(results))
    return fx.GraphModule({}, traced), inputs
