"""`scaled`: rows that stand beside themselves, scaled row by row, are multiplied with weights before they are scaled.

A layer such as PNAConv multiplies `[x, a, s a, t a]`, of several aggregations `a` and of numbers `s` and `t` that each
node has by its degree: a matrix several times as wide as `a`, which is made, saved, and has a gradient as wide. But
`(s a) W = s (a W)`: one product of `a` with the weights side by side is scaled where it is narrow. The gradient by `a`
is `[g, s g, t g] [W_1, W_2, W_3]^T`, and those by the weights `a^T [g, s g, t g]`: what is scaled is as narrow there,
too. Each is another order of the same sums. It is done where the matrix that is made becomes smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from ..graph import _torch
from ..graph.split import is_tensor
from .calls import Calls
from .takes import PRODUCTS, is_transposed, original

aten = torch.ops.aten
Slice = tuple[fx.Node, int, int]  # a matrix, and which columns of it


@dataclass(frozen=True)
class Rows:
    """A matrix, or one of the towers of (rows, towers, columns)."""

    value: fx.Node
    tower: int | None


@dataclass(frozen=True)
class Columns:
    """Columns of a matrix: some rows, times a number for each; as they are where there is none."""

    rows: Rows
    scale: fx.Node | None
    start: int

    @property
    def end(self) -> int:
        return self.start + int(self.rows.value.meta["val"].shape[-1])


@dataclass(frozen=True)
class Term:
    """A summand: columns of products, one for each of its towers, times a number for each row."""

    towers: tuple[Slice, ...]
    scale: fx.Node | None

    @property
    def products(self) -> tuple[fx.Node, ...]:
        return tuple(product for product, _, _ in self.towers)


def scaled(joint: fx.Graph) -> None:
    """Multiplies rows before they are scaled, in a joint graph, in place."""
    _Scaled(joint).run()


class _Scaled(Calls):
    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.target in PRODUCTS and is_tensor(node) and not node.kwargs and _is_float(node):
                with self.graph.inserting_before(node):
                    new = self._product(node)
                if new is not None:
                    node.replace_all_uses_with(new)
        inner, cut = set[fx.Node](), set[fx.Node]()
        for node in reversed(list(self.graph.nodes)):
            if _is_sum(node) and node not in inner:
                self.made.clear()  # what was made for a later node comes too late
                with self.graph.inserting_before(node):
                    new = self._gradient(node, inner, cut)
                if new is not None:
                    node.replace_all_uses_with(new)
        self.graph.eliminate_dead_code()
        for product in cut & set(self.graph.nodes):
            self._only_columns(product, product, 0)
        self.graph.eliminate_dead_code()

    # [x, a, s a] W, and the gradient by W

    def _product(self, node: fx.Node) -> fx.Node | None:
        *bias, one, other = node.args
        if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
            return None
        if not is_transposed(one):
            groups = _groups(one, other.meta["val"].shape[1])
            return self._multiplied(node, groups, other, *bias) if groups else None
        for rows, gradient, dim in ((other, one.args[0], 1), (one.args[0], other, 0)):
            groups = _groups(rows, gradient.meta["val"].shape[1]) if not bias else []  # type: ignore[arg-type, union-attr]
            if groups:
                return self._weights(node, groups, gradient, dim)
        return None

    def _multiplied(self, node: fx.Node, groups: Sequence[Sequence[Columns]], weights: fx.Node, *bias: Any) -> fx.Node:
        result: fx.Node | None = None
        width = weights.meta["val"].shape[1]
        for group in groups:
            rows = self._matrix(node, group[0].rows)
            beside = self._beside(node, [self.slice(node, weights, 0, c.start, c.end) for c in group], 1)
            if result is None and bias and len(group) == 1 and group[0].scale is None:
                result, bias = self.call(node, aten.addmm.default, *bias, rows, beside), ()
                continue
            product = self.call(node, aten.mm.default, rows, beside)
            for i, columns in enumerate(group):
                part = self._times(node, self.slice(node, product, 1, i * width, (i + 1) * width), columns.scale)
                result = part if result is None else self.call(node, aten.add.Tensor, result, part)
        assert result is not None
        return self.call(node, aten.add.Tensor, result, *bias) if bias else result

    def _weights(self, node: fx.Node, groups: Sequence[Sequence[Columns]], gradient: Any, dim: int) -> fx.Node:
        """The product of some rows and their gradient along them; dim: which one of it has the columns of the rows."""
        blocks: dict[int, fx.Node] = {}
        width = gradient.meta["val"].shape[1]
        for group in groups:
            rows, beside = self._matrix(node, group[0].rows), self._scaled(node, gradient, group)
            first, second = (beside, rows) if dim else (rows, beside)
            transposed = self.call(node, aten.permute.default, first, [1, 0])
            product = self.call(node, aten.mm.default, transposed, second)
            for i, columns in enumerate(group):
                blocks[columns.start] = self.slice(node, product, 1 - dim, i * width, (i + 1) * width)
        return self._beside(node, [blocks[start] for start in sorted(blocks)], dim)

    # the gradient by a

    def _gradient(self, node: fx.Node, inner: set[fx.Node], cut: set[fx.Node]) -> fx.Node | None:
        """A sum of columns of the same product, each times a number for each row, as one product; notes the sums inside
        of the sum, and the products whose columns were read."""
        summands = list(_summands(node, inner))
        groups: dict[tuple[fx.Node, ...], dict[fx.Node, Term]] = {}
        for summand in summands:
            if (term := _term(summand)) is not None:
                groups.setdefault(term.products, {})[summand] = term
        made = list[fx.Node]()
        for products, terms in groups.items():
            widths = [product.args[0].meta["val"].shape[1] for product in products]  # type: ignore[union-attr]
            smaller = _makes_less(node.meta["val"].shape[-1], max(widths), len(terms))
            if smaller and any(t.scale is not None for t in terms.values()):
                made.append(self._multiplied_once(node, sorted(terms.values(), key=lambda t: t.towers[0][1])))
                summands = [s for s in summands if s not in terms]
                cut.update(products)
        if not made:
            return None
        result, *others = summands + made
        for other in others:
            result = self.call(node, aten.add.Tensor, result, other)
        return result

    def _multiplied_once(self, node: fx.Node, terms: Sequence[Term]) -> fx.Node:
        towers = []
        for slices in zip(*(term.towers for term in terms), strict=True):
            gradient, weights = slices[0][0].args
            columns = [self.slice(node, weights, 1, start, end) for _, start, end in slices]
            left, right = self._scaled(node, gradient, terms), self._beside(node, columns, 0)
            towers.append(self.call(node, aten.mm.default, left, right))
        if _rank(node) == 2:
            return towers[0]
        return self._beside(node, [self.call(node, aten.unsqueeze.default, tower, 1) for tower in towers], 1)

    def _only_columns(self, product: fx.Node, value: fx.Node, start: int) -> None:
        """Makes of a product, of which `value` are columns from `start` on, only those that are still read."""
        for user in list(value.users):
            if (ends := _ends(user)) is None:
                return
            begin = start + ends[0]
            if not all(_ends(reader) for reader in user.users):
                with self.graph.inserting_before(user):
                    self.made.clear()
                    columns = self.slice(user, product.args[1], 1, begin, begin + ends[1] - ends[0])
                    user.replace_all_uses_with(self.call(user, aten.mm.default, product.args[0], columns))
            else:
                self._only_columns(product, user, begin)

    # nodes of the graph

    def _matrix(self, like: fx.Node, rows: Rows) -> fx.Node:
        return rows.value if rows.tower is None else self.call(like, aten.select.int, rows.value, 1, rows.tower)

    def _scaled(self, like: fx.Node, gradient: Any, terms: Sequence[Columns | Term]) -> fx.Node:
        """The gradient of each of some terms, side by side."""
        return self._beside(like, [self._times(like, gradient, term.scale) for term in terms], 1)

    def _times(self, like: fx.Node, matrix: fx.Node, scale: fx.Node | None) -> fx.Node:
        if scale is None:
            return matrix
        numbers = scale if _rank(scale) == 2 else self.call(like, aten.squeeze.dim, scale, 1)
        return self.call(like, aten.mul.Tensor, matrix, numbers)

    def _beside(self, like: fx.Node, matrices: Sequence[fx.Node], dim: int) -> fx.Node:
        return matrices[0] if len(matrices) == 1 else self.call(like, aten.cat.default, list(matrices), dim)


def _groups(matrix: fx.Node, width: int) -> list[list[Columns]]:
    """The columns of a matrix by the rows that they are multiples of; none where a product of `width` columns with each
    of them is no smaller."""
    total = matrix.meta["val"].shape[1]
    if not isinstance(total, int) or not isinstance(width, int):
        return []
    groups: dict[Rows, list[Columns]] = {}
    for columns in _columns(original(matrix)):
        value, dims = columns.rows.value.meta["val"], 2 if columns.rows.tower is None else 3
        if value.dtype != matrix.meta["val"].dtype or value.dim() != dims or not isinstance(value.shape[-1], int):
            return []  # `cat` takes other dtypes, and empty tensors of other dimensions
        groups.setdefault(columns.rows, []).append(columns)
    scaled = [columns for columns in groups.values() if any(c.scale is not None for c in columns)]
    worth = [_makes_less(columns[0].end - columns[0].start, width, len(columns)) for columns in scaled]
    return list(groups.values()) if worth and all(worth) else []


def _makes_less(width: object, other: object, times: int) -> bool:
    """Whether rows of a width, and so many products of another width, are less than so many multiples of them."""
    return isinstance(width, int) and isinstance(other, int) and width + other * times < width * times


def _columns(matrix: fx.Node) -> list[Columns]:
    """The columns of a matrix, from left to right; rows that are also scaled are not taken apart."""
    whole = {rows for rows, scale in _leaves(matrix, None, set()) if scale is not None}
    leaves = list(_leaves(matrix, None, whole))
    starts = accumulate((rows.value.meta["val"].shape[-1] for rows, _ in leaves), initial=0)
    return [Columns(rows, scale, start) for (rows, scale), start in zip(leaves, starts, strict=False)]


def _leaves(value: fx.Node, tower: int | None, whole: set[Rows]) -> Iterator[tuple[Rows, fx.Node | None]]:
    if Rows(value, tower) in whole:
        yield Rows(value, tower), None
        return
    match value:
        case fx.Node(target=aten.squeeze.dim, args=(fx.Node() as rows, 1)) if _rank(rows) == 3 and tower is None:
            yield from _leaves(original(rows), 0, whole)
        case fx.Node(target=aten.select.int, args=(fx.Node() as rows, 1, int() as one)) if _rank(rows) == 3:
            yield from _leaves(original(rows), one, whole)
        case fx.Node(target=aten.cat.default, args=([*pieces], int() as dim)) if dim in (-1, _rank(value) - 1):
            for piece in pieces:
                yield from _leaves(original(piece), tower, whole)  # type: ignore[arg-type]
        case _:
            rows, scale = _unscaled(value)
            yield Rows(original(rows), tower), scale


def _unscaled(value: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What a value is a multiple of, row by row, and the numbers that it is multiplied with."""
    match value:
        case fx.Node(target=aten.mul.Tensor, args=(fx.Node() as one, fx.Node() as other)) if all(
            map(is_tensor, (value, one, other))
        ):
            sizes = value.meta["val"]
            for rows, scale in ((one, other), (other, one)):
                alike = rows.meta["val"].dtype == scale.meta["val"].dtype
                narrow = (*sizes.shape[:1], *[1] * (sizes.dim() - 1))
                if alike and _has_sizes(rows, sizes.shape) and _has_sizes(scale, narrow) and sizes.shape[-1] != 1:
                    return rows, scale
    return value, None


