"""The ops that a graph calls for regions: `actcompile.edges`, any program; `aggregate`, sums of rows; `degree`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache, partial
from threading import Lock

import torch
from torch import Tensor

from .._cpp import I32, I64, P, begin, compile_source
from ..cuda import forms
from ..op import op
from .generate import NARROW, generate
from .generate_products import generate_products
from .group import MOST, Grouping, group, grouping, row_of
from .program import Operand, Output, Program, Step, dtype_of, parse, row_size, rows_of, run_reference

RUN = {"run": (P, P, P, P, P, I64, I64, I32)}
_kernels: dict[tuple[str, int, int], Future[ctypes.CDLL | None]] = {}
_lock = Lock()
ALONE = 1 << 15  # elements that one thread works on sooner than others are woken
# A CUDA graph that is replayed calls nothing in Python: it would read the grouping of the edges that it was made with.
REMEMBERING = (torch.Tag.cudagraph_unsafe,)
ARRANGED = -2  # instead of the row of an index: it is one that `arrange_edges` returned
Run = Callable[[Grouping, list[Tensor], list[Tensor], list[Tensor], int, int, int, int], None]


@op("edges", REMEMBERING)
def edges(
    program: str,
    by: Tensor,
    by_row: int,
    nodes: int,
    heads: int,
    columns: int,
    indices: Sequence[Tensor],
    rows: Sequence[int],
    operands: Sequence[Tensor],
    grouped: Sequence[Tensor],
) -> list[Tensor]:
    """Runs a program over the edges of a graph.

    Args:
        program: as `Program.dump` writes it.
        by, by_row: the node that edges are grouped by, (edges,), or that row of a tensor of (2, edges).
        nodes: the number of nodes, of results for each node.
        heads, columns: the sizes of the axes.
        indices, rows: the nodes at the other ends, likewise; or `ARRANGED`, what `arrange_edges` returned.
        operands: what rows are read of.
        grouped: the grouping by `by`, as `group_edges` returns it; or none: it is looked up, and made and remembered
            for as long as the tensor `by` lives. That is for tensors that live on, as inputs of a model do.

    Returns:
        for each output of the program (nodes, width), (edges, width), (1, width), or (inner axis, width).

    Raises:
        IndexError: an index names a node that there isn't. On CUDA the device finds it in `indices`.
    """
    return _run(parse(program), program, by, by_row, nodes, heads, columns, indices, rows, operands, grouped)


@edges.register_fake
def _(program, by, by_row, nodes, heads, columns, indices, rows, operands, grouped):
    parsed = parse(program)
    return [
        by.new_empty(
            rows_of(parsed, output, nodes, by.shape[-1]),
            row_size(output, heads, columns, parsed.inner),
            dtype=dtype_of(output),
        )
        for output in parsed.outputs
    ]


@op("aggregate", REMEMBERING)
def aggregate(
    matrix: Tensor,
    weight: Tensor | None,
    take: Tensor,
    take_row: int,
    by: Tensor,
    by_row: int,
    nodes: int,
    grouped: Sequence[Tensor],
) -> Tensor:
    """Adds rows of `matrix`, those that `take` names, up by what `by` names: message passing without messages.

    Linear in `matrix`, and in `weight`, one number for each edge. Other arguments as in `edges`.

    Returns:
        (nodes, ...), in the dtype of `matrix`.
    """
    columns = math.prod(matrix.shape[1:])
    text = aggregation(str(matrix.dtype)[6:], None if weight is None else str(weight.dtype)[6:])
    operands = [matrix] if weight is None else [matrix, weight]
    (out,) = _run(parse(text), text, by, by_row, nodes, 1, columns, [take], [take_row], operands, grouped)
    return out.view(nodes, *matrix.shape[1:])


@aggregate.register_fake
def _(matrix, weight, take, take_row, by, by_row, nodes, grouped):
    return matrix.new_empty(nodes, *matrix.shape[1:])


@lru_cache
def aggregation(dtype: str, weight: str | None = None, scale: bool = False) -> str:
    """The program of `aggregate`; with `scale`, rows are read times one number for each of them, a second operand."""
    row = Operand("take", 0, "c", dtype)
    if weight is None and not scale:
        return Program((row,), (), (Output("sum", "o0", "c", dtype),)).dump()
    factor = Operand("take", 0, "", dtype) if weight is None else Operand("edge", -1, "", weight)
    times = Step("mul", ("o0", "o1"), "c")
    return Program((row, factor), (times,), (Output("sum", "v0", "c", dtype),)).dump()


@op("degree", REMEMBERING)
def degree(by: Tensor, by_row: int, nodes: int, grouped: Sequence[Tensor]) -> Tensor:
    """The number of edges that each node has: of those that are grouped by it. Arguments as in `edges`.

    Returns:
        int64, (nodes,).
    """
    if max(by.shape[-1], nodes) >= MOST:
        index = row_of(by, by_row)
        return torch.bincount(torch.where(index < 0, index + nodes, index), minlength=nodes)
    return _sort(by, by_row, nodes, grouped).pointer.diff().long()


@degree.register_fake
def _(by, by_row, nodes, grouped):
    return by.new_empty(nodes, dtype=torch.int64)


@op("group_edges")
def group_edges(by: Tensor, by_row: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Groups edges by a node, for indices that a graph makes itself. Arguments as in `edges`.

    Returns:
        pointer, int32, (nodes + 1,), and order, int32, (edges,), as in `Grouping`.
    """
    index = row_of(by, by_row)
    sort = group(index, -1, nodes, wait=False)
    if sort.order is None:
        return sort.pointer, torch.arange(index.shape[0], dtype=torch.int32, device=index.device)
    return sort.pointer, sort.order


