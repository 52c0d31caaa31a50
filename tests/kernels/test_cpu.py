"""The C++ kernels: every format's own code, threads, columns, what lies behind the end, and life without a compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actcompile.kernels import BlockFormat, cpu, dequantize, pack_bits, quantize, unpack_bits
from actcompile.kernels.bits.lossless import pack_bits_reference
from actcompile.kernels.blocks.quantize import dequantize_reference, quantize_reference
from tests.strategies import FLOATS, KINDS, assert_same_bits, assert_same_encoding, seed_tensor, values

ROOT = Path(__file__).resolve().parents[2]
FITTED = "variance-minimising"
NAN, INF = float("nan"), float("inf")
FORMATS = [
    BlockFormat(2, 64, FITTED, torch.bfloat16),
    BlockFormat(2, 50, "half-normal", torch.bfloat16, 25),
    BlockFormat(2, 62),
    BlockFormat(4, 47, FITTED, words=47),
    BlockFormat(1, 256, metadata=torch.bfloat16),
]


def data(kind, rows, width, dtype):
    x = values("normal" if kind == "not finite" else kind, rows * width, 5)
    if kind == "not finite":
        generator = torch.Generator().manual_seed(6)
        for value, share in ((INF, 0.01), (-INF, 0.01), (NAN, 0.001)):
            x[torch.rand(len(x), generator=generator) < share] = value
        x[: len(x) // 8] = -INF
    return x.to(dtype).view(rows, width)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("by_column", [False, True], ids=["as it is", "standardised"])
@pytest.mark.parametrize("specialised", [True, False], ids=["own code", "shared code"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_kind_of_data_is_encoded_as_by_the_reference(fmt, specialised, by_column, threads, monkeypatch):
    monkeypatch.setattr(cpu, "SPECIALISE", specialised)
    cpu.compiled.cache_clear()
    seed, fields = seed_tensor(2), (fmt.bits, fmt.block, fmt.levels, fmt.metadata, fmt.words)
    for dtype in FLOATS:
        for kind in (*KINDS, "not finite"):
            x = data(kind, 701, 50, dtype)  # more elements than one thread takes, and a tail
            columns = ()
            if by_column:
                columns = values("normal", 50, 7), values("normal", 50, 8).abs() + 0.1
                columns[0][3], columns[1][5], columns[1][6] = INF, 0.0, NAN
            reference = quantize_reference(x, seed, 1, fmt, *columns)
            assert_same_encoding(quantize(x, seed, 1, *fields, *columns), reference)
            expected = dequantize_reference(*reference, x.shape, dtype, fmt, *columns)
            assert_same_bits(dequantize(*reference, x.shape, dtype, *fields[:3], *columns), expected)
    cpu.compiled.cache_clear()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_nothing_is_written_behind_the_end(fmt, monkeypatch):
    """Outputs lie between margins, and are poisoned themselves."""
    kept = []

    def poisoned(like, size, dtype):
        numel = torch.Size(size).numel()
        whole = torch.full(((numel * dtype.itemsize + 128),), 0xA5, dtype=torch.uint8)
        kept.append((whole, numel * dtype.itemsize))
        return whole[64 : 64 + numel * dtype.itemsize].view(dtype).view(size)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, dtype: poisoned(None, size, dtype))
    monkeypatch.setattr(
        cpu,
        "empty_encoding",
        lambda x, fmt: (
            poisoned(x, (fmt.groups(x.numel()), fmt.words), torch.float32),
            *(poisoned(x, (fmt.groups(x.numel()), fmt.blocks_per_group), fmt.metadata) for _ in range(2)),
        ),
    )
    seed = seed_tensor(3)
    for numel in (1, fmt.group - 1, fmt.group, 3 * fmt.group + 1):
        for dtype in FLOATS:
            x = values("normal", numel, 1).to(dtype)
            library, native = cpu.compiled(fmt, dtype)
            assert library is not None and native.block == fmt.block
            parts = quantize(x, seed, 0, fmt.bits, fmt.block, fmt.levels, fmt.metadata, fmt.words)
            assert_same_encoding(parts, quantize_reference(x, seed, 0, fmt))
            dequantize(*parts, [numel], dtype, fmt.bits, fmt.block, fmt.levels)
            unpack_bits(pack_bits(x > 0, 3), [numel])
    monkeypatch.setattr(torch, "empty", empty)
    assert len(kept) == 4 * 3 * 6
    for whole, size in kept:
        assert (whole[:64] == 0xA5).all() and (whole[64 + size :] == 0xA5).all()


def test_columns_that_cannot_be_brought_back_are_left_as_they_are():
    x = torch.randn(64, 4)
    x[3, 1], x[5, 2] = INF, 1e30
    shift, scale = x.mean(0), torch.rsqrt(x.var(0))
    fields = 8, 64, "uniform", torch.float32, 16
    parts = quantize(x, seed_tensor(1), 0, *fields, shift, scale)
    decoded = dequantize(*parts, x.shape, x.dtype, *fields[:3], shift, scale)
    assert torch.equal(decoded.isfinite(), x.isfinite()) and decoded[3, 1] == INF


WITHOUT_COMPILER = """
import logging, sys
logging.basicConfig(format="%(levelname)s %(name)s %(message)s", stream=sys.stdout)
import torch
from actcompile.kernels import BlockFormat, dequantize, pack_bits, unpack_bits
from actcompile.kernels import quantize
from actcompile.kernels.blocks.quantize import dequantize_reference, quantize_reference
x, seed, fmt = torch.randn(3, 321), torch.randint(-(2**31), 2**31, (2, 2), dtype=torch.int32), BlockFormat()
fields = fmt.bits, fmt.block, fmt.levels, fmt.metadata, fmt.words
encoded, expected = quantize(x, seed, 1, *fields), quantize_reference(x, seed, 1, fmt)
assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(encoded, expected))
decoded = dequantize(*encoded, x.shape, x.dtype, *fields[:3])
assert torch.equal(decoded, dequantize_reference(*encoded, x.shape, x.dtype, fmt))
assert torch.equal(unpack_bits(pack_bits(x > 0, 8), x.shape), x > 0)
"""


def test_without_a_compiler_the_references_stand_in_and_a_warning_says_what_to_install(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("WARNING actcompile.kernels._cpp") == 1
    assert "Install g++" in finished.stdout


@pytest.mark.parametrize("words", [1, 3, 16, 25, 47])
def test_bits(words, threads):
    for numel in (0, 1, 1500 * 32 * words // 16, 32 * words * 40 - 1):
        mask = values("normal", numel, 3) > 0
        packed = pack_bits(mask, words)
        assert torch.equal(packed.view(torch.int32), pack_bits_reference(mask, words).view(torch.int32))
        assert torch.equal(unpack_bits(packed, [numel]), mask)
