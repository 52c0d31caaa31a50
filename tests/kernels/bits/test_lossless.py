"""`pack_bits`, `unpack_bits`, `narrow`, `widen`: what goes in comes out, from any shape and strides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from actcompile.kernels import bit_words, narrow, pack_bits, unpack_bits, widen
from actcompile.kernels.bits.lossless import (
    pack_bits_reference,
    unpack_bits_reference,
)
from tests.strategies import any_strides, seeds, sizes

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def random_mask(numel, seed, density=0.5):
    return torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < density


@st.composite
def masks(draw, words):
    mask = random_mask(draw(sizes(32 * words)), draw(seeds), draw(st.sampled_from((0.0, 0.1, 0.5, 1.0))))
    return draw(any_strides(mask.float())) == 1.0


def same_words(ours, reference):
    assert ours.dtype == reference.dtype == torch.float32
    assert torch.equal(ours.view(torch.int32), reference.view(torch.int32))


@given(st.data(), st.integers(1, 40))
def test_masks_come_back(data, words):
    mask = data.draw(masks(words))
    packed = pack_bits(mask, words)
    assert packed.shape == bit_words(mask.numel(), words)
    unpacked = unpack_bits(packed, mask.shape)
    assert unpacked.is_contiguous() and torch.equal(unpacked, mask)


@given(st.data(), st.integers(1, 40))
def test_ops_equal_the_reference(data, words):
    mask = data.draw(masks(words))
    reference = pack_bits_reference(mask, words)
    same_words(pack_bits(mask, words), reference)
    assert torch.equal(unpack_bits(reference, mask.shape), unpack_bits_reference(reference, mask.shape))


@given(st.integers(1, 40), st.integers(0, 5000))
def test_the_bits_lie_where_the_layout_says_and_unused_ones_are_zero(words, numel):
    packed = pack_bits(torch.ones(numel, dtype=torch.bool), words).view(torch.int32)
    for group in range(packed.shape[0]):
        used = min(numel - group * 32 * words, 32 * words)
        for j in range(words):
            ones = len(range(j, used, words))  # bit k of word j is element k * words + j
            assert int(packed[group, j]) & (2**32 - 1) == 2**ones - 1


@given(st.integers(1, 40), st.integers(1, 5000), seeds)
def test_unused_bits_are_not_read(words, numel, seed):
    mask = random_mask(numel, seed)
    packed = pack_bits(mask, words).view(torch.int32).clone()
    poison = ~pack_bits(torch.ones(numel, dtype=torch.bool), words).view(torch.int32)
    assert torch.equal(unpack_bits((packed | poison).view(torch.float32), (numel,)), mask)


@given(st.data(), st.sampled_from(INTEGERS), st.sampled_from(INTEGERS), st.integers(0, 300), seeds)
def test_integers_that_fit_come_back(data, wide, small, numel, seed):
    fits = torch.iinfo(small if torch.iinfo(small).bits <= torch.iinfo(wide).bits else wide)
    low = max(fits.min, torch.iinfo(wide).min, torch.iinfo(small).min)
    high = min(fits.max, torch.iinfo(wide).max, torch.iinfo(small).max)
    drawn = torch.randint(low, high, (numel,), generator=torch.Generator().manual_seed(seed), dtype=torch.int64)
    if numel:
        drawn[0], drawn[-1] = low, high
    x = drawn.to(wide)
    if numel and data.draw(st.booleans()):
        x = x.expand(3, numel).t()
    narrowed = narrow(x, small)
    assert narrowed.dtype == small and narrowed.shape == x.shape
    assert narrowed.data_ptr() != x.data_ptr() or numel == 0
    assert torch.equal(widen(narrowed, wide), x)


def strided_masks():
    """Few true values: opcheck compares words as floats, so no word may happen to be the bits of a NaN."""
    base = random_mask(24 * 16, 0, density=0.1).view(24, 16)
    return {
        "whole groups": random_mask(960, 1, density=0.1),
        "contiguous": base,
        "transposed": base.t(),
        "sliced": base[:, ::3],
        "expanded": base[:1].expand(5, 16),
        "empty": base[:0],
        "scalar": base[0, 0],
    }


@pytest.mark.parametrize("name", strided_masks())
def test_opcheck_of_bits(name):
    mask = strided_masks()[name]
    torch.library.opcheck(pack_bits.overload, (mask, 3))
    torch.library.opcheck(unpack_bits.overload, (pack_bits(mask, 3), list(mask.shape)))


@pytest.mark.parametrize("name", strided_masks())
def test_opcheck_of_integers(name):
    x = strided_masks()[name]
    torch.library.opcheck(narrow.overload, (x.to(torch.int64), torch.int16))
    torch.library.opcheck(widen.overload, (x.to(torch.int16), torch.int64))


def test_one_graph_serves_every_number_of_rows():
    def round_trip(mask, index):
        packed = pack_bits(mask, 5)
        return packed, unpack_bits(packed, mask.shape), widen(narrow(index, torch.int32), torch.int64)

    example = random_mask(30 * 47, 0).view(30, 47), torch.arange(30)
    graph = make_fx(round_trip, tracing_mode="symbolic")(*example)
    for rows in (30, 2, 33, 1000):
        mask, index = random_mask(rows * 47, rows).view(rows, 47), torch.arange(rows) * 1000
        packed, back, widened = graph(mask, index)
        same_words(packed, pack_bits_reference(mask, 5))
        assert torch.equal(back, mask) and torch.equal(widened, index)
