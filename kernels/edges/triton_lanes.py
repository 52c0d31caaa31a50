"""What the generated kernels of `triton_generate` call: which edges a lane goes over, and functions of numbers.

No global is NaN: at every launch after the first one, Triton compares the globals of a kernel with what they were.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice  # noqa: F401  generated code calls it

from ..blocks.triton_numbers import greatest, least


@triton.jit
def owner(pointer, nodes, halvings, place):
    """The node whose edges the one at `place` is of: the last whose edges begin there or before."""
    low, high = place * 0, place * 0 + nodes
    for _ in range(halvings):
        middle = (low + high) // 2
        before = tl.load(pointer + middle) <= place
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    return low


@triton.jit
def lanes(pointer, nodes, edges, split, halvings, PIECES: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr):
    """For each lane its node, its first place among the edges in order, and the place where its item ends.

    Items are nodes, without those of more than `split` edges; or with `PIECES` these in pieces, two items for each
    window of `split` places: of the node that has its first place, and of the one that has its last.
    """
    lane = tl.arange(0, BN * BE)
    item = tl.program_id(0).to(tl.int64) * BN + lane // BE
    if PIECES:
        first = item // 2 * split
        last = tl.minimum(first + split, edges) - 1
        node = owner(pointer, nodes, halvings, tl.minimum(tl.where(item % 2 == 0, first, last), edges - 1))
        begin, end = tl.load(pointer + node).to(tl.int64), tl.load(pointer + node + 1).to(tl.int64)
        mine = (first < edges) & (end - begin > split) & ((item % 2 == 0) | (begin > first))
        begin, end = tl.maximum(begin, first), tl.minimum(end, first + split)
    else:
        node = tl.minimum(item, nodes - 1)
        begin, end = tl.load(pointer + node).to(tl.int64), tl.load(pointer + node + 1).to(tl.int64)
        mine = (item < nodes) & (end - begin <= split)
    place = begin + lane % BE
    return node, place, tl.where(mine, end, begin)


@triton.jit
def rows(pointer, nodes, edges, split, PIECES: tl.constexpr, BN: tl.constexpr):
    """For each item the row that its result goes to, whether it has one, and whether it is a node without edges."""
    item = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    if PIECES:
        stored = item // 2 * split < edges
        empty = item < 0
    else:
        node = tl.minimum(item, nodes - 1)
        begin, end = tl.load(pointer + node), tl.load(pointer + node + 1)
        stored = (item < nodes) & (end - begin <= split)
        empty = begin == end
    return item, stored, empty


@triton.jit
def axes(BH: tl.constexpr, BC: tl.constexpr):
    """The heads and the columns of this program, along the second and the third axis."""
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    return h[None, :, None], c[None, None, :]


@triton.jit
def folded(a, axis: tl.constexpr, KIND: tl.constexpr):
    """The sum along an axis, the largest or the smallest; NaN where there is one."""
    if KIND == "sum":
        return tl.sum(a, axis)
    else:
        odd = tl.max((a != a).to(tl.int32), axis)
        return tl.where(odd != 0, float("nan"), tl.max(a, axis) if KIND == "max" else tl.min(a, axis))


@triton.jit
def over_lanes(
    a, KIND: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Of (lanes, heads, columns), what each item's lanes make together."""
    return folded(tl.reshape(a, (BN, BE, BH, BC)), 1, KIND) if BE > 1 else a


@triton.jit
def packed(mask, LANES: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr):
    """A mask of (lanes, heads, columns) as bytes, eight columns in each, and which byte of its row each is."""
    bits = tl.reshape(mask.to(tl.int32), (LANES, BH, BC // 8, 8)) << tl.arange(0, 8)[None, None, None, :]
    number = tl.program_id(2) * (BC // 8) + tl.arange(0, BC // 8)
    return tl.sum(bits, 3).to(tl.uint8), number[None, None, :]


@triton.jit
def quotient(a, b):
    """To the last bit, as torch has it."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def root(a):
    """To the last bit, as torch has it."""
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def rounded(a, TO: tl.constexpr):
    return a.to(tl.float32).to(TO).to(a.dtype)


@triton.jit(do_not_specialize=["nodes", "edges", "split", "halvings"])
def join_kernel(
    pieces, out, pointer, nodes: tl.int64, edges: tl.int64, split: tl.int64, halvings: tl.int64,
    KIND: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Makes one row of the pieces of a node with more than `split` edges; each is done by the program of the window
    that it begins in."""
    window = tl.program_id(0).to(tl.int64)
    node = owner(pointer, nodes, halvings, tl.minimum(window * split + split, edges) - 1)
    begin, end = tl.load(pointer + node).to(tl.int64), tl.load(pointer + node + 1).to(tl.int64)
    if (end - begin > split) & (begin >= window * split):
        f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        a = tl.full((AT_ONCE, BLOCK), START, pieces.dtype.element_ty)
        for j in range(0, ((end - 1) // split - window + 1).to(tl.int32), AT_ONCE):
            first = (window + j + tl.arange(0, AT_ONCE)) * split
            piece = first // split * 2 + (begin > first).to(tl.int64)
            mask = (first < end)[:, None] & (f < WIDTH)[None, :]
            x = tl.load(pieces + piece[:, None] * WIDTH + f[None, :], mask=mask, other=START)
            if KIND == "sum":
                a = a + x
            elif KIND == "max":
                a = greatest(a, x)
            else:
                a = least(a, x)
        tl.store(out + node * WIDTH + f, folded(a, 0, KIND).to(out.dtype.element_ty), mask=f < WIDTH)
