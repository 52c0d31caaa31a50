"""The Triton kernels against the reference: in Triton's interpreter, and on a GPU where there is one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actcompile.kernels import BlockFormat, dequantize, pack_bits, quantize, unpack_bits
from actcompile.kernels.bits.lossless import pack_bits_reference
from actcompile.kernels.blocks.quantize import dequantize_reference, quantize_reference
from tests.strategies import FLOATS, assert_same_bits, assert_same_encoding, values

ROOT = Path(__file__).resolve().parents[3]
no_gpu = not torch.cuda.is_available()
FITTED = "variance-minimising"
LOPSIDED = "0,0.2,0.5,0.9,1.4,2,2.7,3.5,4.4,5.4,6.5,7.7,9,11,13,15"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter():
    cases = Path(__file__).parents[1] / "interpreted.py"
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]
    assert " passed" in finished.stdout


WITHOUT_TRITON = """
import logging, sys
sys.modules["triton"] = None  # what an import finds where it is not installed
logging.basicConfig(format="%(levelname)s %(name)s %(message)s", stream=sys.stdout)
import torch
from actcompile.kernels import BlockFormat
from actcompile.kernels.cuda import forms
from actcompile.kernels.bits.lossless import pack_bits_reference
from actcompile.kernels.blocks.quantize import dequantize_reference, quantize_reference
x, seed, fmt = torch.randn(3, 321), torch.randint(-(2**31), 2**31, (2, 2), dtype=torch.int32), BlockFormat()
encoded, expected = forms().quantize(x, seed, 1, fmt), quantize_reference(x, seed, 1, fmt)
assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(encoded, expected))
decoded = forms().dequantize(*encoded, x.shape, x.dtype, fmt)
assert torch.equal(decoded, dequantize_reference(*encoded, x.shape, x.dtype, fmt))
packed = forms().pack_bits(x > 0, 8)
assert torch.equal(packed.view(torch.int32), pack_bits_reference(x > 0, 8).view(torch.int32))
assert torch.equal(forms().unpack_bits(packed, x.shape), x > 0)
"""


def test_without_triton_the_references_stand_in_and_one_warning_says_what_to_install():
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("WARNING actcompile.kernels.cuda") == 1
    assert "pip install triton" in finished.stdout


def test_importing_the_kernels_does_not_import_the_triton_kernels():
    code = (
        "import sys, actcompile.kernels; print(*[m for m in sys.modules if m.startswith('actcompile.kernels.triton')])"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.split() == []


GPU_FORMATS = [
    BlockFormat(),
    BlockFormat(2, 64, "variance-minimising", torch.bfloat16),
    BlockFormat(1),
    BlockFormat(4, 256, FITTED),
    BlockFormat(8, 100, FITTED, torch.bfloat16),
    BlockFormat(2, 47),
    BlockFormat(2, 32, FITTED, torch.bfloat16),
    BlockFormat(1, 8),
    BlockFormat(8, 8192),
    BlockFormat(2, 1),
    BlockFormat(2, 64, "0,0.4,1.3,3"),
    BlockFormat(4, 256, LOPSIDED, torch.bfloat16),
]


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu, reason="no CUDA device")
@pytest.mark.parametrize("kind", ["normal", "half zero", "huge", "denormal", "not finite"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fmt", GPU_FORMATS, ids=repr)
def test_quantize_and_dequantize_on_a_gpu(fmt, dtype, kind):
    seed = torch.randint(-(2**31), 2**31, (3, 2), dtype=torch.int32)
    for numel in (0, 1, 70 * fmt.group, 131 * fmt.group - 1):
        x = values("normal" if kind == "not finite" else kind, numel, 1).to(dtype)
        if kind == "not finite" and numel:
            x[numel // 2], x[numel // 3] = float("nan"), float("inf")
        fields = fmt.bits, fmt.block, fmt.levels, fmt.metadata, fmt.words
        encoded = quantize(x.cuda(), seed.cuda(), 1, *fields)
        expected = quantize_reference(x, seed, 1, fmt)
        assert_same_encoding(tuple(t.cpu() for t in encoded), expected)
        decoded = dequantize(*encoded, [numel], dtype, fmt.bits, fmt.block, fmt.levels)
        assert_same_bits(decoded.cpu(), dequantize_reference(*expected, [numel], dtype, fmt))


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu, reason="no CUDA device")
@pytest.mark.parametrize("words", [1, 3, 8, 16, 100, 3000])
def test_bits_on_a_gpu(words):
    for numel in (0, 1, 131 * 32 * words, 131 * 32 * words - 1):
        mask = torch.rand(numel) < 0.5
        packed = pack_bits(mask.cuda(), words)
        expected = pack_bits_reference(mask, words)
        assert torch.equal(packed.cpu().view(torch.int32), expected.view(torch.int32))
        assert torch.equal(unpack_bits(packed, [numel]).cpu(), mask)


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu, reason="no CUDA device")
def test_strides_on_a_gpu():
    x, seed = torch.randn(300, 128).cuda().t(), torch.randint(-(2**31), 2**31, (3, 2), dtype=torch.int32).cuda()
    fields = 2, 100, "uniform", torch.float32, 0
    for view in (x, x[:, ::2], x[0], x[:, 1:], x[:1].expand(4, -1)):
        ours, copied = quantize(view, seed, 2, *fields), quantize(view.clone().contiguous(), seed, 2, *fields)
        assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(ours, copied, strict=True))
