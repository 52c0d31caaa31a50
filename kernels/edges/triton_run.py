"""Runs programs over edges as Triton kernels.

A node with at most `SPLIT` edges is done by one program, which takes several such nodes. One with more, a hub, is done
in pieces of that many, by programs of their own, and a last launch makes one row of its pieces: always the same way, so
sums are the same every time. Whether there are hubs is known without waiting for the device where the grouping is
remembered; elsewhere all three launches are made, and find nothing to do.
"""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from ..blocks.triton_numbers import EXACT
from ..blocks.triton_tile import THREADS, on_device
from . import triton_lanes
from .group import Grouping
from .program import REDUCTIONS, Output, packed, parse, width
from .triton_generate import generate, reads

SPLIT = 1024  # edges of a node that one program does alone; more where that makes more than `WINDOWS` pieces
WINDOWS = 1 << 14
ELEMENTS = 2048  # of a tile
WIDEST = 256  # elements of a row in a tile, if it need not have all of a row
MOST_LANES = 256
MOST_OF_A_THREAD = 64  # elements of a tile
AT_ONCE = 8  # pieces that are joined at a time


@dataclass(frozen=True)
class Tile:
    """Nodes by edges of each by heads by columns, all powers of two, for one program of `warps` warps."""

    nodes: int
    edges: int
    heads: int
    columns: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"BN": self.nodes, "BE": self.edges, "BH": self.heads, "BC": self.columns}


