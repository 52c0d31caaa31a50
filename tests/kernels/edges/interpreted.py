"""Programs over edges as Triton kernels, in Triton's interpreter, against plain torch.

`test_edges_in_the_interpreter.py` runs this file in a process of its own. What is handed to a kernel lies between
margins, as in `tests/kernels/interpreted.py`.
"""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from actcompile.kernels.edges import triton_run
from actcompile.kernels.edges.group import group
from actcompile.kernels.edges.ops import aggregation
from actcompile.kernels.edges.program import (
    Operand,
    Output,
    Program,
    Step,
    dtype_of,
    parse,
    row_size,
    rows_of,
    run_reference,
)
from tests.kernels.edges.on_triton import on_triton  # noqa: F401  for every test here
from tests.kernels.edges.programs import GRAPHS, data, graph, is_close, programs
from tests.kernels.edges.test_edges import (  # noqa: F401  what holds of the C++ holds of Triton
    SIZES,
    groups,
    test_a_grouping_is_remembered_until_its_edges_change,
    test_a_node_that_is_not_there_is_an_error,
    test_an_index_is_checked_for_each_number_of_nodes,
    test_edges_are_grouped_by_a_stable_sort,
    test_extrema_propagate_nan_and_infinities_as_torch,
    test_negative_indices_count_from_the_end,
    test_nothing_in_either_dimension,
    test_rows_of_an_edge_index_of_any_strides,
    test_the_other_end_may_change_alone,
)
from tests.kernels.interpreted import Poisoned, between, reserved

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEFAULT_SPLIT = triton_run.SPLIT


@pytest.fixture(autouse=True)
def split():
    yield
    triton_run.SPLIT = DEFAULT_SPLIT


def run(program, operands, by, others, nodes, heads, columns, wait=True):
    """Each output, by `run_triton`; nothing is written out of bounds, and what is read there is NaN."""
    sort = group(by, -1, nodes, wait)
    arranged = [sort.arrange(other, -1, nodes, wait) for other in others]
    results = [
        Poisoned((rows_of(program, output, nodes, len(by)), row_size(output, heads, columns)), dtype_of(output))
        for output in program.outputs
    ]
    operands = [between(x, float("nan") if x.is_floating_point() else 1) for x in operands]
    triton_run.run_triton(
        program.dump(), sort, arranged, operands, [r.tensor for r in results], nodes, len(by), heads, columns
    )
    return [r.check() for r in results]


def compare(program, exact, kind, index, sizes, special, seed, wait=True):
    by, others, nodes = graph(kind, index, seed)
    operands = data(program, nodes, len(by), *sizes, seed, special)
    ours = run(program, operands, by, others, nodes, *sizes, wait)
    expected = run_reference(program, operands, by, others, nodes, *sizes)
    double = any(o.dtype == "float64" for o in program.operands)
    for i, (a, b, to_the_bit, output) in enumerate(zip(ours, expected, exact, program.outputs, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        summed = output.kind in ("sum", "dot", "total")
        if output.dtype in ("bool", "bits") or (to_the_bit and not special and not summed and a.dtype.itemsize > 2):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            continue
        rtol = 1e-12 if double else {"bfloat16": 2e-2, "float16": 2e-3}.get(output.dtype, 2e-5)
        assert is_close(a, b, rtol, program, i, operands, by, others, nodes, *sizes), (kind, output)


@pytest.mark.parametrize("floats", [("float64",), ("float32", "bfloat16", "float16")], ids=["double", "single"])
@settings(max_examples=4, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_programs(floats, drawn):
    program, exact = drawn.draw(programs(floats))
    for kind in drawn.draw(st.permutations(GRAPHS))[:3]:
        sizes, index = drawn.draw(st.sampled_from(SIZES)), drawn.draw(st.sampled_from((torch.int32, torch.int64)))
        special, triton_run.SPLIT = drawn.draw(st.sampled_from((0.0, 0.05))), drawn.draw(st.sampled_from((32, 1024)))
        compare(program, exact, kind, index, sizes, special, drawn.draw(st.integers(0, 99)), drawn.draw(st.booleans()))


MESSAGE = (
    (Operand("take", 0, "hc", "float32"), Operand("take", -1, "h", "float32"), Operand("edge", -1, "hc", "bool")),
    (Step("sub", ("o0", "o1"), "hc"), Step("where", ("o2", "v0", 0.0), "hc")),
)


@pytest.mark.parametrize("kind", ["sum", "max", "min", "edge", "dot"])
def test_hubs_are_done_in_pieces(kind):
    triton_run.SPLIT = 9
    program = Program(*MESSAGE, (Output(kind, "v1", "h" if kind == "dot" else "hc", "float32"),))
    for graph_kind, wait in (("hub", True), ("isolated", False)):
        compare(program, [False], graph_kind, torch.int64, (2, 5), 0.0, 1, wait)


def test_hubs_that_begin_and_end_where_pieces_do():
    triton_run.SPLIT = 8
    by, rows = torch.arange(64) // 16, torch.randn(64, 1)
    expected = torch.zeros(64, 1).index_add(0, by, rows)
    ours = run(parse(aggregation("float32", None)), [rows], by, [torch.arange(64)], 64, 1, 1)
    torch.testing.assert_close(ours[0], expected)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 33), (1, 300), (2, 16), (3, 5)])
