"""`pack_bits` and `unpack_bits` as Triton kernels, bit for bit what their references give. Booleans travel as bytes."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks.format import bit_words
from ..blocks.triton_tile import LOAD, Tile, elements_left, on_device, plane_mask, rows, tile_for


@triton.jit
def pack_tile(
    mask, packed, tile, start, groups, numel,
    PARTIAL: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    row, exists = rows(tile, groups, GROUPS)
    j = tl.arange(0, W)
    if W < WORDS:
        j = j + start
    left = elements_left(numel, tile, 32 * WORDS, GROUPS, W < WORDS)
    elements = mask + tile * (32 * WORDS) + (row[:, None] * (32 * WORDS) + j[None, :])
    word = tl.zeros((GROUPS, W), tl.int32)
    for k in tl.static_range(32):
        if PARTIAL or WORDS % W != 0:
            used = plane_mask(row, j, left, k, PARTIAL, 32 * WORDS, WORDS)
            bit = tl.load(elements + k * WORDS, mask=used, other=0)
        else:
            bit = tl.load(elements + k * WORDS)
        word = word | (bit.to(tl.int32) << k)
    target = packed + tile * WORDS + (row[:, None] * WORDS + j[None, :])
    tl.store(target, word, mask=exists[:, None] & (j < WORDS)[None, :])


@triton.jit
def unpack_tile(
    packed, mask, tile, start, groups, numel,
    PARTIAL: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    row, exists = rows(tile, groups, GROUPS)
    j = tl.arange(0, W)
    if W < WORDS:
        j = j + start
    left = elements_left(numel, tile, 32 * WORDS, GROUPS, W < WORDS)
    elements = mask + tile * (32 * WORDS) + (row[:, None] * (32 * WORDS) + j[None, :])
    source = packed + tile * WORDS + (row[:, None] * WORDS + j[None, :])
    word = tl.load(source) if WORDS % W == 0 else tl.load(source, mask=(j < WORDS)[None, :], other=0)
    for k in tl.static_range(32):
        used = exists[:, None] & plane_mask(row, j, left, k, PARTIAL, 32 * WORDS, WORDS)
        tl.store(elements + k * WORDS, ((word >> k) & 1).to(tl.uint8), mask=used)


@triton.jit(do_not_specialize=["first", "groups", "numel"])
def pack_kernel(
    mask, packed, first: tl.int64, groups: tl.int64, numel: tl.int64,
    PARTIAL: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Packs `GROUPS` groups by `W` words a program, from group `first` on."""
    tile = first + tl.program_id(0).to(tl.int64) * GROUPS
    start = tl.program_id(1).to(tl.int64) * W
    if PARTIAL:
        if (tile + GROUPS) * (32 * WORDS) <= numel:
            pack_tile(mask, packed, tile, start, groups, numel, False, WORDS, GROUPS, W)
        else:
            pack_tile(mask, packed, tile, start, groups, numel, True, WORDS, GROUPS, W)
    else:
        pack_tile(mask, packed, tile, start, groups, numel, False, WORDS, GROUPS, W)


@triton.jit(do_not_specialize=["first", "groups", "numel"])
def unpack_kernel(
    packed, mask, first: tl.int64, groups: tl.int64, numel: tl.int64,
    PARTIAL: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Unpacks `GROUPS` groups by `W` words a program, from group `first` on."""
    tile = first + tl.program_id(0).to(tl.int64) * GROUPS
    start = tl.program_id(1).to(tl.int64) * W
    if PARTIAL:
        if (tile + GROUPS) * (32 * WORDS) <= numel:
            unpack_tile(packed, mask, tile, start, groups, numel, False, WORDS, GROUPS, W)
        else:
            unpack_tile(packed, mask, tile, start, groups, numel, True, WORDS, GROUPS, W)
    else:
        unpack_tile(packed, mask, tile, start, groups, numel, False, WORDS, GROUPS, W)


def bit_tile(words: int) -> Tile:
    """The tile of both kernels: loads and stores of 16 booleans."""
    return tile_for(words, LOAD)


def bit_constants(words: int, numel: int, tile: Tile) -> dict[str, Any]:
    """The compile-time arguments of both kernels."""
    return {"PARTIAL": numel % (32 * words) != 0, "WORDS": words, "GROUPS": tile.groups, "W": tile.width}


def _launch(kernel, source: Tensor, target: Tensor, words: int, numel: int, first: int, tile: Tile | None) -> None:
    tile = tile or bit_tile(words)
    groups = bit_words(numel, words)[0]
    programs = tile.programs(groups - first)
    if programs == 0:
        return
    with on_device(source):
        kernel[(programs, triton.cdiv(words, tile.width))](
            source, target, first, groups, numel, **bit_constants(words, numel, tile), num_warps=tile.warps
        )


def pack_into(mask: Tensor, packed: Tensor, first: int = 0, tile: Tile | None = None) -> None:
    """Packs the flat, contiguous uint8 `mask`, zeros and ones, from group `first` on into int32 (groups, words)."""
    _launch(pack_kernel, mask, packed, packed.shape[1], mask.numel(), first, tile)


def unpack_into(packed: Tensor, mask: Tensor, first: int = 0, tile: Tile | None = None) -> None:
    """Unpacks int32 (groups, words) from group `first` on into the flat, contiguous uint8 `mask`."""
    _launch(unpack_kernel, packed, mask, packed.shape[1], mask.numel(), first, tile)


def pack_bits_triton(mask: Tensor, words: int) -> Tensor:
    """`pack_bits` as one launch; shapes as there."""
    packed = torch.empty(bit_words(mask.numel(), words), dtype=torch.int32, device=mask.device)
    pack_into(mask.contiguous().view(-1).view(torch.uint8), packed)
    return packed.view(torch.float32)


def unpack_bits_triton(packed: Tensor, size: Sequence[int]) -> Tensor:
    """`unpack_bits` as one launch; shapes as there."""
    mask = torch.empty(list(size), dtype=torch.bool, device=packed.device)
    unpack_into(packed.contiguous().view(torch.int32), mask.view(-1).view(torch.uint8))
    return mask
