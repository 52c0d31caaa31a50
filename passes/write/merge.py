"""`merge`: regions of message passing that read the same rows become one, with several results.

A layer's backward goes over the edges for each of its gradients: for those of the rows at either end, of what the
edges bring, of weights. Its regions are found one by one, by what they end with. Where they go by the same node and
none needs what another makes, one pass over the edges reads, and computes, what they share once. On the CPU: on CUDA
each result has a kernel of its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from actcompile.kernels.edges.ops import aggregation
from actcompile.kernels.edges.program import INNER, Operand, Output, Program, Step, parse, row_size

from ..graph.split import call, reached_from, root, writes

aten, ops = torch.ops.aten, torch.ops.actcompile
End = tuple[fx.Node, int, str]
"""The nodes at one end of every edge: an index, its row, and the number of rows that it counts from the end of."""
Row = tuple[Operand, End | None, fx.Node]
"""A row that is read: how, by which end where that is not the one that edges are grouped by, and of what."""


def merge(graph: fx.Graph, inputs: Collection[fx.Node]) -> None:
    """Merges the calls of `edges` and `aggregate` that can be, in place.

    Args:
        inputs: what every layer may read, so that it is no reason to put its readers together: it would have a layer
            wait for another.
    """
    known: dict[object, list[_Pass]] = {}
    for node in list(graph.nodes):
        if writes(node):  # what is read before it, and behind it, stays there
            known.clear()
        made = _read(node)
        if made is None:
            continue
        group = known.setdefault(made.alike, [])
        for i, earlier in enumerate(group):
            merged = _Merged()
            if earlier.shares(made, inputs) and node not in reached_from(earlier.node) and merged.takes(earlier, made):
                group[i] = _write(graph, earlier, made, merged)
                break
        else:
            group.append(made)


@dataclass(frozen=True)
class _Pass:
    """A call that goes over the edges.

    alike: what two that are merged have in common; arguments: those of `edges` from `by` to `columns`.
    """

    node: fx.Node
    program: Program
    arguments: tuple[Any, ...]
    ends: list[End]
    operands: list[fx.Node]
    grouped: list[fx.Node]

    @property
    def alike(self) -> object:
        by, row, nodes, *axes = self.arguments
        size = nodes.meta["val"] if isinstance(nodes, fx.Node) else nodes
        return by, row, str(size), *axes, *self.grouped, self.program.is_double, bool(self.program.inner)

    def rows(self) -> list[Row]:
        """What is read, by operand."""
        ends = [self.ends[o.index] if o.where == "take" and o.index >= 0 else None for o in self.program.operands]
        return list(zip(self.program.operands, ends, self.operands, strict=True))

    def by_edge(self) -> dict[tuple[str, End | None, fx.Node], int]:
        """The rows that are others for each edge, with their bytes."""
        _, _, _, heads, columns = self.arguments
        return {
            (o.where, end, n): row_size(o, heads, columns, self.program.inner) * n.meta["val"].dtype.itemsize
            for o, end, n in self.rows()
            if o.where == "edge" or end is not None
        }

    def shares(self, other: _Pass, inputs: Collection[fx.Node]) -> bool:
        """Whether half of what either reads for an edge is the same, and not only of inputs."""
        mine, theirs = self.by_edge(), other.by_edge()
        both = mine.keys() & theirs.keys()
        least = max(sum(mine.values()), sum(theirs.values())) / 2
        return any(root(n) not in inputs for *_, n in both) and sum(mine[row] for row in both) >= least

    def results(self) -> Iterator[tuple[int, fx.Node]]:
        """The nodes that stand for its outputs, with the output's number."""
        if self.node.target is ops.aggregate.default:
            yield 0, self.node
        else:
            for user in list(self.node.users):
                yield user.args[1], user  # type: ignore[misc]


def _read(node: fx.Node) -> _Pass | None:
    """A node as a pass over edges on the CPU; None where it is something else."""
    if node.target is ops.edges.default:
        text, by, row, nodes, heads, columns, tensors, rows, operands, grouped = node.args
        program = parse(text)  # type: ignore[arg-type]
    elif node.target is ops.aggregate.default:
        matrix, weight, take, take_row, by, row, nodes, grouped = node.args
        operands = [matrix] if weight is None else [matrix, weight]
        dtypes = (str(n.meta["val"].dtype)[6:] for n in operands)  # type: ignore[union-attr]
        program = parse(aggregation(*dtypes))
        heads, columns = 1, math.prod(matrix.meta["val"].shape[1:])  # type: ignore[union-attr]
        tensors, rows = [take], [take_row]
    else:
        return None
    if by.meta["val"].device.type != "cpu" or not isinstance(columns, int):  # type: ignore[union-attr]
        return None
    ends = []
    for i, (tensor, at) in enumerate(zip(tensors, rows, strict=True)):  # type: ignore[arg-type]
        taken = (n for o, n in zip(program.operands, operands, strict=True) if o.where == "take" and o.index == i)  # type: ignore[arg-type]
        ends.append((tensor, at, str(next(taken).meta["val"].shape[0])))
    return _Pass(node, program, (by, row, nodes, heads, columns), ends, list(operands), list(grouped))  # type: ignore[arg-type]


