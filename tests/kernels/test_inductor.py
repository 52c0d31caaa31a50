"""The ops called from graphs that Inductor compiles equal the reference to the bit, on every kind of data.

Encoding and decoding are compiled together but on separate inputs, so that no intermediate value can be handed over
without passing through its encoded form.
"""

import pytest
import torch

from actcompile.kernels import BlockFormat
from actcompile.kernels.bits.lossless import pack_bits_reference
from actcompile.kernels.blocks.quantize import dequantize_reference, quantize_reference
from tests.strategies import KINDS, assert_same_bits, assert_same_encoding, seed_tensor, values

pytestmark = pytest.mark.slow
ops = torch.ops.actcompile


@pytest.fixture(scope="module", autouse=True)
def threads():
    """As many threads as there are, so that Inductor writes its parallel loops."""


@pytest.fixture(autouse=True)
def no_caches():
    """Outside the product's partitioner no cache knows that a lowering has changed; formats are a graph's constants."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def coding(fmt, bit_words):
    """A function that encodes `x` and `mask`, and decodes what else it is given."""

    def run(x, seed, mask, words, low, high, packed):
        fields = fmt.bits, fmt.block, fmt.levels, fmt.metadata, fmt.words
        encoded = ops.quantize(x, seed, 1, *fields)
        decoded = ops.dequantize(words, low, high, x.shape, x.dtype, *fields[:3])
        return encoded, decoded, ops.pack_bits(mask, bit_words), ops.unpack_bits(packed, mask.shape)

    return run


def arguments(x, fmt, bit_words, seed):
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(9)) < 0.5
    return x, seed, mask, *quantize_reference(x, seed, 1, fmt), pack_bits_reference(mask, bit_words)


def check(run, x, fmt, bit_words, seed):
    *inputs, packed = arguments(x, fmt, bit_words, seed)
    mask, *reference = inputs[2:]
    encoded, decoded, packed_mask, unpacked = run(*inputs, packed)
    assert_same_encoding(encoded, reference)
    assert_same_bits(decoded, dequantize_reference(*reference, x.shape, x.dtype, fmt))
    assert torch.equal(packed_mask.view(torch.int32), packed.view(torch.int32))
    assert torch.equal(unpacked, mask)


def data(kind, rows, width, dtype):
    """One kind of values; with some rows that NaN and infinities make not finite, under the name "not finite"."""
    x = values("normal" if kind == "not finite" else kind, rows * width, 5).view(rows, width)
    if kind == "not finite":
        x[1, 3] = float("nan")
        x[rows // 2, 0] = float("inf")
        x[rows // 2 + 2, :3] = -float("inf")
        x[-1, -1] = float("nan")
    return x.to(dtype)


# format, rows, width, dtype, words of a group of the mask, whether a tail is left over
FORMATS = {
    "aligned": (BlockFormat(2, 256), 24, 256, torch.float32, 64, False),
    "bfloat16": (BlockFormat(4, 16, "variance-minimising", torch.bfloat16), 32, 64, torch.bfloat16, 16, False),
    "explicit levels": (BlockFormat(2, 64, "0,0.4,1.3,3"), 21, 50, torch.float32, 16, True),
    "8 bits": (BlockFormat(8, 100, "variance-minimising"), 19, 50, torch.float16, 7, True),
    "short blocks": (BlockFormat(2, 64, "variance-minimising"), 24, 64, torch.float32, 16, False),
    "a plane without elements": (BlockFormat(2, 100, metadata=torch.bfloat16), 20, 50, torch.float32, 16, False),
    "unused slots": (BlockFormat(2, 62, "uniform", torch.bfloat16), 31, 62, torch.float32, 16, False),
}


@pytest.mark.parametrize("name", FORMATS)
def test_static_sizes(name):
    fmt, rows, width, dtype, bit_words, tail = FORMATS[name]
    assert tail == (rows * width % fmt.group != 0)
    run = torch.compile(coding(fmt, bit_words), fullgraph=True, dynamic=False)
    failed = {}
    for kind in (*KINDS, "not finite"):
        x = data(kind, rows, width, dtype)
        try:
            check(run, x, fmt, bit_words, seed_tensor(3))
        except AssertionError as error:
            failed[kind] = str(error)
    assert not failed


def test_an_odd_width_and_a_changing_number_of_rows():
    fmt = BlockFormat(2, 47)
    run = torch.compile(coding(fmt, 3), fullgraph=True)
    example = arguments(data("normal", 64, 47, torch.float32), fmt, 3, seed_tensor(4))
    for tensor in example:
        if tensor.shape[0] != len(seed_tensor(4)):
            torch._dynamo.mark_dynamic(tensor, 0)  # public in all but its name
    run(*example)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (5, 64, 333):
            for kind in ("normal", "not finite", "mixed magnitudes"):
                check(run, data(kind, rows, 47, torch.float32), fmt, 3, seed_tensor(rows))
