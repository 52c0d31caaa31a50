"""Matrix products in programs over edges: the reference in float64, and to the bit where two programs must agree."""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from actcompile.kernels.edges import ops as ops_file
from actcompile.kernels.edges.ops import compiled
from actcompile.kernels.edges.program import Operand, Output, Program, Step, parse, run_reference
from tests.kernels.edges.programs import GRAPHS, data, graph
from tests.kernels.edges.test_edges import run

WIDTHS = (1, 2, 7, 16, 17, 40, 64)
TOLERANCE = {"float32": 2e-6, "float64": 1e-14, "bfloat16": 2e-2}


@st.composite
def programs(draw, dtype):
    """Rows of both ends or of the edge, multiplied once or twice, perhaps with heads in the end."""
    level = draw(st.sampled_from(("c", "hc", "")))
    inner, operands, steps = [draw(st.sampled_from(WIDTHS))], [], []

    def operand(where, index, level):
        operands.append(Operand(where, index, level, dtype))
        return f"o{len(operands) - 1}"

    def step(op, level, *arguments):
        steps.append(Step(op, arguments, level))
        return f"v{len(steps) - 1}"

    rows = [operand("take", 0, "x"), operand("take", -1, "x"), operand("edge", -1, "x"), operand("edge", -1, "")]
    value = draw(st.sampled_from(rows))
    if draw(st.booleans()):
        value = step("relu", "x", step("add", "x", value, operand("take", 0, "x")))
    first = value
    if draw(st.booleans()):
        inner.append(draw(st.sampled_from(WIDTHS)))
        value = step("product", "y", value, operand("matrix", -1, "xy"))
        value = step("relu", "y", step("sub", "y", value, operand("all", -1, "y")))
        value = step("product", level, value, operand("matrix", -1, "y" + level))
    else:
        value = step("product", level, value, operand("matrix", -1, "x" + level))
    if draw(st.booleans()):
        value = step("mul", level, value, operand("take", -1, level))
    kinds = ("sum", "max", "min", "edge", "outer", "total") + (("dot",) if "c" in level else ())
    outputs = []
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=2)):
        other = (draw(st.sampled_from((first, *rows))), "x") if kind == "outer" else ()
        outputs.append(Output(kind, value, level.replace("c", "") if kind == "dot" else level, dtype, *other))
    return Program(tuple(operands), tuple(steps), tuple(outputs), tuple(inner))


SIZES = [(1, 1), (2, 5), (3, 16), (1, 33), (2, 23)]


def in_float64(program):
    return Program(
        tuple(replace(o, dtype="float64") for o in program.operands),
        program.steps,
        tuple(replace(o, dtype="float64") for o in program.outputs),
        program.inner,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=4 if settings.get_current_profile_name() == "ci" else 100, phases=[Phase.generate])  # compiled
@given(st.data())
def test_products_are_those_of_the_reference(dtype, drawn):
    program = drawn.draw(programs(dtype))
    assert parse(program.dump()) == program
    some = drawn.draw(st.lists(st.sampled_from(SIZES), min_size=2, max_size=2, unique=True))
    assert all(compiled(program.dump(), *sizes) is not None for sizes in some)
    before, alone = torch.get_num_threads(), ops_file.ALONE
    try:
        for kind in GRAPHS:
            sizes = drawn.draw(st.sampled_from(some))
            threads = drawn.draw(st.integers(1, 2))
            torch.set_num_threads(threads)
            ops_file.ALONE = 0 if threads > 1 else alone
            by, others, nodes = graph(kind, torch.int64, drawn.draw(st.integers(0, 99)))
            operands = data(program, nodes, len(by), *sizes)
            ours = run(program, operands, by, others, nodes, *sizes)
            doubles = [o.double() for o in operands]
            exact = run_reference(in_float64(program), doubles, by, others, nodes, *sizes)
            again = run(program, operands, by, others, nodes, *sizes)
            for a, b, c in zip(ours, exact, again, strict=True):
                assert a.shape == b.shape and a.dtype == getattr(torch, dtype)
                assert torch.equal(a, c)  # the same sums every time
                assert (a.double() - b).norm() <= TOLERANCE[dtype] * b.norm().clamp_min(1), program
    finally:
        torch.set_num_threads(before)
        ops_file.ALONE = alone


