"""Sums over tiles of rows against the same sums over all rows."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actcompile.kernels import BlockFormat
from actcompile.kernels.edges.program import Operand, Output, Program
from actcompile.kernels.edges.program import Step as Op
from actcompile.kernels.rows.tiles import LOOP, Step, Sum, Tiled, parse, row_sums

ops = torch.ops.actcompile


def program(rows: int, columns: int, others: int, fmt: BlockFormat, dtype: str) -> Tiled:
    """Decoded, masked, then `x^T g` and the sum of `x`."""
    bits = 32 * 16
    return Tiled(
        rows,
        [(columns, fmt.group)] * 3 + [(columns, bits), (1, 1), None],
        [
            Step(
                "actcompile.dequantize.default",
                [*({"operand": i} for i in range(3)), [{"rows": None}, columns], {"dtype": dtype}, 2, 64, "uniform"],
                {},
            ),
            Step("actcompile.unpack_bits.default", [{"operand": 3}, [{"rows": None}, columns]], {}),
            Step("aten.where.self", [{"step": 1}, {"operand": 5}, {"step": 0}], {}),
        ],
        [
            Sum({"step": 2}, {"operand": 4}, [columns, others], dtype),
            Sum({"step": 2}, None, [1, columns], dtype),
        ],
    )


@settings(max_examples=30)
@given(
    nodes=st.integers(0, 3000),
    columns=st.sampled_from((1, 24, 40, 256)),
    rows=st.sampled_from((512, 1024)),
    dtype=st.sampled_from(("float32", "bfloat16")),
)
def test_tiles_sum_to_what_all_rows_do(nodes, columns, rows, dtype):
    torch.manual_seed(nodes)
    fmt = BlockFormat(2, 64, "uniform", torch.bfloat16)
    real = getattr(torch, dtype)
    x, g, mask = torch.randn(nodes, columns).to(real), torch.randn(nodes, 7).to(real), torch.rand(nodes, columns) < 0.5
    encoded = ops.quantize(x, ops.draw_seed(1, x.device), 0, 2, 64, "uniform", torch.bfloat16, fmt.words)
    operands = [*encoded, ops.pack_bits(mask, 16), g, torch.zeros((), dtype=real)]
    text = program(rows, columns, 7, fmt, dtype).dump()
    product, total = row_sums(text, nodes, operands)
    decoded = ops.dequantize(*encoded, [nodes, columns], real, 2, 64, "uniform").masked_fill(mask, 0).double()
    within = {"rtol": 0, "atol": 1e-3} if dtype == "float32" else {"rtol": 2e-2, "atol": 1.0}
    assert product.dtype == total.dtype == real
    torch.testing.assert_close(product.double(), decoded.T @ g.double(), **within)
    torch.testing.assert_close(total.double(), decoded.sum(0, keepdim=True), **within)


def test_a_program_is_its_text():
    tiled = program(512, 40, 7, BlockFormat(2, 64), "float32")
    assert parse(tiled.dump()) == tiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_op_is_one_of_torchs(dtype):
    sums = [Sum({"operand": 0}, {"operand": 1}, [3, 5], str(dtype)[6:]), Sum({"operand": 1}, None, [5], str(dtype)[6:])]
    text = Tiled(4, [(1, 1), (1, 1)], [], sums).dump()
    operands = [torch.randn(10, 3).to(dtype), torch.randn(10, 5).to(dtype)]
    torch.library.opcheck(ops.row_sums.default, (text, 10, operands))


@settings(max_examples=10)
@given(nodes=st.integers(0, 1500), heads=st.sampled_from((1, 3)), columns=st.sampled_from((1, 5, 40)))
@pytest.mark.parametrize("compiled", [True, False])
def test_a_loop_computes_what_torch_does(compiled, nodes, heads, columns):
    """A gate with a row for all, a number for each row, and a mask."""
    torch.manual_seed(nodes)
    x, y = torch.randn(nodes, heads, columns), torch.randn(nodes, heads)
    shift, mask = torch.randn(columns), torch.rand(nodes, heads * columns) < 0.5
    operands = (("edge", "hc"), ("all", "c"), ("edge", "h"), ("edge", "hc"))
    dtypes = ("float32", "float32", "float32", "bool")
    steps = ("sub", ("o0", "o1")), ("sigmoid", ("v0",)), ("mul", ("v1", "o2")), ("where", ("o3", "v2", 0.0))
    gate = Program(
        tuple(Operand(where, -1, level, dtype) for (where, level), dtype in zip(operands, dtypes, strict=True)),
        tuple(Op(op, arguments, "hc") for op, arguments in steps),
        (Output("edge", "v3", "hc", "float32"),),
    ).dump()
    size = [{"rows": None}, heads, columns]
    step = Step(LOOP, [gate, heads, columns, size, *({"operand": i} for i in range(4))], {})
    sums = [Sum({"step": 0}, None, [heads, columns], "float32")]
    text = Tiled(512, [(1, 1), None, (1, 1), (1, 1)], [step], sums).dump()
    with nullcontext() if compiled else mock.patch("actcompile.kernels.rows.loops.compiled", return_value=None):
        (total,) = row_sums(text, nodes, [x, shift, y, mask])
    expected = torch.where(mask.view_as(x), torch.sigmoid(x - shift) * y[..., None], 0.0).double().sum(0)
    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-4)
