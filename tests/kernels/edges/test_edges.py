"""Programs over edges: what is compiled against the reference, which is plain torch; groupings against a stable sort."""

import gc
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actcompile.kernels.edges import group as grouping_file
from actcompile.kernels.edges import ops as ops_file
from actcompile.kernels.edges.group import grouping, remembered_nbytes
from actcompile.kernels.edges.ops import aggregate, compiled, edges, group_edges
from actcompile.kernels.edges.program import OPS, Operand, Output, Program, Step, parse, run_reference
from tests.kernels.edges.programs import GRAPHS, data, graph, programs

ROOT = Path(__file__).resolve().parents[3]
INF, NAN = float("inf"), float("nan")


def run(program, operands, by, others, nodes, heads, columns):
    used = 1 + max((o.index for o in program.operands if o.where == "take"), default=-1)
    return edges(program.dump(), by, -1, nodes, heads, columns, others[:used], [-1] * used, operands, [])


def compare(program, exact, kind, index, sizes, special, seed):
    by, others, nodes = graph(kind, index, seed)
    operands = data(program, nodes, len(by), *sizes, seed, special)
    ours = run(program, operands, by, others, nodes, *sizes)
    expected = run_reference(program, operands, by, others, nodes, *sizes)
    double = any(o.dtype == "float64" for o in program.operands)
    for a, b, to_the_bit, output in zip(ours, expected, exact, program.outputs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if to_the_bit and not special:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            rtol = 1e-12 if double else 2e-2 if output.dtype == "bfloat16" else 2e-5
            torch.testing.assert_close(a.nan_to_num(7, 1e30, -1e30), b.nan_to_num(7, 1e30, -1e30), rtol=rtol, atol=rtol)


SIZES = [(1, 1), (2, 5), (3, 16), (1, 33), (4, 1), (2, 0)]
from hypothesis import Phase
EXPLORE=[Phase.generate]


@pytest.mark.parametrize("floats", [("float64",), ("float32", "bfloat16")], ids=["double", "single"])
@settings(max_examples=int(os.environ.get("PROGRAMS", 6)), phases=EXPLORE)
@given(st.data())
def test_what_is_compiled_computes_what_the_reference_does(floats, drawn):
    program, exact = drawn.draw(programs(floats))
    before, alone = torch.get_num_threads(), ops_file.ALONE
    assert compiled(program.dump()) is not None
    try:
        for kind in GRAPHS:
            sizes, index = drawn.draw(st.sampled_from(SIZES)), drawn.draw(st.sampled_from((torch.int32, torch.int64)))
            threads = drawn.draw(st.integers(1, 2))
            torch.set_num_threads(threads)
            ops_file.ALONE = 0 if threads > 1 else alone
            compare(program, exact, kind, index, sizes, drawn.draw(st.sampled_from((0.0, 0.05))), drawn.draw(st.integers(0, 99)))
    finally:
        torch.set_num_threads(before)
        ops_file.ALONE = alone
