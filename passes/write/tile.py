"""`tile`: what backward makes only to sum it over rows is made tile of rows by tile, and never exists as a whole.

A weight's gradient is `x^T g`. Its `x` is decoded, or rebuilt of what was decoded, for this product alone. Both become
one op, `actcompile.row_sums`, which keeps a tile of rows in the cache, and reads what is there anyway. Pointwise ops
become a loop, as they would be one in Inductor's code.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from actcompile.kernels import BlockFormat
from actcompile.kernels.rows.tiles import LOOP, Step, Sum, Tiled

from ..edges.computable import POINTWISE, is_computable
from ..edges.regions import Loop, Unfit, loop
from ..graph import _torch
from ..graph.find import numel_hint
from ..graph.split import call, is_tensor, is_view, reached_from, root

aten, prims, ops = torch.ops.aten, torch.ops.prims, torch.ops.actcompile
CASTS = (prims.convert_element_type.default, ops.bytes_to_mask.default, ops.narrow.default, ops.widen.default)
VIEWS = (aten.view.default, aten.permute.default, aten.unsqueeze.default)
DECODED = (ops.dequantize.default, ops.unpack_bits.default)
PLAIN = (fx.Node, int, float, str, torch.dtype, type(None))  # arguments that a step can have
TILE, LEAST = 1 << 17, 16  # elements of a tile, and the fewest tiles that are worth it

How = tuple[int, int] | None  # how a tile of an operand is taken, as `Tiled.operands` has it
ROWS: How = (1, 1)


def tile(graph: fx.Graph) -> list[fx.Node]:
    """Replaces sums over rows, with what is made for them alone; returns the calls of `row_sums`."""
    made: list[fx.Node] = []
    refused: set[fx.Node] = set()
    while groups := [*_groups(graph, refused)]:
        replaced: set[fx.Node] = set()
        for group in groups:
            if replaced & group.nodes:  # what it is made of has changed: it is found anew
                continue
            sums = {s.node for s in group.sums}
            early = {s for s in sums if reached_from(s) & group.reads}
            result = group.replace(graph) if not early and group.is_worth else None
            refused |= early or sums
            if result:
                made.append(result)
                replaced |= sums
    graph.eliminate_dead_code()
    return made


@dataclass(frozen=True)
class _Sum:
    """A node that sums over rows: `left^T right`, or `left` alone; `turned` is `left` transposed."""

    node: fx.Node
    left: fx.Node
    right: fx.Node | None = None
    turned: fx.Node | None = None


@dataclass(frozen=True)
class _Group:
    """Sums, and what is made from rows for them alone, in order."""

    sums: list[_Sum]
    inside: list[fx.Node]

    @property
    def nodes(self) -> set[fx.Node | None]:
        return {*self.inside, *(n for s in self.sums for n in (s.node, s.left, s.right, s.turned))}

    @property
    def reads(self) -> set[fx.Node]:
        """All that is read, and the sums themselves: none of it may depend on one of the sums."""
        inner = {*self.inside, *(s.turned for s in self.sums)}
        return {n for s in (*self.inside, *(s.node for s in self.sums)) for n in s.all_input_nodes} - inner | {
            s.node for s in self.sums
        }

    @property
    def is_worth(self) -> bool:
        """Whether products read matrices as large as all rows that are not made any more.

        What can take the place of something that is dead behind it takes no memory as a whole, either.
        """
        operands = {n for s in self.sums if s.right is not None for n in (s.left, s.right)}
        made = [n for n in self.inside if n in operands and _is_tall(root(n)) and root(n) in self.inside]
        before = {*self.inside, *self.reads}
        todo = list(self.reads)
        while todo:
            todo += (more := {*todo.pop().all_input_nodes} - before)
            before |= more
        dead = [n for n in self.reads if n.op == "call_function" and not is_view(n) and n.users.keys() <= before]
        return len(made) > sum(any(_as_large(n, m) for m in made) for n in dead)

    def replace(self, graph: fx.Graph) -> fx.Node | None:
        """Inserts the call behind what it reads; None, and nothing is changed, if blocks lie across tiles."""
        operands: dict[fx.Node, How] = {}
        steps = self._steps()
        for node, made in steps.items():
            reads = (_taken(node) or {}) if made is None else _read_by(made)
            operands |= {n: how for n, how in reads.items() if n not in self.inside}
        ends = [n for s in self.sums for n in (s.left, s.right) if n is not None]
        operands |= {n: ROWS for n in ends if n not in self.inside}
        widest = max(math.prod(map(_torch.size_hint, n.meta["val"].shape[1:])) for n in (*ends, *self.inside))
        rows = max(512, 1 << max(TILE // widest, 1).bit_length() - 1)
        whole = next((n for n, how in operands.items() if how == ROWS), None)
        if whole is None or any(how and rows * how[0] % how[1] for how in operands.values()):
            return None
        places: dict[fx.Node, Any] = {n: {"operand": i} for i, n in enumerate(operands)}
        places |= {n: {"step": i} for i, n in enumerate(steps)}
        sums = [
            Sum(
                places[s.left],
                s.right and places[s.right],
                list(s.node.meta["val"].shape),
                _name(s.node.meta["val"].dtype),
            )
            for s in self.sums
        ]
        calls = [_step(n, places) if made is None else _call(made, places) for n, made in steps.items()]
        program = Tiled(rows, list(operands.values()), calls, sums).dump()
        last = max([*operands, *graph.find_nodes(op="placeholder")])
        later = sorted(n for n in set().union(*(reached_from(s.node) for s in self.sums)) if n < last)
        for node in reversed(later):
            last.append(node)
        with graph.inserting_before(last.next):
            number = whole.meta["val"].shape[0]
            if not isinstance(number, int):
                number = call(graph, aten.sym_size.int, whole, 0, like=whole)
            result = call(graph, ops.row_sums.default, program, number, list(operands), like=self.sums[0].node)
            for i, s in enumerate(self.sums):
                s.node.replace_all_uses_with(call(graph, operator.getitem, result, i, like=s.node))
        for s in self.sums:
            graph.erase_node(s.node)
        return result

    def _steps(self) -> dict[fx.Node, Loop | None]:
        """What is computed for a tile, in order: a node by itself, or one of pointwise ops with those that it needs."""
        inside = set(self.inside)
        steps: dict[fx.Node, Loop | None] = {}
        todo = [n for s in self.sums for n in (s.left, s.right) if n is not None]
        while todo:
            node = todo.pop()
            if node in inside and node not in steps:
                steps[node] = made = _loop(node, inside)
                todo += node.all_input_nodes if made is None else made.operands
        return dict(sorted(steps.items()))


def _loop(node: fx.Node, inside: Collection[fx.Node]) -> Loop | None:
    """The loop that computes a node; None where it is no pointwise op, or can't be one of a loop."""
    if node.target not in POINTWISE or not is_computable(node):
        return None
    try:
        return loop(node, lambda n: n in inside and is_computable(n))
    except Unfit:
        return None


