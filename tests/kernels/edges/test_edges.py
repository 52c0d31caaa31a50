"""Programs over edges: what is compiled against plain torch; groupings against a stable sort."""

import gc
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from actcompile.kernels.edges import group as grouping_file
from actcompile.kernels.edges import ops as ops_file
from actcompile.kernels.edges.group import grouping, remembered_nbytes
from actcompile.kernels.edges.ops import aggregate, compiled, edges, group_edges
from actcompile.kernels.edges.program import OPS, Operand, Output, Program, Step, parse, run_reference
from tests.kernels.edges.programs import GRAPHS, data, graph, is_close, programs

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
    for i, (a, b, to_the_bit, output) in enumerate(zip(ours, expected, exact, program.outputs, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        if output.dtype in ("bool", "bits") or (to_the_bit and not special):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            rtol = 1e-12 if double else 2e-2 if output.dtype == "bfloat16" else 2e-5
            assert is_close(a, b, rtol, program, i, operands, by, others, nodes, *sizes), (kind, output)


SIZES = [(1, 1), (2, 5), (3, 16), (1, 33), (2, 23), (70, 3), (4, 1), (2, 0)]  # a kernel has some of them as constants


@pytest.mark.parametrize("floats", [("float64",), ("float32", "bfloat16")], ids=["double", "single"])
@settings(max_examples=5 if settings.get_current_profile_name() == "ci" else 200, phases=[Phase.generate])  # compiled
@given(st.data())
def test_what_is_compiled_computes_what_the_reference_does(floats, drawn):
    program, exact = drawn.draw(programs(floats))
    before, alone = torch.get_num_threads(), ops_file.ALONE
    some = drawn.draw(st.lists(st.sampled_from(SIZES), min_size=2, max_size=2, unique=True))
    assert all(compiled(program.dump(), *sizes) is not None for sizes in some)
    try:
        for kind in GRAPHS:
            sizes, index = drawn.draw(st.sampled_from(some)), drawn.draw(st.sampled_from((torch.int32, torch.int64)))
            threads, special = drawn.draw(st.integers(1, 2)), drawn.draw(st.sampled_from((0.0, 0.05)))
            torch.set_num_threads(threads)
            ops_file.ALONE = 0 if threads > 1 else alone
            compare(program, exact, kind, index, sizes, special, drawn.draw(st.integers(0, 99)))
    finally:
        torch.set_num_threads(before)
        ops_file.ALONE = alone


def test_a_total_of_many_nodes_is_not_rounded_at_its_size():
    edge, total = Operand("edge", -1, "c", "float32"), Output("total", "o0", "c", "float32")
    by = torch.arange(200_000)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # all nodes are one chunk
    try:
        (ours,) = run(Program((edge,), (), (total,)), [torch.full((len(by), 2), 0.1)], by, [], len(by), 1, 2)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(ours, torch.full((1, 2), 20_000.0), rtol=1e-6, atol=0)


def each(op, *dtypes, out="float32"):
    """A program that does one thing to rows of edges."""
    operands = tuple(Operand("edge", -1, "c", dtype) for dtype in dtypes)
    step = Step(op, tuple(f"o{i}" for i in range(len(dtypes))), "c")
    return Program(operands, (step,), (Output("edge", "v0", "c", out),))


def apply(program, *rows):
    by = torch.zeros(rows[0].shape[0], dtype=torch.long)
    return run(program, list(rows), by, [], 1, 1, rows[0].shape[1])[0]


def all_magnitudes():
    """Floats of every exponent, normal or not, zeros, infinities, NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (4096, 64), generator=generator).int().view(torch.float32)
    x[1] = torch.linspace(-104.5, -80, 64)  # where results stop being normal
    x[2] = torch.linspace(88, 89.5, 64)
    x[3:600] = torch.randn(597, 64, generator=generator) * 3
    x[0, :5] = torch.tensor([0.0, -0.0, INF, -INF, NAN])
    return x


@pytest.mark.parametrize(
    ("op", "ulp", "least"), [("exp", 2, 2.0**-149), ("tanh", 3, 2.0**-149), ("sigmoid", 4, 2.0**-126)]
)
def test_functions_over_the_whole_range(op, ulp, least):
    """Within a few units in the last place of float64's, infinite or NaN included; `sigmoid` where normal."""
    x = all_magnitudes()
    ours, exact = apply(each(op, "float32"), x), OPS[op][1](x.double())
    assert torch.equal(ours.isnan(), x.isnan())
    rounded = exact.float()
    assert torch.equal(ours.isinf(), rounded.isinf())
    finite = rounded.isfinite()
    unit = torch.maximum(rounded.abs() * 2.0**-23, torch.tensor(least))[finite].double()
    assert ((ours.double() - exact)[finite].abs() / unit).max() <= ulp


@pytest.mark.parametrize("kind", ["max", "min"])
def test_extrema_propagate_nan_and_infinities_as_torch(kind):
    x = torch.tensor([[1.0, NAN, INF, -INF], [2.0, 1.0, 1.0, -INF], [NAN, 0.0, 0.0, 0.0], [0.0, NAN, -INF, INF]])
    program = Program((Operand("take", 0, "c", "float32"),), (), (Output(kind, "o0", "c", "float32"),))
    for order in itertools.permutations(range(4)):
        by = torch.tensor([0, 0, 1, 1])[list(order)]
        take = torch.arange(4)[list(order)]
        ours = run(program, [x], by, [take], 3, 1, 4)[0]
        expected = run_reference(program, [x], by, [take], 3, 1, 4)[0]
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    assert not ours[2].any()


SUM = Program((Operand("take", 0, "c", "float32"),), (), (Output("sum", "o0", "c", "float32"),))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [5, -6, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("end", ["by", "take"])
def test_a_node_that_is_not_there_is_an_error(index, wrong, end):
    x, good, bad = torch.randn(5, 3), torch.tensor([0, 4, 2], dtype=index), torch.tensor([0, wrong, 1], dtype=index)
    pair = (bad, good) if end == "by" else (good, bad)
    with pytest.raises(IndexError, match="smaller than 5"):
        run(SUM, [x], pair[0], [pair[1]], 5, 1, 3)
    with pytest.raises(IndexError, match="smaller than 5"):
        aggregate(x, None, pair[1], -1, pair[0], -1, 5, [])


def test_an_index_is_checked_for_each_number_of_nodes():
    """What was arranged for a large matrix may not be read of a small one."""
    by, take = torch.tensor([0, 1, 2]), torch.tensor([0, 7, 3])
    aggregate(torch.randn(8, 3), None, take, -1, by, -1, 5, [])
    with pytest.raises(IndexError):
        aggregate(torch.randn(5, 3), None, take, -1, by, -1, 5, [])


def test_negative_indices_count_from_the_end():
    x, by, take = torch.randn(5, 3), torch.tensor([0, -1, 2, -5]), torch.tensor([-1, 1, -5, 2])
    expected = torch.zeros(5, 3).index_add(0, by % 5, x[take])
    torch.testing.assert_close(aggregate(x, None, take, -1, by, -1, 5, []), expected)
    torch.testing.assert_close(run_reference(SUM, [x], by, [take], 5, 1, 3)[0], expected)
    torch.testing.assert_close(group_edges(by, -1, 5)[1], (by % 5).argsort(stable=True).int())


def test_rows_of_an_edge_index_of_any_strides():
    x, edge_index = torch.randn(6, 4), torch.randint(6, (2, 20))
    expected = torch.zeros(6, 4).index_add(0, edge_index[1], x[edge_index[0]])
    for rows in (edge_index, edge_index.t().contiguous().t(), torch.stack([edge_index] * 2, -1)[..., 0]):
        torch.testing.assert_close(aggregate(x, None, rows, 0, rows, 1, 6, []), expected)


def test_nothing_in_either_dimension():
    for nodes, columns, rows in ((5, 0, 5), (5, 3, 0), (0, 3, 0)):
        count = 4 if rows else 0
        by, take = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
        out = aggregate(torch.randn(rows, columns), None, take, -1, by, -1, nodes, [])
        assert out.shape == (nodes, columns) and not out.any()


def test_ops_are_registered_in_order():
    x, edge_index, weight = torch.randn(6, 4), torch.randint(6, (2, 20)), torch.rand(20, 1)
    for grouped in ([], list(group_edges(edge_index, 1, 6))):
        torch.library.opcheck(edges.overload, (SUM.dump(), edge_index, 1, 6, 1, 4, [edge_index], [0], [x], grouped))
        torch.library.opcheck(aggregate.overload, (x, weight, edge_index, 0, edge_index, 1, 6, grouped))
    torch.library.opcheck(group_edges.overload, (edge_index, 1, 6))


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_edges_are_grouped_by_a_stable_sort(kind, index):
    by, _, nodes = graph(kind, index)
    pointer, order = group_edges(by, -1, nodes)
    assert torch.equal(order.long(), by.argsort(stable=True))
    counts = torch.bincount(by.long(), minlength=nodes)
    assert torch.equal(pointer.diff().long(), counts) and pointer[0] == 0
    assert (grouping(by, -1, nodes).order is None) == bool((by.diff() >= 0).all())


@pytest.fixture
def groups(monkeypatch):
    """What is grouped, call by call."""
    made = []
    group = grouping_file.group
    monkeypatch.setattr(grouping_file, "group", lambda *args: made.append(args) or group(*args))
    return made


def neighbours(x, edge_index):
    return torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]])