def tile_for(output: Output, work: int, heads: int, columns: int, degree: float) -> Tile:
    """The tile for an output where nodes have about so many edges.

    Wide rows are cut, but not where their columns are summed up; a byte of bits is made in one piece. Few warps, whose
    threads have the same columns of several edges and add them up by themselves; as few as their registers allow for
    what there is to do, `work`: operands that have columns, and quarters of steps. Measured on an H200: sums, maxima
    and scores of arxiv's edges take 0.55 to 0.7 ms in tiles like these, 0.68 to 0.83 with 4 warps.
    """
    c = next_power_of_2(columns) if "c" in output.level or output.kind == "dot" else 1
    c = c if output.kind == "dot" else max(min(c, WIDEST), 8 if output.dtype == "bits" else 1)
    h = min(next_power_of_2(heads), max(WIDEST // c, 1)) if "h" in output.level else 1
    lanes = max(min(ELEMENTS // (h * c), MOST_LANES), 1)
    edges = min(4 if degree < 6 else 8 if degree < 24 else 16, lanes)
    warps = 1 if work < 2 else 2 if work < 4 else 4
    return Tile(lanes // edges, edges, h, c, max(warps, min(lanes * h * c // (MOST_OF_A_THREAD * THREADS), 16)))


def next_power_of_2(n: int) -> int:
    """The least one that is `n`, positive, or more. Triton's own takes 5 us a call."""
    return 1 << (max(n, 1) - 1).bit_length()


@dataclass(frozen=True)
class Plan:
    """How one output of a program is computed.

    run: the kernel; operands, indices: which of them it reads; tile, blocks: of one program, and how many of them for
    heads and for columns.
    """

    run: Any
    operands: tuple[int, ...]
    indices: tuple[int, ...]
    tile: Tile
    blocks: tuple[int, int]
    is_double: bool
    output: Output


@lru_cache(maxsize=4096)
def plan(text: str, i: int, heads: int, columns: int, degree: float) -> Plan:
    """The plan of output `i` of a program, made once for a graph with about so many edges to a node."""
    program = parse(text)
    output = program.outputs[i]
    operands, indices = reads(text, i)
    work = sum("c" in program.operands[n].level for n in operands) + len(program.steps) // 4
    tile = tile_for(output, work, heads, columns, degree)
    blocks = (
        -(-heads // tile.heads) if "h" in output.level else 1,
        -(-columns // tile.columns) if "c" in output.level else 1,
    )
    return Plan(kernel(text, i), operands, indices, tile, blocks, program.is_double, output)


@lru_cache(maxsize=1024)
def kernel(text: str, output: int) -> Any:
    """The kernel of one output of a program, to be compiled when it is launched first."""
    source = generate(text, output)
    name = f"<actcompile edges {sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = len(source), None, source.splitlines(True), name  # where Triton looks for it
    space = {**vars(triton_lanes), "__name__": "actcompile.kernels.edges.generated"}
    exec(compile(source, name, "exec"), space)
    return space["run"]


def run_triton(
    text: str,
    sort: Grouping,
    others: Sequence[Tensor],
    operands: Sequence[Tensor],
    results: Sequence[Tensor],
    nodes: int,
    edges: int,
    heads: int,
    columns: int,
) -> None:
    """Runs the program written down as `text`.

    Args:
        sort, others: the grouping, and the nodes at the other ends as it arranges them.
        operands: contiguous.
        results: what is written, one tensor for each output, contiguous.
        nodes, edges, heads, columns: their numbers.
    """
    for tensor in (sort.pointer, sort.order, *others):  # may be forgotten while this stream, not its own, reads it
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    program = parse(text)
    numbers = nodes, edges, heads, columns
    for i, (output, result) in enumerate(zip(program.outputs, results, strict=True)):
        if output.kind == "total":
            dtype = "float64" if program.is_double else "float32"
            by_node = result.new_empty(nodes, result.shape[1], dtype=getattr(torch, dtype))
            _run_output(_alone(text, i, "sum", dtype), 0, sort, others, operands, by_node, *numbers)
            result.copy_(by_node.sum(0, keepdim=True))
        elif output.dtype == "bits" and not _is_packed_at_once(output, heads, columns):
            mask = result.new_empty(result.shape[0], width(output.level, heads, columns), dtype=torch.bool)
            _run_output(_alone(text, i, output.kind, "bool"), 0, sort, others, operands, mask, *numbers)
            result.copy_(packed(mask))
        else:
            _run_output(text, i, sort, others, operands, result, *numbers)


@lru_cache(maxsize=1024)
def _alone(text: str, i: int, kind: str, dtype: str) -> str:
    """A program of one output, of this kind and dtype."""
    program = parse(text)
    return replace(program, outputs=(replace(program.outputs[i], kind=kind, dtype=dtype),)).dump()


def _is_packed_at_once(output: Output, heads: int, columns: int) -> bool:
    """Whether no byte of a row of bits is of two heads. Where one is, a row is bytes first, one for each bit."""
    return output.level == "c" or (output.level == "hc" and (columns % 8 == 0 or heads == 1))


def _run_output(
    text: str,
    i: int,
    sort: Grouping,
    others: Sequence[Tensor],
    operands: Sequence[Tensor],
    result: Tensor,
    nodes: int,
    edges: int,
    heads: int,
    columns: int,
) -> None:
    if result.numel() == 0:
        return
    # One of few numbers, so that few plans are made: for a mini-batch there is not one for each.
    chosen = plan(text, i, heads, columns, next_power_of_2(edges // max(nodes, 1)))
    output, tile, run = chosen.output, chosen.tile, chosen.run
    tensors = [_bytes(operands[n]) for n in chosen.operands] + [others[n] for n in chosen.indices]
    order = sort.pointer if sort.order is None else sort.order
    sizes = {"ORDERED": sort.order is not None, "H": heads, "C": columns}
    split = max(SPLIT, next_power_of_2(edges // WINDOWS))
    numbers = nodes, edges, split, nodes.bit_length()

    def launch(out: Tensor, items: int, tile: Tile, pieces: bool) -> None:
        grid = -(-items // tile.nodes), *chosen.blocks
        run[grid](
            *tensors, _bytes(out), sort.pointer, order, *numbers, PIECES=pieces, **sizes, **tile.constants,
            num_warps=tile.warps, **EXACT,
        )  # fmt: skip

    with on_device(result):
        launch(result, nodes, tile, pieces=False)
        if (edges if sort.longest is None else sort.longest) <= split:
            return
        windows = -(-edges // split)
        alone = replace(tile, nodes=1, edges=tile.nodes * tile.edges)
        if output.kind not in REDUCTIONS:
            launch(result, 2 * windows, alone, pieces=True)
            return
        size, dtype = width(output.level, heads, columns), torch.float64 if chosen.is_double else torch.float32
        pieces = torch.empty(2 * windows, size, dtype=dtype, device=result.device)
        launch(pieces, 2 * windows, alone, pieces=True)
        block = min(next_power_of_2(size), WIDEST)
        triton_lanes.join_kernel[(windows, -(-size // block))](
            pieces, result, sort.pointer, *numbers, KIND=output.kind, START=REDUCTIONS[output.kind], WIDTH=size,
            BLOCK=block, AT_ONCE=AT_ONCE, num_warps=4, **EXACT,
        )  # fmt: skip


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