def _read_by(made: Loop) -> dict[fx.Node, How]:
    kinds = zip(made.operands, made.program.operands, strict=True)
    return {n: ROWS if operand.where == "edge" else None for n, operand in kinds}


def _sum(node: fx.Node) -> _Sum | None:
    if not is_tensor(node) or not _is_static(node.meta["val"].shape):
        return None
    match node:
        case fx.Node(target=aten.mm.default, args=(fx.Node() as left, fx.Node() as right)):
            matrix = left.args[0] if left.target is aten.permute.default and left.args[1] == [1, 0] else None
            if isinstance(matrix, fx.Node) and _is_tall(matrix) | _is_tall(right):
                return _Sum(node, matrix, right, left)
        case fx.Node(target=aten.sum.dim_IntList, args=(fx.Node() as value, [0], *_)) if not node.kwargs:
            if _is_tall(value) and value.meta["val"].is_floating_point():
                return _Sum(node, value)
    return None


def _is_tall(node: fx.Node) -> bool:
    """Whether a node is a tensor on the CPU of so many rows that it is worth cutting in tiles."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.device.type != "cpu":
        return False
    return numel_hint(value) >= LEAST * TILE and _is_static(value.shape[1:])


def _groups(graph: fx.Graph, refused: Collection[fx.Node]) -> Iterator[_Group]:
    """Sums that share what is made for them alone."""
    sums = {node: s for node in graph.nodes if node not in refused and (s := _sum(node))}
    turned = {s.turned for s in sums.values() if s.turned is not None and s.turned.users.keys() <= sums.keys()}
    inner: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        alone = all(user in sums or (user in inner and _reads_rows(user, node)) for user in node.users)
        if node.users and alone and node not in sums and (node in turned or _taken(node) is not None):
            inner.add(node)
    seen: set[fx.Node] = set()
    for first in sums:
        found, todo = set(), {first} - seen
        while todo:
            node = todo.pop()
            found.add(node)
            around = {*node.all_input_nodes} & inner | (node.users.keys() if node in inner else set())
            todo |= around - found
        seen |= found
        group = _Group([s for n, s in sums.items() if n in found], sorted(found & inner - turned))
        if group.inside:
            yield group


def _reads_rows(user: fx.Node, node: fx.Node) -> bool:
    """Whether a tile of what `user` makes takes a tile of `node`."""
    taken = _taken(user)
    return user.target is aten.permute.default if taken is None else taken.get(node) == ROWS


def _taken(node: fx.Node) -> dict[fx.Node, How] | None:
    """How the operands are taken from which a tile of rows of a node is made; None if it can't be."""
    value, target = node.meta.get("val"), node.target
    args: Any = node.args
    if not isinstance(value, torch.Tensor) or not value.dim() or not isinstance(target, torch._ops.OpOverload):
        return None
    sizes = value.shape[1:]
    match target, args:
        case ops.unpack_bits.default, (fx.Node() as words, *_):
            return {words: (math.prod(sizes), 32 * words.meta["val"].shape[1])} if _is_static(sizes) else None
        case ops.dequantize.default, (words, low, high, _, _, bits, block, levels, *units):
            fmt = BlockFormat(bits, block, levels, low.meta["val"].dtype, words.meta["val"].shape[1])
            tiles = dict.fromkeys((words, low, high), (math.prod(sizes), fmt.group))
            return {**tiles, **{n: None for n in units if n is not None}} if _is_static(sizes) else None
        case ((aten.mm.default | aten.addmm.default), (*bias, fx.Node() as left, fx.Node() as right)):
            fits = left is not right and all(n.meta["val"].dim() == 1 for n in bias) and not node.kwargs
            return {left: ROWS, right: None, **dict.fromkeys(bias)} if fits else None
        case aten.view.default, (fx.Node() as whole, [_, *others]):
            return {whole: ROWS} if _is_static(others) and _same_rows(whole, node) else None
        case aten.permute.default, (fx.Node() as whole, [0, *_]):
            return {whole: ROWS}
        case aten.unsqueeze.default, (fx.Node() as whole, int() as dim) if dim > 0:
            return {whole: ROWS}
    plain = all(isinstance(a, PLAIN) for a in (*args, *node.kwargs.values()))
    loop = torch.Tag.pointwise in target.tags or target in CASTS
    if not loop or not plain or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    found: dict[fx.Node, How] = {}
    for operand in node.all_input_nodes:
        if not is_tensor(operand):
            return None
        other = operand.meta["val"]
        found[operand] = None if other.dim() < value.dim() or _torch.known_true(other.shape[0] == 1) else ROWS
        if found[operand] and not _same_rows(operand, node):
            return None
    return found


