"""The Triton kernels of message passing, compiled for GPUs that need not be there: registers, spills, wide loads, no
atomics.
"""

import pytest

from actcompile.kernels.edges.ops import aggregation
from actcompile.kernels.edges.program import COMPARING, OPS, Operand, Output, Program, Step
from bench import sass

pytestmark = pytest.mark.skipif(sass.missing() is not None, reason=str(sass.missing()))


def take(level, dtype="float32"):
    return Operand("take", 0, level, dtype)


def here(level, dtype="float32"):
    return Operand("take", -1, level, dtype)


def edge(level, dtype="float32"):
    return Operand("edge", -1, level, dtype)


SOFTMAX = (  # of two rows' numbers, less the largest, by the sum: GAT's attention
    Step("add", ("o0", "o1"), "h"),
    Step("mul", ("v0", 0.2), "h"),
    Step("gt", ("v0", 0.0), "h"),
    Step("where", ("v2", "v0", "v1"), "h"),
    Step("sub", ("v3", "o2"), "h"),
    Step("exp", ("v4",), "h"),
    Step("div", ("v5", "o3"), "h"),
    Step("mul", ("v6", "o4"), "hc"),
)
ATTENTION = (take("h"), here("h"), here("h"), here("h"), take("hc"))
TIMES = (Step("mul", ("o0", "o1"), "hc"),)


def made(kind, operands, steps=(), level="c", dtype="float32"):
    value = f"v{len(steps) - 1}" if steps else "o0"
    return Program(operands, steps, (Output(kind, value, level, dtype),))


PROGRAMS = {  # -> program, heads, columns, most registers
    "sum": (made("sum", (take("c"),)), 1, 256, 128),
    "sum of bfloat16": (made("sum", (take("c", "bfloat16"),), dtype="bfloat16"), 1, 256, 128),
    "sum of 40": (made("sum", (take("c"),)), 1, 40, 128),
    "max": (made("max", (take("c"),)), 1, 256, 128),
    "attention": (made("sum", ATTENTION, SOFTMAX, "hc"), 4, 64, 168),
    "product": (made("dot", (take("hc"), here("hc")), TIMES, "h"), 4, 64, 168),
    "bits": (made("edge", (take("c"), here("c")), (Step("eq", ("o0", "o1"), "c"),), dtype="bits"), 1, 256, 168),
    "masked": (made("sum", (take("c"), edge("c", "bits")), (Step("where", ("o1", "o0", 0.0), "c"),)), 1, 256, 168),
}


@pytest.mark.parametrize(
    ("name", "pieces", "arch"),
    [*((name, False, 90) for name in PROGRAMS), *((name, p, 80 + 10 * p) for name in ("sum", "bits") for p in (0, 1))],
)
def test_kernels(name, pieces, arch):
    program, heads, columns, registers = PROGRAMS[name]
    code = sass.edges_code(program.dump(), heads, columns, arch, pieces=pieces)
    assert code.spills == 0
    assert code.registers <= registers
    assert max(code.widths("LDG")) == 16
    assert not {op.split(".")[0] for op in code.instructions} & {"RED", "ATOM", "ATOMG", "ATOMS"}
    if "exp" not in {step.op for step in program.steps}:
        assert "fma.rn" not in code.ptx, "a maximum is compared with messages that another kernel computes"


def test_a_kernel_can_be_launched_twice():
    """From the second launch on Triton compares the globals of a kernel with what they were, and NaN is never that."""
    from actcompile.kernels.bits import triton_lossless
    from actcompile.kernels.blocks import triton_dequantize, triton_quantize
    from actcompile.kernels.edges import triton_lanes, triton_run

    kernels = [triton_run.kernel(program.dump(), 0) for program, *_ in PROGRAMS.values()]
    for module in (triton_lanes, triton_quantize, triton_dequantize, triton_lossless):
        kernels += [f for name, f in vars(module).items() if name.endswith("_kernel")]
    for kernel in kernels:
        assert kernel.cache_key  # it looks for them
        assert all(value == value for value, _ in kernel.used_global_vals.values())


@pytest.mark.parametrize("kind", ["sum", "max"])
def test_what_joins_pieces(kind):
    code = sass.join_code(kind, 256, 90)
    assert code.spills == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_op_is_compiled(dtype):
    steps, value = [], "o0"
    for op in OPS:
        count = 1 + (op in ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "and", "or", *COMPARING - {"not"}))
        arguments = ("o1", value, 0.5) if op == "where" else ("o1",) * count if op in ("and", "or", "not") else None
        steps.append(Step(op, arguments or (value, "o0")[:count], "c"))
        value = value if op in COMPARING else f"v{len(steps) - 1}"
        if op in COMPARING:
            steps.append(Step("where", (f"v{len(steps) - 1}", value, -1.0), "c"))
            value = f"v{len(steps) - 1}"
    program = Program((edge("c", dtype), edge("c", "bool")), tuple(steps), (Output("sum", value, "c", dtype),))
    code = sass.edges_code(program.dump(), 1, 32, 90)
    assert ".f64" in code.ptx or dtype == "float32"


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_weighted_sums_of_rows(dtype):
    assert sass.edges_code(aggregation(dtype, dtype), 1, 128, 80).spills == 0
