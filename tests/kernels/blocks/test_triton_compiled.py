"""The Triton kernels compiled for GPUs that need not be there: registers, spills, width of global accesses, no FMA."""

from importlib.metadata import version

import pytest
import torch

from actcompile.kernels import BlockFormat
from actcompile.passes.plan.plan import LINE
from bench import sass
from tests.helpers import quickly

pytestmark = pytest.mark.skipif(sass.missing() is not None, reason=str(sass.missing()))
ARCHITECTURES = (80, 90)
FITTED = BlockFormat(2, 256, "variance-minimising")
DEFAULT = BlockFormat(2, 64, "variance-minimising", torch.bfloat16)
SEED_LOADS = 2


def check(code: sass.MachineCode, registers: int) -> None:
    """`registers` are those that Triton 3.9 takes. Older ones, as torch 2.11 to 2.14 bring, take up to 45 more, and
    3.6 keeps one on the stack for sm_80 while a division calls what handles its rare operands."""
    older = tuple(map(int, version("triton").split(".")[:2])) < (3, 9)
    assert code.spills <= (2 if older else 0)
    assert code.registers <= (255 if older else registers)
    assert "fma.rn" not in code.ptx, "a contracted product and sum differs from the reference in the last bit"
    assert ".ftz" not in code.ptx, "flushed denormals differ from the reference"


QUANTIZE = [
    (BlockFormat(2), torch.float32, 16, 128),
    (BlockFormat(2), torch.bfloat16, 16, 128),
    (FITTED, torch.float32, 16, 128),
    (DEFAULT, torch.float32, 16, 168),
    (DEFAULT, torch.bfloat16, 16, 248),
    (BlockFormat(4, 64, "variance-minimising", torch.bfloat16), torch.float32, 16, 128),
    (BlockFormat(2, 32, metadata=torch.bfloat16), torch.float32, 16, 168),
    (BlockFormat(1), torch.float32, 16, 255),
    (BlockFormat(1), torch.bfloat16, 8, 255),
    (BlockFormat(4), torch.float32, 16, 96),
    (BlockFormat(8), torch.float16, 16, 96),
]
DEQUANTIZE = [(BlockFormat(2), torch.float32), (BlockFormat(2), torch.bfloat16), (FITTED, torch.float32)]
DEQUANTIZE += [(DEFAULT, torch.float32), (DEFAULT, torch.bfloat16)]
AGAIN = [(fmt, op) for fmt in (DEFAULT, BlockFormat(1), BlockFormat(8)) for op in ("quantize", "dequantize")]


def everywhere(cases, quick):
    """For every architecture; for the older one, only those of `quick` formats are not left to the slow tests."""
    older, *others = ARCHITECTURES
    slow = [(*case, older) for case in cases if case[0] not in quick]
    return quickly([*((*case, older) for case in cases), *((*case, arch) for case in cases for arch in others)], slow)


@pytest.mark.parametrize(
    ("fmt", "dtype", "width", "registers", "arch"), everywhere(QUANTIZE, [DEFAULT, BlockFormat(1)])
)
def test_quantize(fmt, dtype, width, registers, arch):
    code = sass.quantize_code(fmt, dtype, arch)
    check(code, registers)
    loads = code.widths("LDG")
    assert loads.pop(4) == SEED_LOADS
    assert set(loads) == {width}
    once = code.elements // code.threads * dtype.itemsize // width
    assert loads[width] in (once, 2 * once)


@pytest.mark.parametrize(("fmt", "dtype", "arch"), everywhere(DEQUANTIZE, [DEFAULT]))
def test_dequantize(fmt, dtype, arch):
    code = sass.dequantize_code(fmt, dtype, arch)
    check(code, 64)
    loads, stores = code.widths("LDG"), code.widths("STG")
    assert loads[16] * 16 * code.threads == code.elements // fmt.planes * 4, "every word is loaded once, 4 at a time"
    assert stores == {16: code.elements // code.threads * dtype.itemsize // 16}
    if dtype == torch.bfloat16:
        assert "cvt.rn.bf16" in code.ptx, "rounded to nearest even, as torch does"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [256, 100])
def test_standardised_columns_are_read_as_widely_as_elements(columns, dtype):
    encode = sass.quantize_code(FITTED, dtype, 90, columns=columns)
    decode = sass.dequantize_code(DEFAULT, dtype, 90, columns=columns)
    check(encode, 248)
    check(decode, 64)
    assert encode.widths("LDG")[4] == SEED_LOADS and max(decode.widths("LDG")) == 16
    assert set(decode.widths("STG")) == {16}


@pytest.mark.parametrize("words", [16, LINE])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bits(arch, words):
    pack, unpack = sass.bits_code("pack_bits", words, arch), sass.bits_code("unpack_bits", words, arch)
    check(pack, 255)
    check(unpack, 64)
    assert pack.widths("LDG") == {16: 32}
    assert set(pack.widths("STG")) == {16}
    assert set(unpack.widths("LDG")) == {16}
    assert unpack.widths("STG") == {16: 32}


def test_sizes_whose_last_group_is_not_full_keep_the_wide_loads_of_the_others():
    code = sass.quantize_code(BlockFormat(2), torch.float32, 90, partial=True)
    check(code, 168)
    assert code.widths("LDG")[16] == 16


@pytest.mark.parametrize("words", [4096, 1500])
def test_groups_that_do_not_fit_into_registers(words):
    code = sass.quantize_code(BlockFormat(2, 16 * words), torch.float32, 90)
    check(code, 168)
    assert code.widths("LDG")[16 if words == 4096 else 4] >= 2 * 16


@pytest.mark.parametrize(("fmt", "op", "arch"), everywhere(AGAIN, [DEFAULT]))
def test_what_is_done_again_does_not_spill(op, fmt, arch):
    check(sass.again_code(op, fmt, torch.float32, arch), 255)


def test_scalars_of_every_kernel_have_the_types_that_far_offsets_need():
    from actcompile.kernels.bits import triton_lossless
    from actcompile.kernels.blocks import triton_dequantize, triton_quantize

    for kernel in (
        triton_quantize.quantize_kernel,
        triton_quantize.quantize_long_kernel,
        triton_dequantize.dequantize_kernel,
        triton_quantize.quantize_again_kernel,
        triton_dequantize.dequantize_again_kernel,
        triton_lossless.pack_kernel,
        triton_lossless.unpack_kernel,
    ):
        types = {p.name: p.annotation_type for p in kernel.params if not p.is_constexpr}
        assert types["first"] == types["groups"] == types["numel"] == "i64"
        assert all(p.do_not_specialize for p in kernel.params if p.name in ("salt", "first", "groups", "numel"))