def test_a_grouping_is_remembered_until_its_edges_change(groups):
    x, edge_index = torch.randn(6, 4), torch.randint(6, (2, 30))
    for _ in range(3):
        torch.testing.assert_close(aggregate(x, None, edge_index, 0, edge_index, 1, 6, []), neighbours(x, edge_index))
    assert len(groups) == 1
    edge_index[1] = edge_index[1].roll(7)
    torch.testing.assert_close(aggregate(x, None, edge_index, 0, edge_index, 1, 6, []), neighbours(x, edge_index))
    edge_index[0, :9] = 3  # only the other end
    torch.testing.assert_close(aggregate(x, None, edge_index, 0, edge_index, 1, 6, []), neighbours(x, edge_index))
    assert len(groups) == 3


def test_the_other_end_may_change_alone(groups):
    x, by, take = torch.randn(6, 4), torch.randint(6, (30,)), torch.randint(6, (30,))
    for _ in range(3):
        expected = torch.zeros(6, 4).index_add(0, by, x[take])
        torch.testing.assert_close(aggregate(x, None, take, -1, by, -1, 6, []), expected)
        take.copy_(torch.randint(6, (30,)))
    assert len(groups) == 1


def test_a_new_tensor_at_the_same_address_is_grouped_anew():
    x, addresses = torch.randn(6, 4), set()
    for _ in range(50):
        edge_index = torch.randint(6, (2, 30))
        addresses.add(edge_index.data_ptr())
        torch.testing.assert_close(aggregate(x, None, edge_index, 0, edge_index, 1, 6, []), neighbours(x, edge_index))
        del edge_index
    assert len(addresses) < 50  # the case did occur


