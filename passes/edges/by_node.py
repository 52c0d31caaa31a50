"""`by_node`: products of messages are made once for each node, instead of for each of its edges.

A layer that multiplies weights with rows that it has taken of nodes, `W [x_i, x_j, e]`, computes each node's product as
often as the node has edges, and holds what it multiplied and what came out in rows of edges. In the joint graph, before
regions are looked for:

- `W [x_i, x_j - x_i, e] = ((W_1 - W_2) x)_i + (W_2 x)_j + W_3 e`: rows are taken of products.
- `sum_e W m_e = W sum_e m_e`: what is summed up by node is multiplied after that.
- `sum_e g_e x_e^T = sum_i (sum_e g_e) x_i^T`: so are gradients of weights.

Each of them is another order of the same sums. It is done where there are fewer nodes than edges, of floats that
programs work with: those add 16-bit floats up in float32, torch in 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph import _torch
from ..graph.split import is_tensor
from .calls import Calls
from .columns import Part, Taken, has_fewer_rows, parts_of
from .computable import is_float
from .takes import PRODUCTS, Index, Reduction, is_transposed, original, reduction_of, size_of

aten = torch.ops.aten
SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.neg.default)
OF_ROWS = (aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim)  # the same of each row
DEEPEST = 100  # ops between a product and a sum over edges


def by_node(joint: fx.Graph) -> None:
    """Moves products of a joint graph from edges to nodes, in place."""
    _ByNode(joint).run()


class _ByNode(Calls):
    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        self.sums: dict[tuple[fx.Node, Index, str], fx.Node] = {}  # rows of edges, by node -> their sums
        self.of_products: dict[fx.Node, int] = {}  # what is linear in a product, through so many ops

    def run(self) -> None:
        moved = False
        for node in list(self.graph.nodes):
            if not is_tensor(node) or node.kwargs:
                continue
            self._follow(node)
            with self.graph.inserting_before(node):
                new = self._rewritten(node)
            if new is not None:
                node.replace_all_uses_with(new)
                moved = True
        for node in list(self.graph.nodes):
            self._sum_of_sums(node)
        if moved:
            self.graph.eliminate_dead_code()
            for node in reversed(self.graph.nodes):
                self.made.clear()  # what was made for a later node comes too late
                self._only_columns(node)
            self.graph.eliminate_dead_code()

    def _follow(self, node: fx.Node) -> None:
        """Notes whether a value is linear in a product, through ops that `_sum` goes through."""
        if node.target is aten.mm.default:
            self.of_products[node] = 0
        through = [self.of_products[v] for v in map(original, _linear_in(node)) if v in self.of_products]
        if through and max(through) < DEEPEST:
            self.of_products[node] = 1 + max(through)

    def _rewritten(self, node: fx.Node) -> fx.Node | None:
        reduction = reduction_of(node)
        if reduction is not None and reduction.kind == "sum" and has_fewer_rows(node, reduction.value):
            return self._summed_first(node, reduction)
        if node.target in PRODUCTS:
            args: list[Any] = list(node.args)
            *bias, one, other = args
            if is_transposed(one) and not bias:
                return self._weights(node, one.args[0], other)
            return self._taken_of_products(node, one, other, *bias)
        return None

    # W [x_i, x_j, e]

    def _taken_of_products(self, node: fx.Node, rows: fx.Node, weights: fx.Node, bias: Any = None) -> fx.Node | None:
        parts = parts_of(rows)
        if parts is None:
            return None
        start, rest = 0, []
        of_rows: dict[Taken, fx.Node] = {}
        for part in parts:
            columns = self.slice(node, weights, 0, start, start + part.width)
            start += part.width
            if not part.terms:
                rest.append((part.node, columns))
            for sign, taken in part.terms:
                of_rows[taken] = self._plus(of_rows.get(taken), sign, columns, like=node)
        result = None
        if rest:
            left = rest[0][0] if len(rest) == 1 else self.call(node, aten.cat.default, [n for n, _ in rest], 1)
            right = rest[0][1] if len(rest) == 1 else self.call(node, aten.cat.default, [w for _, w in rest], 0)
            result = self.call(node, aten.mm.default, left, right)
        for taken, columns in of_rows.items():
            matrix = self._matrix(taken, node)
            if bias is not None and _is_row(bias):
                product, bias = self.call(node, aten.addmm.default, bias, matrix, columns), None
            else:
                product = self.call(node, aten.mm.default, matrix, columns)
            row = self.call(node, aten.index.Tensor, product, [self._index(taken.take.index, node)])
            result = row if result is None else self.call(node, aten.add.Tensor, result, row)
        return result if bias is None else self.call(node, aten.add.Tensor, result, bias)

    # sum_e W m_e

    def _summed_first(self, node: fx.Node, reduction: Reduction) -> fx.Node | None:
        if original(reduction.value) not in self.of_products:
            return None
        size = reduction.nodes if reduction.nodes is not None else self._rows_of(reduction.base, node)
        result = self._sum(reduction.value, reduction.index, size, node)
        return result if reduction.base is None else self.call(node, aten.add.Tensor, reduction.base, result)

    def _sum(self, value: fx.Node, index: Index, nodes: object, like: fx.Node) -> fx.Node:
        """The sums of rows of edges by node, which products are made of."""
        value = original(value)
        key = value, index, str(size_of(nodes))
        if key in self.sums:
            return self.sums[key]
        if value not in self.of_products and not _is_tower(value):
            sizes = value.meta["val"]
            start = self.call(like, aten.full.default, [nodes, *sizes.shape[1:]], 0.0, dtype=sizes.dtype,
                               layout=torch.strided, device=sizes.device, pin_memory=False)  # fmt: skip
            where = self._index(index, like)
            result = self.call(like, aten.index_put.default, start, [where], value, True)
        elif value.target is aten.mm.default:
            rows = self._sum(value.args[0], index, nodes, like)  # type: ignore[arg-type]
            result = self.call(like, aten.mm.default, rows, value.args[1])
        else:
            inside = _linear_in(value)
            args = fx.map_arg(value.args, lambda a: self._sum(a, index, nodes, like) if a in inside else a)
            result = self.call(like, value.target, *args)
        self.sums[key] = result
        return result

    # sum_e g_e x_e^T

    def _weights(self, node: fx.Node, one: fx.Node, other: fx.Node) -> fx.Node | None:
        """The product of two matrices along their edges."""
        for left, right, dim in ((other, one, 1), (one, other, 0)):
            parts = parts_of(left) if is_float(right) else None  # sums of other 16-bit floats are torch's, and coarse
            if parts is None:
                continue
            blocks = [self._block(node, part, right, dim) for part in parts]
            return blocks[0] if len(blocks) == 1 else self.call(node, aten.cat.default, blocks, dim)
        return None

    def _block(self, node: fx.Node, part: Part, other: fx.Node, dim: int) -> fx.Node:
        if not part.terms:
            return self._along_rows(node, part.node, other, dim)
        result: fx.Node | None = None
        for sign, taken in part.terms:
            matrix = self._matrix(taken, node)
            sums = self._sum(other, taken.take.index, self._rows_of(matrix, node), node)
            result = self._plus(result, sign, self._along_rows(node, matrix, sums, dim), like=node)
        assert result is not None
        return result

    def _along_rows(self, node: fx.Node, matrix: Any, other: fx.Node, dim: int) -> fx.Node:
        first, second = (other, matrix) if dim else (matrix, other)
        transposed = self.call(node, aten.permute.default, first, [1, 0])
        return self.call(node, aten.mm.default, transposed, second)

    def _sum_of_sums(self, node: fx.Node) -> None:
        """A sum over all edges is one over nodes, where their sums are made anyway."""
        match node:
            case fx.Node(target=aten.sum.dim_IntList, args=(fx.Node() as value, [0], *_)) if not node.kwargs:
                for (rows, _, _), sums in self.sums.items():
                    if rows is original(value) and sums < node:
                        node.replace_input_with(value, sums)
                        return

    # of a product, what is left of it

    def _only_columns(self, node: fx.Node) -> None:
        """Makes only those columns of a product that anything still needs."""
        match node:
            case fx.Node(target=aten.slice.Tensor, args=(fx.Node() as value, 1, *ends)) if len(value.users) == 1:
                pass
            case _:
                return
        with self.graph.inserting_before(node):
            if value.target is aten.mm.default:
                columns = self.call(node, aten.slice.Tensor, value.args[1], 1, *ends)
                node.replace_all_uses_with(self.call(node, aten.mm.default, value.args[0], columns))
            elif value.target in SUMS and (inside := _linear_in(value)):
                args = [self.call(node, aten.slice.Tensor, a, 1, *ends) if a in inside else a for a in value.args]
                node.replace_all_uses_with(self.call(node, value.target, *args))
                self.graph.erase_node(node)
                self.graph.erase_node(value)
                self.made.clear()
                for arg in args:
                    if isinstance(arg, fx.Node) and arg.target is aten.slice.Tensor:
                        self._only_columns(arg)

    def _matrix(self, rows: Taken, like: fx.Node) -> fx.Node:
        """What rows are taken of."""
        matrix = rows.take.matrix
        for op in rows.chain:
            args = list(op.args)
            if op.target in (aten.view.default, aten.reshape.default):
                args[1] = [-1, *op.meta["val"].shape[1:]]
            matrix = self.call(like, op.target, matrix, *args[1:], **op.kwargs)
        return matrix

    # nodes of the graph

    def _index(self, index: Index, like: fx.Node) -> fx.Node:
        if index.row < 0:
            return index.tensor
        return self.call(like, aten.select.int, index.tensor, 0, index.row)

    def _rows_of(self, matrix: Any, like: fx.Node) -> object:
        size = matrix.meta["val"].shape[0]
        return size if isinstance(size, int) else self.call(like, aten.sym_size.int, matrix, 0)

    def _plus(self, sum: fx.Node | None, sign: int, term: fx.Node, like: fx.Node) -> fx.Node:
        if sum is None:
            return term if sign > 0 else self.call(like, aten.neg.default, term)
        return self.call(like, aten.add.Tensor if sign > 0 else aten.sub.Tensor, sum, term)


def _linear_in(value: fx.Node) -> list[fx.Node]:
    """What a value is linear in, row by row, of the ops that can be done to sums of rows just as well."""
    match value:
        case fx.Node(target=aten.add.Tensor | aten.sub.Tensor, args=(fx.Node() as a, fx.Node() as b)):
            both = all(is_tensor(n) and _torch.same_sizes(n.meta["val"].shape, value.meta["val"].shape) for n in (a, b))
            return [a, b] if both and not value.kwargs else []
        case fx.Node(target=aten.neg.default, args=(fx.Node() as a,)):
            return [a]
        case fx.Node(target=target, args=(fx.Node() as a, int() as dim, *_)) if target in OF_ROWS and dim > 0:
            return [a]
        case fx.Node(target=aten.cat.default, args=([*pieces], int() as dim)) if dim > 0:
            return pieces  # type: ignore[return-value]
    return []


def _is_tower(value: fx.Node) -> bool:
    """Whether a value is one of the towers of rows: sums of all of them are made at once."""
    return value.target is aten.select.int and bool(_linear_in(value)) and value.args[0].meta["val"].dim() == 3  # type: ignore[union-attr]


def _is_row(bias: object) -> bool:
    return isinstance(bias, fx.Node) and bias.meta["val"].dim() == 1
