"""`quantize` and `dequantize`: the ops equal the reference to the bit, the fakes tell the truth."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from actcompile.kernels import BlockFormat, dequantize, quantize
from actcompile.kernels.blocks.quantize import (
    dequantize_reference,
    quantize_reference,
    round_outward,
)
from tests.strategies import (
    ACTIVATIONS,
    FLOATS,
    any_strides,
    assert_same_bits,
    assert_same_encoding,
    formats,
    kinds,
    seed_tensor,
    seeds,
    sizes,
    values,
)

SEED = seed_tensor(1)


def fields(fmt):
    return fmt.bits, fmt.block, fmt.levels, fmt.metadata, fmt.words


def encode(x, fmt, salt=0, seed=SEED):
    return quantize(x, seed, salt, *fields(fmt))


def decode(parts, size, dtype, fmt):
    return dequantize(*parts, size, dtype, fmt.bits, fmt.block, fmt.levels)


# every bit pattern of float32 counts: NaN, infinities, zeros of both signs, denormals, the largest
float32_bits = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    st.sampled_from([0, -(2**31), 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F7F0000, 0x7F7F0001, 0x7F800000]),
    st.sampled_from([0x7F800001, 0x7FC00000, 0x0000FFFF, 0x00010000, 0x3F800000, 0x3F800001, 0x3F80FFFF]).map(
        lambda b: b - 2**31
    ),
)

infinite_or_none = st.sampled_from((None, float("inf"), -float("inf")))


@st.composite
def cases(draw, infinite=False):
    """A format, a tensor of any dtype, kind, shape and strides, a salt and a seed."""
    fmt = draw(formats())
    x = values(draw(kinds()), draw(sizes(fmt.group)), draw(seeds)).to(draw(st.sampled_from(FLOATS)))
    for odd in draw(st.lists(st.sampled_from((float("nan"), float("inf"), -float("inf"))), min_size=infinite)):
        if x.numel():
            x[draw(st.integers(0, x.numel() - 1))] = odd
    return fmt, draw(any_strides(x)), draw(st.integers(0, ACTIVATIONS - 1)), seed_tensor(draw(seeds))


@given(cases(), st.sampled_from(FLOATS))
def test_ops_equal_the_reference(case, dtype):
    fmt, x, salt, seed = case
    reference = quantize_reference(x, seed, salt, fmt)
    assert_same_encoding(encode(x, fmt, salt, seed), reference)
    decoded = decode(reference, x.shape, dtype, fmt)
    assert decoded.is_contiguous()
    assert_same_bits(decoded, dequantize_reference(*reference, x.shape, dtype, fmt))


@given(cases())
def test_strides_do_not_matter(case):
    fmt, x, salt, seed = case
    dense = x.clone(memory_format=torch.contiguous_format)
    assert_same_encoding(encode(x, fmt, salt, seed), encode(dense, fmt, salt, seed))


@given(formats(), st.data(), seeds)
def test_low_precision_input_is_read_as_float32(fmt, data, seed):
    x = values("normal", data.draw(sizes(fmt.group)), seed).to(data.draw(st.sampled_from(FLOATS)))
    assert_same_encoding(encode(x, fmt), encode(x.float(), fmt))


@given(cases(), st.sampled_from(FLOATS))
def test_fakes_agree_with_the_ops(case, dtype):
    fmt, x, salt, seed = case
    real = encode(x, fmt, salt, seed)
    real = (*real, decode(real, x.shape, dtype, fmt))
    with FakeTensorMode() as mode:
        fake = encode(mode.from_tensor(x), fmt, salt, mode.from_tensor(seed))
        fake = (*fake, decode(fake, x.shape, dtype, fmt))
    for ours, truth in zip(fake, real, strict=True):
        assert (ours.shape, ours.dtype) == (truth.shape, truth.dtype)
        assert ours.stride() == truth.stride() or not truth.numel()


@given(formats(), st.data(), seeds)
def test_fields_that_no_element_uses_are_zero_and_not_read(fmt, data, seed):
    numel = data.draw(sizes(fmt.group))
    x = values("normal", numel, seed)
    parts = encode(x, fmt)
    used = torch.zeros(parts[0].numel() * fmt.planes, dtype=torch.bool)
    i = torch.arange(numel)
    plane, j = i % fmt.group // fmt.words, i % fmt.group % fmt.words
    used[(i // fmt.group * fmt.planes + plane) * fmt.words + j] = True
    shifts = torch.arange(fmt.planes, dtype=torch.int32)[None, :, None] * fmt.bits
    code = (parts[0].view(torch.int32)[:, None, :] >> shifts) & fmt.top
    unused = ~used.view(code.shape)
    assert not code[unused].any()
    poison = torch.where(unused, fmt.top << shifts, 0).sum(1).to(torch.int32)  # disjoint fields: a sum is an or
    poisoned = (parts[0].view(torch.int32) | poison).view(torch.float32)
    assert_same_bits(decode((poisoned, *parts[1:]), (numel,), x.dtype, fmt), decode(parts, (numel,), x.dtype, fmt))


@given(formats(), st.integers(2, 5), st.data(), kinds(), seeds)
def test_nan_stays_in_its_block(fmt, blocks, data, kind, seed):
    numel = blocks * fmt.block
    x = values(kind, numel, seed)
    bad = data.draw(st.sets(st.integers(0, blocks - 1), min_size=1))
    clean = decode(encode(x, fmt), (numel,), torch.float32, fmt)
    for block in bad:
        for value in (data.draw(infinite_or_none), float("nan")):
            if value is not None:
                x[block * fmt.block + data.draw(st.integers(0, fmt.block - 1))] = value
    decoded = decode(encode(x, fmt), (numel,), torch.float32, fmt).view(blocks, fmt.block)
    for block in range(blocks):
        if block in bad:
            assert decoded[block].isnan().all()
        else:
            assert_same_bits(decoded[block], clean.view(blocks, fmt.block)[block])


@given(cases(infinite=True), st.sampled_from(FLOATS))
def test_infinities_come_back_and_leave_all_others_finite(case, dtype):
    fmt, x, salt, seed = case
    decoded = decode(encode(x, fmt, salt, seed), x.shape, dtype, fmt)
    block = (torch.arange(x.numel()) // fmt.block).view(x.shape)
    nan = torch.zeros(x.numel() // fmt.block + 1, dtype=torch.bool)
    nan[block[x.isnan()]] = True
    if fmt.bits == 1:  # no code is left for a finite element beside infinities of both signs
        signs = [torch.zeros_like(nan) for _ in range(2)]
        for sign, end in zip(signs, (float("inf"), -float("inf")), strict=True):
            sign[block[x == end]] = True
        nan |= signs[0] & signs[1]
    assert torch.equal(decoded.isnan(), nan[block])
    others = ~nan[block]
    assert torch.equal(decoded[others] == float("inf"), x[others] == float("inf"))
    assert torch.equal(decoded[others] == -float("inf"), x[others] == -float("inf"))


@given(formats(bits=st.sampled_from((2, 4, 8)), metadata=torch.float32), float32_bits, seeds, st.data())
def test_equal_elements_beside_infinities_decode_exactly(fmt, bits, seed, data):
    constant = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assume(bool(constant.isfinite()))
    x = constant.repeat(2 * fmt.block)
    for end in (float("inf"), -float("inf")):
        x[data.draw(st.lists(st.integers(0, len(x) - 1)))] = end
    assert torch.equal(decode(encode(x, fmt, seed=seed_tensor(seed)), x.shape, x.dtype, fmt), x)


def test_one_bit_keeps_infinities_of_one_sign_and_the_middle_of_the_rest():
    x = torch.tensor(
        [1.0, 2.0, -float("inf"), 5.0] + [0.5, 1.5, float("inf"), 1.5] + [1, 2, float("inf"), -float("inf")]
    )
    decoded = decode(encode(x, fmt := BlockFormat(1, 4)), (12,), x.dtype, fmt)
    assert decoded[:8].tolist() == [3.0, 3.0, -float("inf"), 3.0, 1.0, 1.0, float("inf"), 1.0]
    assert decoded[8:].isnan().all()


@pytest.mark.parametrize("fmt", [BlockFormat(4, 8), BlockFormat(2, 256)], ids=("blocks share words", "one block"))
def test_the_words_of_a_block_with_nan_hold_zeros_for_it(fmt):
    x = torch.arange(256.0)
    x[5] = float("nan")
    words = encode(x, fmt)[0].view(torch.int32)
    if fmt.blocks_per_group == 1:
        assert not words[0].any()
    else:
        assert not (words[0] & fmt.top).any() and (words[0] >> fmt.bits).any()


@given(st.lists(float32_bits, min_size=1, max_size=50))
def test_metadata_is_rounded_outward_to_the_nearest_bfloat16(bits):
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    low, high = round_outward(x, x, torch.bfloat16)
    for rounded in (low, high):
        assert_same_bits(rounded.bfloat16().float(), rounded)
        assert torch.equal(rounded.isnan(), x.isnan())
    finite = x.isfinite()
    assert (low[finite] <= x[finite]).all() and (high[finite] >= x[finite]).all()
    inside = finite & (x.abs() <= torch.finfo(torch.bfloat16).max)
    for rounded, toward in ((low, -1.0), (high, 1.0)):
        exact = x.bfloat16().float() == x
        assert torch.equal(rounded[exact & finite], x[exact & finite])
        back = torch.nextafter(rounded.bfloat16(), torch.tensor(-toward * float("inf"), dtype=torch.bfloat16)).float()
        not_closer = (back - x) * toward < 0  # the next bfloat16 on the other side is past x
        assert (not_closer | exact)[inside].all()
    assert torch.equal(low[x.isinf()], x[x.isinf()]) and torch.equal(high[x.isinf()], x[x.isinf()])


def test_what_bfloat16_cannot_bound_comes_back_as_its_largest_number():
    """Outward of float32's largest numbers bfloat16 has none but infinity, and a finite element is not infinite."""
    x = torch.full((256,), torch.finfo(torch.float32).max)
    x[::2] = 0
    fmt = BlockFormat(metadata=torch.bfloat16)
    expected = x.clamp(max=torch.finfo(torch.bfloat16).max)
    assert_same_bits(decode(encode(x, fmt), (256,), x.dtype, fmt), expected)
    assert_same_bits(decode(encode(-x, fmt), (256,), x.dtype, fmt), -expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(formats(), seeds)
def test_the_largest_finite_numbers_stay_finite(dtype, fmt, seed):
    most = torch.finfo(dtype).max
    x = torch.where(values("normal", 3 * fmt.group, seed) > 0, most, -most).to(dtype)
    assert decode(encode(x, fmt, seed=seed_tensor(seed)), x.shape, dtype, fmt).isfinite().all()


@given(formats(), st.data(), seeds)
def test_salt_and_seed_choose_the_bits_and_nothing_else_does(fmt, data, seed):
    numel = 4 * fmt.group + data.draw(st.integers(0, fmt.group - 1))
    x = values("normal", numel, seed)
    ours = encode(x, fmt, 1, seed_tensor(seed))
    assert_same_encoding(ours, encode(x, fmt, 1, seed_tensor(seed)))
    torch.rand(3)  # the default generator's state has no part in it
    assert_same_encoding(ours, encode(x, fmt, 1, seed_tensor(seed)))
    other = encode(x, fmt, 2, seed_tensor(seed)), encode(x, fmt, 1, seed_tensor(seed) + 1)
    for parts in other:
        assert_same_bits(parts[1], ours[1])
        assert_same_bits(parts[2], ours[2])
    if fmt.block >= 16:
        assert all(not torch.equal(parts[0].view(torch.int32), ours[0].view(torch.int32)) for parts in other)


OPCHECKED = {
    "whole groups": (BlockFormat(2, 64), (4, 64)),
    "tail": (BlockFormat(2, 47, "variance-minimising"), (3, 5)),
    "bfloat16 metadata": (BlockFormat(8, 100, metadata=torch.bfloat16), (7, 30)),
    "several blocks in a group": (BlockFormat(4, 16, metadata=torch.bfloat16), (5, 9)),
    "one bit": (BlockFormat(1, 32), (2, 50)),
    "explicit levels": (BlockFormat(2, 64, "0,0.4,1.3,3"), (3, 50)),
    "empty": (BlockFormat(), (0, 7)),
    "scalar": (BlockFormat(4, 1), ()),
}


@pytest.mark.parametrize("name", OPCHECKED)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck(name, dtype):
    """Most elements are small: opcheck compares words as floats, so no word may happen to be the bits of a NaN."""
    fmt, size = OPCHECKED[name]
    x = (torch.rand(size, generator=torch.Generator().manual_seed(3)) ** 40).to(dtype)
    x = x.t() if x.dim() == 2 and name != "empty" else x
    torch.library.opcheck(quantize.overload, (x, SEED, 2, *fields(fmt)))
    parts = encode(x, fmt)
    torch.library.opcheck(dequantize.overload, (*parts, list(x.shape), dtype, fmt.bits, fmt.block, fmt.levels))


GRAPHS = [
    BlockFormat(2, 47),
    BlockFormat(2, 64, "0,0.4,1.3,3"),
    BlockFormat(4, 16, "variance-minimising", torch.bfloat16),
]


@pytest.mark.parametrize("fmt", GRAPHS, ids=str)
def test_one_graph_serves_every_number_of_rows(fmt):
    def through(x, seed):
        parts = encode(x, fmt, seed=seed)
        return *parts, decode(parts, x.shape, x.dtype, fmt)

    graph = make_fx(through, tracing_mode="symbolic")(torch.randn(40, 47), SEED)
    for rows in (40, 3, 16, 200):
        x = torch.randn(rows, 47)
        *found, decoded = graph(x, SEED)
        reference = quantize_reference(x, SEED, 0, fmt)
        assert_same_encoding(tuple(found), reference)
        assert_same_bits(decoded, dequantize_reference(*reference, x.shape, x.dtype, fmt))
