"""Regions of message passing become calls of ops, in place of the nodes that they end with."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..graph import _torch
from ..graph.bodies import BODY
from ..graph.split import call, inherit_origin
from .find import Count, Finder, Found, Sums
from .regions import Region
from .takes import Index, Reduction, is_remembered, reduction_of, size_of

aten, prims, ops = torch.ops.aten, torch.ops.prims, torch.ops.actcompile


class Writer:
    """Writes what was found into its graph."""

    def __init__(self, finder: Finder) -> None:
        self.graph, self.matrices, self.swapped = finder.graph, finder.matrices, finder.swapped
        self.grouped: dict[tuple[Index, str], tuple[fx.Node, fx.Node]] = {}
        self.replaced: dict[fx.Node, fx.Node] = {}

    def write(self, found: Found) -> None:
        """Replaces the ends of regions; what only these needed goes."""
        bodies = {node: _body(made) for node, made in found.items() if isinstance(made, Region)}
        for node, made in found.items():
            if isinstance(made, Region):
                result = self._call(made, bodies[node])
            else:
                result = self._aggregate(node, made) if isinstance(made, Sums) else self._degree(node, made)
            result = self._added(node, result)
            node.replace_all_uses_with(result)
            self.graph.erase_node(node)
            self.replaced[node] = result
            result.name = node.name
        self.graph.eliminate_dead_code()

    def _aggregate(self, node: fx.Node, made: Sums) -> fx.Node:
        """Inserts the call that sums rows up before the node that does."""
        take, weight, reduction = made.take, made.weight, made.reduction
        with self.graph.inserting_before(node):
            by, row = reduction.index.tensor, reduction.index.row
            nodes = self._nodes(reduction)
            grouped = self._grouped(reduction.index, nodes, node)
            matrix, other = self._now(take.matrix), take.index
            return call(
                self.graph, ops.aggregate.default, matrix, weight and self._now(weight), other.tensor, other.row, by,
                row, nodes, grouped, like=node,
            )  # fmt: skip

    def _degree(self, node: fx.Node, made: Count) -> fx.Node:
        """Inserts the call that counts a node's edges before the node that does."""
        index, value = made.reduction.index, node.meta["val"]
        with self.graph.inserting_before(node):
            nodes = self._nodes(made.reduction)
            grouped = self._grouped(index, nodes, node)
            result = call(self.graph, ops.degree.default, index.tensor, index.row, nodes, grouped, like=node)
            _torch.must_recompute(result)
            if value.dtype is not torch.int64:
                result = call(self.graph, prims.convert_element_type.default, result, value.dtype, like=node)
            if made.number != 1:
                number = made.number if value.is_floating_point() else int(made.number)
                result = call(self.graph, aten.mul.Tensor, result, number, like=node)
            return result if value.dim() == 1 else call(self.graph, aten.unsqueeze.default, result, 1, like=node)

    def _now(self, node: fx.Node) -> fx.Node:
        """What stands for a node now."""
        return self.replaced.get(node, node)

    def _call(self, made: Region, body: fx.Graph) -> fx.Node:
        """Inserts the call of a region's program before the node that it ends with; returns the result in its shape."""
        graph, end = self.graph, made.end
        kind = made.program.outputs[0].kind
        reduction = reduction_of(end)
        program = made.program.dump()
        with graph.inserting_before(end):
            nodes = self._nodes(reduction) if reduction is not None else self._rows(end)
            result = call(
                graph, ops.edges.default, program, made.by.tensor, made.by.row, nodes, made.heads,
                made.columns, [i.tensor for i in made.indices], [i.row for i in made.indices],
                [self._now(n) for n in made.operands], self._grouped(made.by, nodes, end), like=end,
            )  # fmt: skip
            result.meta[BODY] = body
            inherit_origin(part := call(graph, operator.getitem, result, 0), end)
            value = end.meta["val"]
            if made.program.outputs[0].dtype == "bits":
                return part
            if kind == "outer":
                return call(graph, aten.permute.default, part, [1, 0], like=end) if end in self.swapped else part
            if kind == "total":
                return call(graph, aten.view.default, part, list(value.shape), like=end)
            if value.dim() == 2 and _torch.known_true(value.shape[1] == part.meta["val"].shape[1]):
                return part
            return call(graph, aten.view.default, part, [-1, *value.shape[1:]], like=end)

    def _nodes(self, reduction: Reduction) -> object:
        """The number of rows of a sum by node."""
        if reduction.nodes is not None:
            return reduction.nodes
        base = self._now(reduction.base)  # type: ignore[arg-type]
        return call(self.graph, aten.sym_size.int, base, 0, like=base)

    def _added(self, node: fx.Node, result: fx.Node) -> fx.Node:
        """What stands for `node`, given its sums: with what they are added to."""
        reduction = reduction_of(node)
        if reduction is None or reduction.base is None:
            return result
        with self.graph.inserting_before(node):
            return call(self.graph, aten.add.Tensor, self._now(reduction.base), result, like=node)

    def _rows(self, end: fx.Node) -> object:
        """The number of nodes that edges are grouped by, where no sum says it: of the rows that are taken by it."""
        matrix = self._now(self.matrices[end])
        size = matrix.meta["val"].shape[0]
        return size if isinstance(size, int) else call(self.graph, aten.sym_size.int, matrix, 0, like=matrix)

    def _grouped(self, index: Index, nodes: object, before: fx.Node) -> list[fx.Node]:
        """The grouping of edges the graph makes, once for all layers; none for inputs, where it is remembered."""
        tensor = index.tensor
        if is_remembered(index):
            return []
        key = index, str(size_of(nodes))
        if key not in self.grouped:
            both = call(self.graph, ops.group_edges.default, tensor, index.row, nodes, like=before)
            parts = [call(self.graph, operator.getitem, both, i, like=before) for i in range(2)]
            for node in (both, *parts):
                _torch.must_recompute(node)  # backward rather sorts again than reads what was saved
            self.grouped[key] = parts[0], parts[1]
        return list(self.grouped[key])


def _body(made: Region) -> fx.Graph:
    """What a region computes as a graph: its first inputs are the operands, its output is the end."""
    nodes = sorted({*made.inside, made.end})
    inputs = [n for node in nodes for n in node.all_input_nodes if n not in nodes]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in (*made.operands, *dict.fromkeys(n for n in inputs if n not in made.operands)):
        placeholder = graph.placeholder(node.name)
        placeholder.meta["val"] = node.meta.get("val")
        copies.setdefault(node, placeholder)
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[made.end])
    return graph
