"""`towers`: rows of several heads that a layer takes apart are rows of one head each.

A layer of towers, such as PNAConv, takes rows of (towers, features), lays both ends and the edge side by side, and
multiplies each tower with weights of its own: `W_t cat([x_i, x_j, e])[:, t]`. Its gradient is put back in its place,
among zeros. Written the other way round, `W_t cat([x_i[:, t], x_j[:, t], e[:, t]])`, these are products of taken rows,
which `by_node` moves to nodes. No number changes, only what is copied, and where to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..graph import _torch
from ..graph.split import call, is_tensor
from .takes import is_zero, original, take_of

aten = torch.ops.aten


def towers(joint: fx.Graph) -> None:
    """Takes towers of a joint graph apart before their columns are laid side by side, in place."""
    for node in list(joint.nodes):
        if not is_tensor(node) or node.kwargs or node.meta["val"].dim() not in (2, 3):
            continue
        with joint.inserting_before(node):
            new = _taken_apart(joint, node)
        if new is not None:
            node.replace_all_uses_with(new)
    joint.eliminate_dead_code()


def joined(joint: fx.Graph) -> None:
    """Makes the towers of sums of taken rows at once, from the towers of what they are taken of, in place."""
    for node in list(joint.nodes):
        match node:
            case fx.Node(target=aten.cat.default, args=([*pieces], 1 | -1)) if (
                is_tensor(node) and _rank(node) == 2 and original(pieces[0]).target is not aten.mm.default  # type: ignore[arg-type]
            ):
                with joint.inserting_before(node):
                    new = _joined(joint, pieces, node)  # type: ignore[arg-type]
                if new is not None:
                    node.replace_all_uses_with(new)
    joint.eliminate_dead_code()


def _joined(graph: fx.Graph, pieces: Sequence[fx.Node], like: fx.Node) -> fx.Node | None:
    """The columns of some values that are made alike: sums of rows taken by the same index, or of the same rows times
    some matrix; None where they are not."""
    pieces = [original(piece) for piece in pieces]
    first, takes = pieces[0], [take_of(piece) for piece in pieces]
    if any(piece.target is not first.target or piece.kwargs or len(piece.args) != 2 for piece in pieces):
        return None
    ones, others = ([piece.args[i] for piece in pieces] for i in range(2))
    if first.target is aten.index.Tensor and len({take and take.index for take in takes} - {None}) == 1 and all(takes):
        return call(graph, first.target, call(graph, aten.cat.default, ones, 1, like=like), first.args[1], like=like)
    if first.target is aten.mm.default and len(set(ones)) == 1:
        return call(graph, first.target, ones[0], call(graph, aten.cat.default, others, 1, like=like), like=like)
    if first.target is aten.add.Tensor and all(isinstance(n, fx.Node) and _rank(n) == 2 for n in (*ones, *others)):
        terms = [_joined(graph, side, like) for side in (ones, others)]  # type: ignore[arg-type]
        return None if None in terms else call(graph, aten.add.Tensor, *terms, like=like)
    return None


def _taken_apart(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    match node:
        case fx.Node(target=aten.select.int, args=(fx.Node() as rows, 1, int() as tower)) if _rank(rows) == 3:
            return _tower(graph, rows, tower, node)
        case fx.Node(target=aten.select_scatter.default | aten.add.Tensor) if _rank(node) == 3:
            placed = _placed(node)
            return None if placed is None else _side_by_side(graph, placed, node)
        case fx.Node(target=aten.slice.Tensor, args=(fx.Node() as rows, 2, *ends)):
            placed = _towers_of(rows)
            if placed is not None:
                columns = [call(graph, aten.slice.Tensor, tower, 1, *ends, like=node) for tower in placed]
                return _side_by_side(graph, columns, node)
    return None


def _placed(node: fx.Node) -> list[fx.Node] | None:
    """The towers that a sum puts in their places among zeros; None where it is no such sum, or leaves one out."""
    count = node.meta["val"].shape[1]
    todo, found = [node], dict[int, fx.Node]()
    while todo and isinstance(count, int):
        match summand := todo.pop():
            case fx.Node(target=aten.add.Tensor, args=(fx.Node() as one, fx.Node() as other)) if not summand.kwargs:
                todo += (one, other)
            case fx.Node(
                target=aten.select_scatter.default, args=(fx.Node() as base, fx.Node() as rows, 1, int() as tower)
            ) if tower % count not in found and is_zero(base):
                found[tower % count] = rows
            case _:
                return None
    return [found[i] for i in sorted(found)] if count == len(found) else None


def _side_by_side(graph: fx.Graph, towers: Sequence[fx.Node], like: fx.Node) -> fx.Node:
    rows = [call(graph, aten.unsqueeze.default, tower, 1, like=like) for tower in towers]
    return rows[0] if len(rows) == 1 else call(graph, aten.cat.default, rows, 1, like=like)


def _towers_of(node: fx.Node) -> list[fx.Node] | None:
    """What `_side_by_side` made a node of."""
    match node:
        case fx.Node(target=aten.unsqueeze.default, args=(fx.Node() as tower, 1)):
            return [tower]
        case fx.Node(target=aten.cat.default, args=([*rows], 1)):
            towers = [_towers_of(row) for row in rows]  # type: ignore[arg-type]
            return [tower[0] for tower in towers if tower] if all(t and len(t) == 1 for t in towers) else None
    return None


def _tower(graph: fx.Graph, rows: Any, tower: int, like: fx.Node) -> fx.Node | None:
    """One tower of rows: of what was laid side by side, or of rows that have no other."""
    match original(rows):
        case fx.Node(target=aten.cat.default, args=([*pieces], 2 | -1)) if any(map(_is_taken, pieces)):
            apart = [_tower(graph, piece, tower, like) or _selected(graph, piece, tower, like) for piece in pieces]
            return call(graph, aten.cat.default, apart, 1, like=like)
        case fx.Node(target=aten.repeat.default, args=(fx.Node() as one, [1, int(), 1])) if (
            _rank(one) == 3 and _is_one(one.meta["val"].shape[1]) and not _is_taken(one)
        ):
            return call(graph, aten.squeeze.dim, one, 1, like=like)  # all towers are alike
    if _is_one(rows.meta["val"].shape[1]) and not _is_taken(rows):
        return call(graph, aten.squeeze.dim, rows, 1, like=like)
    return None


def _selected(graph: fx.Graph, rows: Any, tower: int, like: fx.Node) -> fx.Node:
    return call(graph, aten.select.int, rows, 1, tower, like=like)


def _is_taken(rows: Any) -> bool:
    return take_of(original(rows)) is not None


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _is_one(size: object) -> bool:
    return _torch.known_true(size == 1)
