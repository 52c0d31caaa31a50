"""What the columns of a matrix with a row for each edge are made of: rows taken of nodes, sums of such, other rows.

A difference of rows is not pulled apart unless one of the two stands among the columns by itself, too: of positions
that are nearly the same, say, the difference of the products would be less exact than the product of the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ..graph import _torch
from ..graph.split import is_tensor
from .computable import is_float
from .takes import Take, original, take_of

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass(frozen=True)
class Taken:
    """Rows that are taken of what `chain` makes of a matrix: ops that do the same to each row, first to last."""

    take: Take
    chain: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Part:
    """Columns of a matrix with a row for each edge.

    node: the matrix of these columns.
    terms: the rows that they are a sum of, each with its sign; none where they are made otherwise.
    """

    width: int
    node: fx.Node
    terms: tuple[tuple[int, Taken], ...] = ()


def parts_of(value: fx.Node) -> list[Part] | None:
    """The columns of a matrix with a row for each edge; None where none of them is worth taking of a product."""
    parts = list(_columns(value))
    alone = {term for part in parts if len(part.terms) == 1 for _, term in part.terms}
    apart = [
        part if len(part.terms) < 2 or alone & {term for _, term in part.terms} else Part(part.width, part.node)
        for part in parts
    ]
    return apart if any(part.terms for part in apart) else None


def _columns(value: fx.Node) -> Iterator[Part]:
    value = original(value)
    shape = value.meta["val"].shape
    if len(shape) != 2 or not isinstance(shape[1], int):
        return
    rows = _rows(value)
    if rows is not None:
        yield Part(shape[1], value, ((1, rows),))
        return
    match value:
        case fx.Node(target=aten.cat.default, args=([*pieces], 1 | -1)):
            found = [list(_columns(piece)) for piece in pieces]  # type: ignore[arg-type]
            if all(found):
                yield from (part for parts in found for part in parts)
                return
        case fx.Node(target=aten.add.Tensor | aten.sub.Tensor, args=(fx.Node() as a, fx.Node() as b)):
            both = _rows(a), _rows(b)
            if None not in both and all(_torch.same_sizes(n.meta["val"].shape, shape) for n in (a, b)):
                sign = 1 if value.target is aten.add.Tensor else -1
                yield Part(shape[1], value, ((1, both[0]), (sign, both[1])))  # type: ignore[arg-type]
                return
    yield Part(shape[1], value)


def _rows(value: fx.Node) -> Taken | None:
    """What a value is taken of, perhaps with the same done to each row afterwards."""
    chain: list[fx.Node] = []
    value = original(value)
    while (take := take_of(value)) is None:
        source = _by_row(value)
        if source is None:
            return None
        chain.insert(0, value)
        value = original(source)
    return Taken(take, tuple(chain)) if has_fewer_rows(take.matrix, value) else None


def has_fewer_rows(by_node: fx.Node, by_edge: fx.Node) -> bool:
    """Whether a matrix has fewer rows than another one, of floats that programs work with."""
    nodes, edges = by_node.meta["val"], by_edge.meta["val"]
    if not (is_float(by_node) and is_float(by_edge) and nodes.dim() and edges.dim()):
        return False
    return _torch.size_hint(nodes.shape[0]) < _torch.size_hint(edges.shape[0])


def _by_row(value: fx.Node) -> fx.Node | None:
    """What a node is made of, by an op that does the same to each row and keeps their number."""
    source = value.args[0] if value.args else None
    if not isinstance(source, fx.Node) or not is_tensor(source):
        return None
    sizes, sources = value.meta["val"].shape, source.meta["val"].shape
    if not sizes or not sources or not _torch.known_true(sizes[0] == sources[0]):
        return None
    match value:
        case fx.Node(target=aten.slice.Tensor | aten.select.int, args=(_, int() as dim, *_)) if dim > 0:
            return source
        case fx.Node(target=aten.view.default | aten.reshape.default):
            return source if all(isinstance(size, int) and size for size in sizes[1:]) else None
        case fx.Node(target=aten.unsqueeze.default, args=(_, int() as dim)) if dim > 0:
            return source
        case fx.Node(target=prims.convert_element_type.default):
            return source if source.meta["val"].is_floating_point() else None
    return None
