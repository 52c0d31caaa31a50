"""The Triton kernels in Triton's interpreter against the reference; `test_triton.py` runs this file in a process of its
own, since the interpreter has to be chosen before Triton is imported.

Everything that a kernel is handed lies between margins: inputs between NaN, outputs, poisoned themselves, between a
sentinel. What is read or written out of bounds, or not written at all, shows.
"""

import mmap
import os

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from actcompile.kernels import BlockFormat, bit_words
from actcompile.kernels.bits.lossless import pack_bits_reference
from actcompile.kernels.bits.triton_lossless import pack_bits_triton, pack_into, unpack_bits_triton, unpack_into
from actcompile.kernels.blocks.quantize import dequantize_reference, quantize_reference, standardised
from actcompile.kernels.blocks.triton_dequantize import dequantize_into, dequantize_triton
from actcompile.kernels.blocks.triton_quantize import quantize_into, quantize_triton
from actcompile.kernels.blocks.triton_tile import WARPS, Tile
from tests.strategies import (
    FLOATS,
    any_strides,
    assert_same_bits,
    assert_same_encoding,
    formats,
    kinds,
    seeds,
    sizes,
    values,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton.py"

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
FEW = 8 if settings.get_current_profile_name() == "ci" else 100  # the interpreter takes a second for each
few = settings(max_examples=FEW, phases=(Phase.explicit, Phase.generate))  # shrinking takes minutes here
MARGIN, SENTINEL = 64, 0xA5
LOPSIDED = "0,0.2,0.5,0.9,1.4,2,2.7,3.5,4.4,5.4,6.5,7.7,9,11,13,15"
ODD = st.sampled_from((float("nan"), float("inf"), -float("inf")))


class Poisoned:
    """A tensor full of a sentinel, with margins of the same on both sides."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        size = torch.Size(shape).numel() * dtype.itemsize
        self._bytes = torch.full((2 * MARGIN + size,), SENTINEL, dtype=torch.uint8)
        self.tensor = self._bytes[MARGIN : MARGIN + size].view(dtype).view(shape)

    def check(self) -> Tensor:
        margins = torch.cat([self._bytes[:MARGIN], self._bytes[-MARGIN:]])
        assert (margins == SENTINEL).all(), "written out of bounds"
        return self.tensor


def between(x: Tensor, outside: float) -> Tensor:
    """`x` between margins of `outside`."""
    padded = torch.full((x.numel() + 2 * MARGIN,), outside, dtype=x.dtype)
    padded[MARGIN : MARGIN + x.numel()] = x.reshape(-1)
    return padded[MARGIN : MARGIN + x.numel()].view(x.shape)


def seed_rows(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (3, 2), dtype=torch.int32, generator=generator)


@st.composite
def tiles(draw, words: int) -> Tile:
    """Small tiles, since the interpreter is slow; one group in several steps, too."""
    width = 1 << (words - 1).bit_length()
    if width > 2 and draw(st.integers(0, 3)) == 0:
        return Tile(1, width // draw(st.sampled_from((2, 4))) or 1, WARPS)
    return Tile(draw(st.sampled_from((1, 2, 4))), width, WARPS)


@st.composite
def cases(draw):
    fmt, dtype = draw(formats()), draw(st.sampled_from(FLOATS))
    # the interpreter reads denormals of bfloat16 as normal numbers: they are seen on a GPU only
    kind = draw(kinds(without=("denormal",) if torch.bfloat16 in (dtype, fmt.metadata) else ()))
    x = values(kind, draw(sizes(fmt.group)), draw(seeds))
    if x.numel() and draw(st.integers(0, 3)) == 0:
        x[draw(st.integers(0, x.numel() - 1))] = draw(ODD)
    return x.to(dtype), fmt, draw(tiles(fmt.words)), draw(seeds), draw(st.integers(0, 2))


@given(cases())
@example((torch.randn(333), BlockFormat(1, 8), Tile(2, 8, WARPS), 1, 0))
@example((torch.randn(1), BlockFormat(8, 1), Tile(4, 1, WARPS), 2, 1))
@example((torch.randn(200), BlockFormat(2, 64, "0,0.4,1.3,3"), Tile(2, 8, WARPS), 3, 2))
@example((torch.randn(200), BlockFormat(4, 47, LOPSIDED), Tile(2, 8, WARPS), 4, 0))
@few
def test_quantize(case):
    x, fmt, tile, seed, salt = case
    groups = fmt.groups(x.numel())
    words = Poisoned((groups, fmt.words), torch.int32)
    low, high = (Poisoned((groups, fmt.blocks_per_group), fmt.metadata) for _ in range(2))
    quantize_into(
        between(x, float("nan")), seed_rows(seed), salt, fmt, words.tensor, low.tensor, high.tensor, tile=tile
    )
    ours = words.check().view(torch.float32), low.check(), high.check()
    assert_same_encoding(ours, quantize_reference(x, seed_rows(seed), salt, fmt))


@given(cases())
@example((torch.tensor([3.4e38, -3.4e38, 0.0, 1e38]), BlockFormat(8, 4, "uniform"), Tile(2, 1, WARPS), 1, 0))
@example((torch.randn(200), BlockFormat(2, 64, "0,0.4,1.3,3"), Tile(2, 8, WARPS), 3, 2))
@example((torch.randn(200), BlockFormat(4, 47, LOPSIDED), Tile(2, 8, WARPS), 4, 0))
@few
def test_dequantize(case):
    x, fmt, tile, seed, salt = case
    words, low, high = quantize_reference(x, seed_rows(seed), salt, fmt)
    # the interpreter rounds to bfloat16 by itself and not to nearest even: that is seen on a GPU, and in the PTX
    dtype = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    out = Poisoned((x.numel(),), dtype)
    arguments = between(words.view(torch.int32), -1), between(low, float("nan")), between(high, float("nan"))
    dequantize_into(*arguments, out.tensor, fmt, tile=tile)
    assert_same_bits(out.check(), dequantize_reference(words, low, high, [x.numel()], dtype, fmt))


@st.composite
def units(draw, columns: int) -> tuple[Tensor | None, Tensor]:
    """A shift, or none, and a scale of so many columns; some of them can't be undone."""
    generator = torch.Generator().manual_seed(draw(seeds))
    shift, scale = torch.randn(2, columns, generator=generator) * draw(st.sampled_from((1e-3, 1.0, 1e4, 1e30)))
    for row in (shift, scale):
        if draw(st.booleans()):
            row[draw(st.integers(0, columns - 1))] = draw(st.sampled_from((float("nan"), float("inf"), 0.0, 1e-40)))
    return draw(st.sampled_from((shift, None))), scale


@given(cases(), st.integers(1, 70), st.data())
@few
def test_standardised_columns(case, columns, data):
    x, fmt, tile, seed, salt = case
    x = x[: x.numel() // columns * columns].view(-1, columns)
    shift, scale = data.draw(units(columns))
    groups = fmt.groups(x.numel())
    words = Poisoned((groups, fmt.words), torch.int32)
    low, high = (Poisoned((groups, fmt.blocks_per_group), fmt.metadata) for _ in range(2))
    by = between(scale, float("nan"))
    to = None if shift is None else between(shift, float("nan"))
    by_column = {"shift": to, "scale": by, "columns": columns}
    given_x = between(x, float("nan")).view(-1)
    quantize_into(given_x, seed_rows(seed), salt, fmt, words.tensor, low.tensor, high.tensor, tile=tile, **by_column)
    ours = words.check().view(torch.float32), low.check(), high.check()
    assert_same_encoding(ours, quantize_reference(standardised(x, shift, scale), seed_rows(seed), salt, fmt))
    dtype = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    out = Poisoned((x.numel(),), dtype)
    dequantize_into(words.tensor, low.tensor, high.tensor, out.tensor, fmt, tile=tile, **by_column)
    expected = dequantize_reference(*ours, list(x.shape), dtype, fmt, shift, scale)
    assert_same_bits(out.check(), expected.view(-1))


@given(st.integers(1, 20), st.data())
@few
def test_bits(words, data):
    numel = data.draw(sizes(32 * words, 3))
    tile = data.draw(tiles(words))
    mask = torch.rand(numel, generator=torch.Generator().manual_seed(data.draw(seeds))) < 0.4
    packed = Poisoned(bit_words(numel, words), torch.int32)
    pack_into(between(mask.view(torch.uint8), 1), packed.tensor, tile=tile)
    assert torch.equal(packed.check(), pack_bits_reference(mask, words).view(torch.int32))
    out = Poisoned((numel,), torch.uint8)
    unpack_into(between(packed.tensor, -1), out.tensor, tile=tile)
    assert torch.equal(out.check(), mask.view(torch.uint8))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("numel", [0, 1, 32 * 256, 33 * 256 - 1])
def test_the_tiles_that_are_launched_on_a_gpu(bits, numel):
    fmt, x, seed = BlockFormat(bits), torch.randn(numel).half(), seed_rows(bits)
    encoded = quantize_triton(x, seed, 2, fmt)
    assert_same_encoding(encoded, quantize_reference(x, seed, 2, fmt))
    decoded = dequantize_triton(*encoded, [numel], torch.float32, fmt)
    assert_same_bits(decoded, dequantize_reference(*encoded, [numel], torch.float32, fmt))
    packed = pack_bits_triton(x > 0, 8)
    assert torch.equal(packed.view(torch.int32), pack_bits_reference(x > 0, 8).view(torch.int32))
    assert torch.equal(unpack_bits_triton(packed, [numel]), x > 0)


@given(st.data())
@few
def test_any_shape_and_strides(data):
    fmt = BlockFormat(2, 16, words=1)
    x = data.draw(any_strides(values("normal", data.draw(sizes(16)), 7)))
    seed = seed_rows(7)[:, [1, 0]]
    encoded = quantize_triton(x, seed, 1, fmt)
    assert_same_encoding(encoded, quantize_reference(x, seed, 1, fmt))
    decoded = dequantize_triton(*encoded, list(x.shape), torch.float32, fmt)
    assert_same_bits(decoded, dequantize_reference(*encoded, list(x.shape), torch.float32, fmt))
    mask = data.draw(any_strides(values("normal", 100, 8) > 0))
    assert torch.equal(unpack_bits_triton(pack_bits_triton(mask, 3), list(mask.shape)), mask)


def reserved(numel: int, dtype: torch.dtype) -> Tensor:
    """A tensor of zeros in address space that takes memory only where it is touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype, count=numel)


FAR = [
    (BlockFormat(2), torch.float32, 2**23 - 3, 5 * 256),  # elements 2**31 and on
    (BlockFormat(8, 64), torch.float16, 2**28 - 1, 3 * 64 - 5),  # word 2**32 and on, where the hash's index wraps
    (BlockFormat(8, 2**14), torch.float16, 2**17 - 1, 2**14 + 100),  # elements 2**31 and on, groups in several steps
]


@pytest.mark.parametrize(("fmt", "dtype", "first", "numel"), FAR)
def test_offsets_past_2_to_the_31_elements(fmt, dtype, first, numel):
    everything = first * fmt.group + numel
    groups = fmt.groups(everything)
    try:
        x = reserved(everything, dtype)
        words = reserved(groups * fmt.words, torch.int32).view(groups, fmt.words)
        low, high = (reserved(groups, torch.float32).view(groups, 1) for _ in range(2))
    except OSError as error:
        pytest.skip(f"no address space for {everything} elements: {error}")
    x[-numel:] = torch.randn(numel)
    seed, shifted = seed_rows(3), seed_rows(3)
    shifted[0, 0] = (int(seed[0, 0]) + first * fmt.words + 2**31) % 2**32 - 2**31  # the hash adds the index to the seed
    tile = Tile(1, 1024, WARPS) if fmt.words > 1024 else Tile(2, fmt.words, WARPS)
    quantize_into(x, seed, 0, fmt, words, low, high, first, tile)
    ours = words[first:].view(torch.float32), low[first:], high[first:]
    assert_same_encoding(ours, quantize_reference(x[-numel:], shifted, 0, fmt))
    decoded = x[-numel:].float()
    x[-numel:] = 0
    dequantize_into(words, low, high, x, fmt, first, tile)
    assert_same_bits(x[-numel:], dequantize_reference(*ours, [numel], dtype, fmt))
    assert (x[-numel:].float() - decoded).abs().max() <= (high - low)[first:].max()


def test_offsets_of_bits_past_2_to_the_31_elements():
    words, first, numel = 4, 2**24 - 2, 5 * 128 - 3
    groups = bit_words(first * 32 * words + numel, words)[0]
    try:
        mask, packed = reserved(first * 32 * words + numel, torch.uint8), reserved(groups * words, torch.int32)
    except OSError as error:
        pytest.skip(f"no address space for the mask: {error}")
    bits = torch.rand(numel) < 0.5
    mask[-numel:] = bits
    pack_into(mask, packed.view(groups, words), first, Tile(2, words, WARPS))
    expected = pack_bits_reference(bits, words).view(torch.int32)
    assert torch.equal(packed.view(groups, words)[first:], expected)
    mask[-numel:] = 2
    unpack_into(packed.view(groups, words), mask, first, Tile(2, words, WARPS))
    assert torch.equal(mask[-numel:].bool(), bits)
