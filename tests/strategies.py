"""Hypothesis strategies for block formats, sizes and tensors, and comparisons that are exact to the bit."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from actcompile.kernels import BlockFormat
from actcompile.kernels.blocks.format import EXPLICIT_BITS, LEVELS, levels_text

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FITTED_BLOCKS = (1, 2, 4, 16, 24, 47, 64, 256)

KINDS = (
    "normal",
    "half zero",
    "constant",
    "integers",
    "large offset",
    "huge",
    "denormal",
    "mixed magnitudes",
)


def words_choices(bits: int, block: int) -> list[int]:
    """Every valid `words` of up to 64 for a block: several blocks of whole planes in a group, or one block."""
    planes = 32 // bits
    several = [w for w in range(1, 65) if block % w == 0 and planes * w % block == 0]
    return sorted({0, -(-block // planes), *several})


@st.composite
def explicit_levels(draw, bits: int) -> str:
    """Explicit levels of a format, as text: mostly asymmetric, neighbours from 2**-9 of the range apart."""
    gaps = draw(st.lists(st.integers(1, 32), min_size=2**bits - 1, max_size=2**bits - 1))
    gaps = gaps[: 2 ** (bits - 1)] + gaps[: 2 ** (bits - 1) - 1][::-1] if draw(st.integers(0, 3)) == 0 else gaps
    ends = [sum(gaps[:k]) for k in range(2**bits)]
    return levels_text(end * ((2**bits - 1) / ends[-1]) for end in ends)


@st.composite
def formats(draw, bits=None, levels=None, metadata=None, blocks=None) -> BlockFormat:
    bits = draw(
        st.sampled_from((1, 2, 4, 8))
        if bits is None
        else bits
        if isinstance(bits, st.SearchStrategy)
        else st.just(bits)
    )
    named = st.sampled_from(LEVELS)
    if levels is None:
        levels = draw(st.one_of(named, explicit_levels(bits)) if bits in EXPLICIT_BITS else named)
    metadata = draw(st.sampled_from((torch.float32, torch.bfloat16))) if metadata is None else metadata
    if blocks is None:
        some = st.sampled_from(FITTED_BLOCKS)
        blocks = some if levels != "uniform" else st.one_of(some, st.integers(1, 130))
    block = draw(blocks)
    return BlockFormat(bits, block, levels, metadata, draw(st.sampled_from(words_choices(bits, block))))


@st.composite
def sizes(draw, group: int, most_groups: int = 4) -> int:
    """Elements of a tensor: none, one, whole groups, a tail, and the sizes just beside these."""
    whole = draw(st.integers(0, most_groups)) * group
    rest = draw(st.one_of(st.sampled_from((0, 1, group - 1)), st.integers(0, group - 1)))
    return whole + rest


def values(kind: str, numel: int, seed: int) -> Tensor:
    """A flat float32 tensor of one kind of data."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    if kind == "normal":
        return x
    if kind == "half zero":
        return x.relu()
    if kind == "constant":
        return torch.full((numel,), 1.2345678 * (seed % 1000 - 500))
    if kind == "integers":
        return (3 * x).round()
    if kind == "large offset":
        return 12345.678 + x / 64
    if kind == "huge":
        return x.clamp(-3, 3) * 1e38
    if kind == "denormal":
        return x * 1e-40
    if kind == "mixed magnitudes":
        return x * 2.0 ** torch.randint(-60, 60, (numel,), generator=generator)
    raise ValueError(f"no such kind of data: {kind!r}")


seeds = st.integers(0, 2**31 - 1)


def kinds(*, without: tuple[str, ...] = ()):
    return st.sampled_from([kind for kind in KINDS if kind not in without])


@st.composite
def any_strides(draw, x: Tensor) -> Tensor:
    """A tensor of the elements of flat `x` (in another order) and of any shape and strides, not written to later."""
    n = x.numel()
    how = draw(st.sampled_from(("flat", "matrix", "transposed", "sliced", "expanded", "permuted", "offset")))
    rows = draw(st.sampled_from([r for r in (1, 2, 3, 5, 7, 16) if n % r == 0]))
    if how == "matrix":
        return x.view(rows, -1) if n else x.view(rows, 0)
    if how == "transposed":
        return x.view(rows, n // rows).t()
    if how == "sliced":
        return torch.stack([x, torch.full_like(x, float("nan"))], dim=1).view(-1, 2)[:, 0]
    if how == "expanded":
        return x[: n // rows].expand(rows, -1)
    if how == "permuted":
        return x.view(rows, 1, n // rows).permute(2, 0, 1)
    if how == "offset":
        return torch.cat([x.new_full((3,), float("inf")), x])[3:]
    return x


ACTIVATIONS = 4  # rows of a seed tensor; an activation's salt is its row


def seed_tensor(seed: int) -> Tensor:
    """What `draw_seed(ACTIVATIONS, ...)` returns, from a number."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (ACTIVATIONS, 2), dtype=torch.int32, generator=generator)


def bits_of(x: Tensor) -> Tensor:
    """The bits of a tensor as integers, both zeros alike and all NaN alike."""
    if x.dtype == torch.float32:
        return torch.where(x.isnan(), torch.nan, x + 0.0).view(torch.int32)
    if x.dtype in (torch.bfloat16, torch.float16):
        return torch.where(x.isnan(), torch.nan, x + 0.0).to(x.dtype).view(torch.int16)
    return x


def assert_same_bits(ours: Tensor, reference: Tensor) -> None:
    assert ours.dtype == reference.dtype
    assert ours.shape == reference.shape
    differ = bits_of(ours) != bits_of(reference)
    assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} differ, first at {differ.nonzero()[0].tolist()}"


def assert_same_encoding(ours: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> None:
    """Words to the bit (their float values mean nothing), minima and maxima up to the sign of zero."""
    assert ours[0].dtype == reference[0].dtype == torch.float32
    assert torch.equal(ours[0].view(torch.int32), reference[0].view(torch.int32))
    assert_same_bits(ours[1], reference[1])
    assert_same_bits(ours[2], reference[2])
