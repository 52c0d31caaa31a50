"""`BlockFormat`: bytes, groups, and errors that name the field."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from actcompile.kernels import BlockFormat, bit_words, quantize
from actcompile.kernels.blocks.format import GRID, levels_text
from actcompile.kernels.blocks.levels import level_values
from tests.strategies import explicit_levels, formats, seed_tensor, sizes, words_choices


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 0),
        ("bits", 3),
        ("bits", 16),
        ("bits", "2"),
        ("block", 0),
        ("block", -4),
        ("block", 2.5),
        ("block", None),
        ("levels", "optimal"),
        ("levels", None),
        ("levels", (0, 0.8, 2.1, 3)),
        ("levels", ""),
        ("levels", "0,1,,3"),
        ("levels", "0,0.8,3"),
        ("levels", "0,0.5,1,2,3"),
        ("levels", "0,2.1,0.8,3"),
        ("levels", "0,1,1.0000001,3"),
        ("levels", "0.1,1,2,3"),
        ("levels", "0,1,2,2.9"),
        ("levels", "0,1,nan,3"),
        ("levels", "0,1,inf,3"),
        ("levels", "-0.5,1,2,3"),
        ("metadata", torch.float16),
        ("metadata", "bfloat16"),
        ("words", 7),
        ("words", 10**6),
    ],
)
def test_an_error_names_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}"):
        BlockFormat(**{field: value})


@pytest.mark.parametrize(("bits", "levels"), [(1, "0,1"), (8, levels_text(range(256)))])
def test_bits_without_explicit_levels_say_so(bits, levels):
    with pytest.raises(ValueError, match=f"^levels must be one of .* for {bits} bits, explicit ones are for 2 and 4"):
        BlockFormat(bits, levels=levels)


@given(st.sampled_from((2, 4)), st.data())
def test_explicit_levels_have_one_spelling(bits, data):
    text = data.draw(explicit_levels(bits))
    fmt = BlockFormat(bits, 64, text)
    values = level_values(bits, 64, fmt.levels)
    assert fmt.levels == text == levels_text(values)
    other = ", ".join(f"{value:.9e}" for value in values)
    assert BlockFormat(bits, 64, other) == fmt and hash(BlockFormat(bits, 64, other)) == hash(fmt)


@given(st.integers(0, 255 * GRID))
def test_a_level_is_spelled_in_the_fewest_decimals(place):
    text = levels_text([place / GRID])
    assert round(float(text) * GRID) == place
    shorter = f"{place / GRID:.{max(0, len(text.partition('.')[2]) - 1)}f}"
    assert shorter == text or round(float(shorter) * GRID) != place


def test_levels_keep_the_decimals_they_are_given():
    assert BlockFormat(2, 64, "0,0.8,2.1,3").levels == "0,0.8,2.1,3"
    with pytest.raises(ValueError, match="^levels must be finite"):
        levels_text([0, float("nan"), 2, 3])


@pytest.mark.parametrize(("bits", "words"), [(2, -2), (2, -1), (2, 1.0), (2.0, 1), (True, 1)])
def test_negative_words_and_numbers_of_another_type_are_refused(bits, words):
    with pytest.raises(ValueError, match="^(bits|words)"):
        BlockFormat(bits=bits, block=16, words=words)


@given(formats())
def test_a_group_is_whole_blocks_of_whole_planes_or_one_block(fmt):
    slots = fmt.words * 32 // fmt.bits
    assert fmt.planes == 32 // fmt.bits
    assert fmt.top == 2**fmt.bits - 1
    assert fmt.group == fmt.block * fmt.blocks_per_group
    assert 0 <= slots - fmt.group < fmt.planes
    if fmt.blocks_per_group > 1:
        assert fmt.group == slots and fmt.block % fmt.words == 0


@given(st.sampled_from((1, 2, 4, 8)), st.integers(1, 300), st.integers(1, 80))
def test_words_are_accepted_exactly_where_they_fit(bits, block, words):
    if words in words_choices(bits, block):
        assert BlockFormat(bits=bits, block=block, words=words).words == words
    elif words <= 64:
        with pytest.raises(ValueError, match="^words"):
            BlockFormat(bits=bits, block=block, words=words)


@given(formats(blocks=st.integers(1, 130), levels="uniform"), st.data())
def test_nbytes_is_what_the_tensors_take(fmt, data):
    numel = data.draw(sizes(fmt.group))
    parts = quantize(torch.randn(numel), seed_tensor(0), 0, fmt.bits, fmt.block, fmt.levels, fmt.metadata, fmt.words)
    assert fmt.nbytes(numel) == sum(part.nbytes for part in parts)
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts), "a view keeps more memory alive"


@given(formats(levels="uniform"), st.integers(0, 2**45))
def test_groups_hold_all_elements_and_not_one_group_more(fmt, numel):
    groups = fmt.groups(numel)
    assert (groups - 1) * fmt.group < numel <= groups * fmt.group


def test_symbolic_sizes_are_not_guarded_on():
    fmt = BlockFormat(bits=2, block=47, metadata=torch.bfloat16)

    def counts(x):
        n = x.shape[0] * 47
        zero = torch.zeros((), dtype=torch.int64)
        return zero + fmt.groups(n), zero + fmt.nbytes(n), zero + bit_words(n, 16)[0]

    graph = make_fx(counts, tracing_mode="symbolic")(torch.empty(10, 3))
    assert not graph.shape_env.guards
    for rows in (10, 1, 5000):
        assert graph(torch.empty(rows, 3)) == counts(torch.empty(rows, 3))


def test_the_default_format_is_two_bits_and_eight_bytes_for_a_block_of_256():
    fmt = BlockFormat()
    assert (fmt.words, fmt.group, fmt.blocks_per_group) == (16, 256, 1)
    assert fmt.nbytes(256) == 256 // 4 + 8
    assert BlockFormat(metadata=torch.bfloat16).nbytes(257) == 2 * (64 + 4)


@given(st.integers(0, 10**12), st.integers(1, 300))
def test_bit_words_is_the_smallest_that_holds_all_bits(numel, words):
    groups, width = bit_words(numel, words)
    assert width == words
    assert (groups - 1) * 32 * words < numel <= groups * 32 * words