@group_edges.register_fake
def _(by, by_row, nodes):
    return by.new_empty(nodes + 1, dtype=torch.int32), by.new_empty(by.shape[-1], dtype=torch.int32)


@op("arrange_edges")
def arrange_edges(index: Tensor, row: int, nodes: int, order: Tensor) -> Tensor:
    """The nodes at the other ends of edges, in the order that edges were grouped in.

    Args:
        index, row: the nodes, (edges,), or that row of a tensor of (2, edges).
        nodes: the number of nodes that an index may name.
        order: as `group_edges` returns it.

    Returns:
        int32, (edges,).

    Raises:
        IndexError: an index names a node that there isn't.
    """
    return Grouping(order, order).arrange(index, row, nodes, remember=False)


@arrange_edges.register_fake
def _(index, row, nodes, order):
    return index.new_empty(index.shape[-1], dtype=torch.int32)


def compiled(text: str, heads: int, columns: int) -> ctypes.CDLL | None:
    """The library of a program's kernel for these sizes of its axes; None where it can't be compiled."""
    return _begun(text, heads, columns).result()


def prepare_edges(text: str, device: torch.device, heads: int, columns: int) -> None:
    """Begins to compile a program's kernel, beside what else goes on, unless that has begun already.

    On CUDA, Triton compiles it when it is launched first.
    """
    if device.type == "cpu":
        _begun(text, heads, columns)


def _begun(text: str, heads: int, columns: int) -> Future[ctypes.CDLL | None]:
    key = text, heads, columns if columns <= NARROW else 0
    with _lock:
        if key not in _kernels:
            source = generate_products if parse(text).inner else generate
            _kernels[key] = begin(lambda: compile_source(source(*key), RUN))
        return _kernels[key]


def _run(
    program: Program,
    text: str,
    by: Tensor,
    by_row: int,
    nodes: int,
    heads: int,
    columns: int,
    indices: Sequence[Tensor],
    rows: Sequence[int],
    operands: Sequence[Tensor],
    grouped: Sequence[Tensor],
) -> list[Tensor]:
    operands = [o.contiguous() for o in operands]
    count = by.shape[-1]
    run = kernel_for(by.device, text, heads, columns) if max(count, nodes) < MOST else None
    if run is None:
        others = [
            index.new_empty(count).index_copy(0, grouped[1].long(), index) if row == ARRANGED else row_of(index, row)
            for index, row in zip(indices, rows, strict=True)
        ]
        return run_reference(program, operands, row_of(by, by_row), others, nodes, heads, columns)
    remember, sort = not grouped and not by.is_inference(), _sort(by, by_row, nodes, grouped)
    others = [
        index if row == ARRANGED else sort.arrange(index, row, _taken(program, j, operands), remember)
        for j, (index, row) in enumerate(zip(indices, rows, strict=True))
    ]
    results = [
        torch.empty(
            rows_of(program, output, nodes, count),
            row_size(output, heads, columns, program.inner),
            dtype=dtype_of(output),
            device=by.device,
        )
        for output in program.outputs
    ]
    run(sort, others, operands, results, nodes, count, heads, columns)
    return results


def _sort(by: Tensor, by_row: int, nodes: int, grouped: Sequence[Tensor]) -> Grouping:
    """The grouping that a graph made, or one that is remembered where that can be."""
    if grouped:
        return Grouping(grouped[0], grouped[1])
    return (group if by.is_inference() else grouping)(by, by_row, nodes)


def kernel_for(device: torch.device, text: str, heads: int, columns: int) -> Run | None:
    """What runs a program, with these sizes of its axes, on a device; None where that is the reference."""
    if device.type == "cuda":
        run = forms().edges
        return None if run is None or parse(text).inner else partial(run, text)
    library = compiled(text, heads, columns) if device.type == "cpu" else None
    return None if library is None else partial(_run_cpp, library)


def _run_cpp(
    library: ctypes.CDLL,
    sort: Grouping,
    others: list[Tensor],
    operands: list[Tensor],
    results: list[Tensor],
    nodes: int,
    count: int,
    heads: int,
    columns: int,
) -> None:
    threads = 1 if (count + nodes) * heads * columns < ALONE else torch.get_num_threads()
    library.run(
        addresses(operands), addresses(results), sort.pointer.data_ptr(), _order(sort), addresses(others),
        nodes, columns, threads,
    )  # fmt: skip


def _taken(program: Program, index: int, operands: Sequence[Tensor]) -> int:
    """The number of nodes that an index may name: of the shortest operand that is read by it."""
    return min(
        tensor.shape[0]
        for operand, tensor in zip(program.operands, operands, strict=True)
        if operand.where == "take" and operand.index == index
    )


def _order(sort: Grouping) -> int | None:
    return None if sort.order is None else sort.order.data_ptr()


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """The addresses of tensors, as a kernel takes them."""
    return (P * max(len(tensors), 1))(*(t.data_ptr() for t in tensors))