def _summands(node: fx.Node, inner: set[fx.Node]) -> Iterator[fx.Node]:
    for arg in node.args:
        assert isinstance(arg, fx.Node)
        if _is_sum(arg) and len(arg.users) == 1:
            inner.add(arg)
            yield from _summands(arg, inner)
        else:
            yield arg


def _term(summand: fx.Node) -> Term | None:
    """The columns of products that a summand is made of, where nothing else reads them; else None."""
    rows, scale = _unscaled(summand)
    chain = [summand, rows]
    towers = [rows]
    if _rank(rows) == 3:
        if rows.target is aten.cat.default and rows.args[1:] == (1,):
            towers = list(rows.args[0])  # type: ignore[arg-type]
        if any(tower.target is not aten.unsqueeze.default or tower.args[1] != 1 for tower in towers):
            return None
        chain += towers
        towers = [tower.args[0] for tower in towers]  # type: ignore[misc]
    if not all(len(node.users) == 1 for node in chain + towers) or not all(map(_ends, towers)):
        return None
    slices = list(map(_columns_of_product, towers))
    return Term(tuple(s for s in slices if s), scale) if all(slices) else None


def _columns_of_product(columns: fx.Node) -> Slice | None:
    value, start = columns, 0
    while (ends := _ends(value)) is not None:
        start += ends[0]
        value = value.args[0]  # type: ignore[assignment]
        if any(_ends(user) is None for user in value.users):
            return None
    if value.target is not aten.mm.default or is_transposed(value.args[0]) or not _is_float(value):
        return None
    return value, start, start + columns.meta["val"].shape[1]


def _ends(node: fx.Node) -> tuple[int, int] | None:
    """Which columns of a matrix a node is, if it is some."""
    match node:
        case fx.Node(target=aten.slice.Tensor, args=(fx.Node() as value, 1, int() as start, int() as end)) if (
            0 <= start <= end and _rank(value) == 2
        ):
            return start, start + node.meta["val"].shape[1]
    return None


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two tensors of its own shape."""
    if node.target is not aten.add.Tensor or node.kwargs or not is_tensor(node) or _rank(node) not in (2, 3):
        return False
    return _is_float(node) and all(isinstance(a, fx.Node) and _has_sizes(a, node.meta["val"].shape) for a in node.args)


def _has_sizes(node: fx.Node, sizes: Sequence[Any]) -> bool:
    return is_tensor(node) and _torch.same_sizes(node.meta["val"].shape, sizes)


def _is_float(node: fx.Node) -> bool:
    """Whether a node's floats are no coarser for another order: numbers of 16 bits are rounded at each step."""
    return node.meta["val"].dtype in (torch.float32, torch.float64)


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())