@dataclass
class _Merged:
    """The program of several passes, and what it works on: what any of them reads or computes is there once."""

    operands: list[Row] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    axes: list[tuple[object, int]] = field(default_factory=list)  # what the inner axes are rows of, and their sizes
    places: dict[tuple[fx.Node, int], int] = field(default_factory=dict)  # of each pass's results

    def takes(self, *passes: _Pass) -> bool:
        """Adds passes; False where they have too many inner axes for one program."""
        for made in passes:
            self._add(made)
        return len(self.axes) <= len(INNER)

    def program(self) -> Program:
        operands, sizes = tuple(o for o, _, _ in self.operands), tuple(size for _, size in self.axes)
        return Program(operands, tuple(self.steps), tuple(self.outputs), sizes)

    def _add(self, made: _Pass) -> None:
        letters = {INNER[i]: self._axis(made, i) for i in range(len(made.program.inner))}
        names: dict[str, str] = {}

        def level(own: str) -> str:
            return "".join(letters.get(axis, axis) for axis in own)

        for i, (operand, end, node) in enumerate(made.rows()):
            index = -1 if end is None else _place(self.ends, end)
            row = replace(operand, index=index, level=level(operand.level)), end, node
            names[f"o{i}"] = f"o{_place(self.operands, row)}"
        for i, step in enumerate(made.program.steps):
            arguments = tuple(names.get(a, a) if isinstance(a, str) else a for a in step.arguments)
            names[f"v{i}"] = f"v{_place(self.steps, replace(step, arguments=arguments, level=level(step.level)))}"
        for i, o in enumerate(made.program.outputs):
            own = replace(
                o, value=names[o.value], level=level(o.level), other=names.get(o.other, ""), axis=level(o.axis)
            )
            self.places[made.node, i] = _place(self.outputs, own)

    def _axis(self, made: _Pass, i: int) -> str:
        """The letter of an inner axis here: that of another pass, if both have the rows of one operand along it."""
        program, letter = made.program, INNER[i]
        products = (s.arguments for s in program.steps if s.op == "product")
        of = {row for row, matrix in products if program.operands[int(str(matrix)[1:])].level[0] == letter}
        of |= {o.other for o in program.outputs if o.kind == "outer" and o.axis == letter}
        read = [made.rows()[int(str(row)[1:])] for row in of if str(row)[0] == "o"]
        what = {(o.where, o.dtype, end, node) for o, end, node in read}
        alone = len(what) == 1 and len(read) == len(of)
        at = _place(self.axes, (what.pop() if alone else (made.node, letter), program.inner[i]))
        return INNER[at] if at < len(INNER) else letter


def _place(known: list[Any], new: object) -> int:
    """Where something is in a list, to which it is added if it isn't there yet."""
    if new not in known:
        known.append(new)
    return known.index(new)


def _write(graph: fx.Graph, earlier: _Pass, later: _Pass, merged: _Merged) -> _Pass:
    """Replaces two calls by one: where the first is, or else where the other is, with what uses the first behind it.

    Nodes that stand for results go on doing so: they may be what is saved for backward.
    """
    first = all(n < earlier.node for n in later.node.all_input_nodes)
    behind = [] if first else sorted(n for n in reached_from(earlier.node) if n < later.node)
    operands, ends = [node for _, _, node in merged.operands], merged.ends
    rest = [t for t, _, _ in ends], [row for _, row, _ in ends], operands, earlier.grouped
    with graph.inserting_before(earlier.node if first else later.node):
        program = merged.program()
        node = call(graph, ops.edges.default, program.dump(), *earlier.arguments, *rest, like=earlier.node)
    last, placed = node, set()
    for made in (earlier, later):
        for i, result in made.results():
            part, place = result, merged.places[made.node, i]
            if result is made.node and result.meta["val"].dim() != 2:
                with graph.inserting_after(last):
                    part = last = call(graph, operator.getitem, node, place, like=result)
                result.target, result.args = aten.view.default, (part, [-1, *result.meta["val"].shape[1:]])
            else:
                result.target, result.args = operator.getitem, (node, place)
            last.append(result)
            last = result
            placed.add(result)
        if made.node.target is ops.edges.default:
            graph.erase_node(made.node)
    for moved in (n for n in behind if n not in placed):
        last.append(moved)
        last = moved
    return _Pass(node, program, earlier.arguments, ends, operands, earlier.grouped)