@pytest.mark.parametrize("inner, columns", [(1, 1), (7, 5), (64, 48), (33, 70)])
def test_an_extremum_is_one_of_its_messages_to_the_bit(inner, columns):
    """Whichever edges share a tile: a node's largest message is found again by comparing."""
    operands = tuple(
        Operand(where, index, level, "float32")
        for where, index, level in (("take", -1, "x"), ("take", 0, "x"), ("matrix", -1, "xc"), ("all", -1, "c"))
    )
    steps = Step("add", ("o0", "o1"), "x"), Step("product", ("v0", "o2"), "c"), Step("add", ("v1", "o3"), "c")
    largest = Program(operands, steps, (Output("max", "v2", "c", "float32"),), (inner,))
    messages = Program(operands, steps, (Output("edge", "v2", "c", "float32"),), (inner,))
    equal = Program(
        (*operands, Operand("take", -1, "c", "float32")),
        (*steps, Step("eq", ("v2", "o4"), "c")),
        (Output("edge", "v3", "c", "bits"),),
        (inner,),
    )
    generator = torch.Generator().manual_seed(0)
    by, take = (torch.randint(50, (400,), generator=generator) for _ in range(2))
    shapes = (50, inner), (50, inner), (inner, columns), (1, columns)
    rows_of_all = [torch.randn(shape, generator=generator) for shape in shapes]
    (top,) = run(largest, rows_of_all, by, [take], 50, 1, columns)
    for order in (torch.arange(400), torch.randperm(400, generator=generator)):
        (rows,) = run(messages, rows_of_all, by[order], [take[order]], 50, 1, columns)
        index = by[order].view(-1, 1).expand_as(rows)
        assert torch.equal(torch.zeros_like(top).scatter_reduce(0, index, rows, "amax", include_self=False), top)
        (bits,) = run(equal, [*rows_of_all, top], by[order], [take[order]], 50, 1, columns)
        found = (bits.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)[:, :columns].bool()
        assert torch.equal(found, rows == top[by[order]])


def test_rows_of_one_number_are_as_wide_as_the_matrix_has_rows():
    """As a column that is expanded before it is multiplied."""
    operands = Operand("edge", -1, "", "float32"), Operand("matrix", -1, "xc", "float32")
    program = Program(
        operands,
        (Step("product", ("o0", "o1"), "c"),),
        (Output("edge", "v0", "c", "float32"), Output("outer", "v0", "c", "float32", "o0", "x")),
        (7,),
    )
    column, matrix, by = torch.randn(20, 1), torch.randn(7, 5), torch.randint(4, (20,))
    rows = column.expand(20, 7)
    for ours in (
        run(program, [column, matrix], by, [], 4, 1, 5),
        run_reference(program, [column, matrix], by, [], 4, 1, 5),
    ):
        torch.testing.assert_close(ours[0], rows @ matrix, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[1], rows.T @ rows @ matrix, rtol=1e-5, atol=1e-4)


def test_sums_over_many_edges_round_little():
    """A gradient of weights over 300,000 edges is as exact as torch's own product."""
    program = Program(
        (Operand("edge", -1, "x", "float32"), Operand("edge", -1, "c", "float32")),
        (),
        (Output("outer", "o1", "c", "float32", "o0", "x"),),
        (3,),
    )
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(300_000, size, generator=generator) for size in (3, 5))
    by = torch.randint(10, (300_000,), generator=generator)
    (ours,) = run(program, [one, other], by, [], 10, 1, 5)
    exact = one.double().T @ other.double()
    assert ((ours - exact) / exact).abs().max() < 2e-6