@pytest.mark.parametrize("kind", ["none", "hub"])
def test_bits_are_written_and_read(kind, sizes):
    level = "c" if sizes[0] == 1 else "hc"
    rows = Operand("take", 0, level, "float32"), Operand("take", -1, level, "float32")
    writes = Program(rows, (Step("gt", ("o0", "o1"), level),), (Output("edge", "v0", level, "bits"),))
    bits = Operand("edge", -1, level, "bits")
    reads = Program(
        (rows[0], bits), (Step("where", ("o1", "o0", -1.0), level),), (Output("max", "v0", level, "float32"),)
    )
    by, others, nodes = graph(kind)
    x, y = data(writes, nodes, len(by), *sizes)
    packed = run(writes, [x, y], by, others[:1], nodes, *sizes)
    expected = run_reference(writes, [x, y], by, others[:1], nodes, *sizes)
    assert torch.equal(packed[0], expected[0])
    ours = run(reads, [x, packed[0]], by, others[:1], nodes, *sizes)
    torch.testing.assert_close(ours, run_reference(reads, [x, packed[0]], by, others[:1], nodes, *sizes))


@pytest.mark.parametrize("kind", ["sum", "dot"])
def test_rows_wider_than_a_tile(kind):
    program = Program(*MESSAGE, (Output(kind, "v1", "h" if kind == "dot" else "hc", "float32"),))
    triton_run.SPLIT = 64
    compare(program, [False], "hub", torch.int64, (2, 300), 0.0, 0)


def test_offsets_past_2_to_the_31_elements():
    nodes, columns = 2**24, 256
    try:
        x = reserved(nodes * columns, torch.float32).view(nodes, columns)
    except OSError as error:
        pytest.skip(f"no address space for {nodes * columns} elements: {error}")
    take = torch.tensor([nodes - 1, 0, nodes - 2])
    x[take] = torch.randn(3, columns)
    sort, out = group(torch.tensor([1, 1, 0]), -1, 2), torch.empty(2, columns)
    arranged = sort.arrange(take, -1, nodes, False)
    triton_run.run_triton(aggregation("float32", None), sort, [arranged], [x], [out], 2, 3, 1, columns)
    assert torch.equal(out, torch.stack([x[nodes - 2], x[nodes - 1] + x[0]]))


def test_what_sorting_learns():
    """The most edges that a node has, and whether they are in order; neither without waiting."""
    by = torch.tensor([3, 1, 3, 3, 0])
    assert group(by, -1, 5).longest == 3 and group(by, -1, 5).order is not None
    assert group(by.sort().values, -1, 5).order is None
    assert group(by, -1, 5, wait=False).longest is None and group(by.sort().values, -1, 5, wait=False).order is not None
    assert group(by[:0], -1, 5).longest == 0 and group(by[:0], -1, 0).pointer.tolist() == [0]
