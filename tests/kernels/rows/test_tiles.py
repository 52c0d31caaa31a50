"""Sums over tiles of rows against the same sums over all rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actcompile.kernels import BlockFormat
from actcompile.kernels.rows.tiles import Step, Sum, Tiled, parse, row_sums

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