def test_a_grouping_dies_with_its_edges():
    gc.collect()
    before = remembered_nbytes()
    x, by = torch.randn(6, 4), torch.randint(6, (3000,))
    for _ in range(20):
        take = torch.randint(6, (3000,))
        aggregate(x, None, take, -1, by, -1, 6, [])
    del take
    assert 0 < remembered_nbytes() - before < 4 * 4 * 3000  # not one for each other end that there was
    del by
    assert remembered_nbytes() == before


def test_inference_tensors_are_never_remembered():
    before, x = remembered_nbytes(), torch.randn(6, 4)
    by = torch.randint(6, (30,))
    with torch.inference_mode():
        edge_index = torch.randint(6, (2, 30))
        take = torch.randint(6, (30,))
        for _ in range(2):
            torch.testing.assert_close(
                aggregate(x, None, edge_index, 0, edge_index, 1, 6, []), neighbours(x, edge_index)
            )
            torch.testing.assert_close(
                aggregate(x, None, take, -1, by, -1, 6, []), torch.zeros(6, 4).index_add(0, by, x[take])
            )
            edge_index.copy_(torch.randint(6, (2, 30)))
            take.copy_(torch.randint(6, (30,)))
    del by, edge_index, take
    assert remembered_nbytes() == before


def test_two_threads_group_and_forget_at_once():
    x, failed = torch.randn(40, 4), []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randint(40, (2, 500), generator=torch.Generator().manual_seed(0))
        for _ in range(50):
            mine = torch.randint(40, (2, 500), generator=generator)
            for edge_index in (mine, shared):
                out = aggregate(x, None, edge_index, 0, edge_index, 1, 40, [])
                if not torch.allclose(out, neighbours(x, edge_index), atol=1e-5):
                    failed.append(seed)
            remembered_nbytes()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


WITHOUT_COMPILER = """
import torch
from actcompile.kernels.edges.ops import aggregate, group_edges
x, edge_index, weight = torch.randn(6, 4), torch.randint(6, (2, 30)), torch.rand(30, 1)
expected = torch.zeros(6, 4).index_add(0, edge_index[1], x[edge_index[0]] * weight)
for grouped in ([], list(group_edges(edge_index, 1, 6))):
    torch.testing.assert_close(aggregate(x, weight, edge_index, 0, edge_index, 1, 6, grouped), expected)
pointer, order = group_edges(edge_index - 6 * (edge_index > 2), 1, 6)
assert torch.equal(order.long(), edge_index[1].argsort(stable=True)) and pointer[0] == 0 and pointer[-1] == 30
"""


def test_without_a_compiler_the_reference_stands_in(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr


def test_a_program_is_read_as_it_was_written():
    program = Program(
        (Operand("take", -1, "hc", "float32"), Operand("edge", -1, "h", "bool")),
        (Step("mul", ("o0", 0.1), "hc"), Step("where", ("o1", "v0", -INF), "hc")),
        (Output("max", "v1", "hc", "float32"),),
    )
    assert parse(program.dump()) == program


def test_a_mask_beside_float64_is_computed_with_in_float64():
    """As dropout scales it: in float32, 1 / 0.7 would be off by 4e-8."""
    steps = Step("float", ("o1",), "c"), Step("mul", ("v0", 1 / 0.7), "c"), Step("mul", ("o0", "v1"), "c")
    operands = Operand("take", 0, "c", "float64"), Operand("edge", -1, "c", "bool")
    program = Program(operands, steps, (Output("sum", "v2", "c", "float64"),))
    x, mask, by = torch.randn(5, 3, dtype=torch.float64), torch.rand(20, 3) < 0.7, torch.randint(5, (20,))
    other = torch.randint(5, (20,))
    expected = x.new_zeros(5, 3).index_add(0, by, x[other] * mask / 0.7)
    for sums in (
        run_reference(program, [x, mask], by, [other], 5, 1, 3),
        run(program, [x, mask], by, [other], 5, 1, 3),
    ):
        torch.testing.assert_close(sums[0], expected, rtol=1e-12, atol=1e-12)