def _as_large(node: fx.Node, other: fx.Node) -> bool:
    one, two = node.meta.get("val"), other.meta["val"]
    return isinstance(one, torch.Tensor) and one.dtype == two.dtype and numel_hint(one) == numel_hint(two)


def _is_static(sizes: Iterable[object]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _same_rows(node: fx.Node, other: fx.Node) -> bool:
    shapes = node.meta["val"].shape, other.meta["val"].shape
    return bool(shapes[0]) and _torch.known_true(shapes[0][0] == shapes[1][0])


def _step(node: fx.Node, places: Mapping[fx.Node, Any]) -> Step:
    """A node as a step of a program."""
    args: list[Any] = list(node.args)
    if node.target in DECODED:
        at = 3 if node.target is ops.dequantize.default else 1
        args[at] = [{"rows": None}, *node.meta["val"].shape[1:]]
    elif node.target is aten.view.default:
        args[1] = [-1, *args[1][1:]]

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return places[value]
        if isinstance(value, torch.dtype):
            return {"dtype": _name(value)}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    kwargs = {k: plain(v) for k, v in node.kwargs.items()}
    return Step(str(node.target), [plain(a) for a in args], kwargs)


def _call(made: Loop, places: Mapping[fx.Node, Any]) -> Step:
    """A loop as a step of a program."""
    size = [{"rows": None}, *made.end.meta["val"].shape[1:]]
    operands = [places[n] for n in made.operands]
    return Step(LOOP, [made.program.dump(), made.heads, made.columns, size, *operands], {})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
