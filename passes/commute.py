"""`commute`: a layer's aggregate need not be saved where what it aggregates is.

A message-passing layer computes `s = L x`, with `L` a linear map of rows: take the rows of all neighbours, weigh them,
add them up. Then come weights, `s W`. With `g` the gradient of that product, backward computes

    grad_W = s^T g,    grad_x = L^T (g W^T),

and `s` is saved for the first. But `(L x)^T g = x^T (L^T g)`, and `L^T (g W^T) = (L^T g) W^T`, since a map of rows
commutes with a product from the right. So with `t = L^T g`

    grad_W = x^T t,    grad_x = t W^T,

at the same cost, less where `g` is narrower than `x`, as in a last layer. `s` is not saved any more, and `x` often is
without it: for a layer's root weights, or as `rebuild` computes it from what a normalisation saves.

Nothing is differentiated here: `L^T` is what backward applies already. It is compared with `L`, step by step, and
moved to before the product. The gradients are those of before, but for the order in which floats are added.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from . import _torch
from .find import SavedActivation, dense_order, module_path
from .rebuild import computable
from .split import Split, call, is_tensor, writes

aten = torch.ops.aten

LONGEST = 16  # ops of a map of rows
TRANSPOSED = {"take": "sum", "sum": "take", "mul": "mul", "div": "div"}
Map = Counter[tuple[tuple[str, object], ...]]
"""A map of rows as a sum of products. The factors of each, first to last, are kinds of `_RowOp` and what they go by."""


@dataclass(frozen=True)
class Commuted:
    """An activation that is not saved, since backward maps a gradient instead, and what it was mapped from."""

    activation: SavedActivation
    source: fx.Node

    @property
    def reason(self) -> str:
        source = f"{module_path(self.source)}/{self.source.name}".lstrip("/")
        return f"backward aggregates the gradient instead, and multiplies it with {source}: the same product"


def commute(split: Split, activations: Iterable[SavedActivation], kind: Callable[[fx.Node], object]) -> list[Commuted]:
    """Moves maps of rows before products in backward, so that what they mapped in forward is not saved.

    Args:
        activations: those that may go, as `find` returned them.
        kind: what is used in the place of another activation must be of its kind: a rule for one module holds for it.

    Returns:
        those that went. What they were mapped from is saved already, or is saved now and left to `rebuild`.
    """
    names = _Names(split)
    made = []
    for activation in activations:
        product = _product(activation)
        if product is None:
            continue
        fitting = []
        for source, mapped in _sources(product.matrix, names):
            back = _find_transpose(product, mapped, names)
            if back is not None and _fits(split, activation, source, product, back, kind):
                fitting.append((source, back))
        if fitting:
            source, back = next((f for f in fitting if _alive(split, f[0])), fitting[0])
            _move(split, source, product, back, names)
            split.drop_unused()
            made.append(Commuted(activation, source))
    return made


def _alive(split: Split, node: fx.Node) -> bool:
    return node.op == "placeholder" or any(node in (saved, _transposed(saved)) for saved, _ in split.pairs)


@dataclass(frozen=True)
class _Product:
    """The one matrix product of backward that uses a saved matrix: `gradient^T matrix`, or `matrix^T gradient`.

    matrix: the forward node. It may be saved the other way round.
    """

    node: fx.Node
    matrix: fx.Node
    gradient: fx.Node
    matrix_first: bool


@dataclass(frozen=True)
class _Back:
    """Where backward applies a map: to `start`, by `nodes` in order, the last of them its result."""

    start: fx.Node
    nodes: list[fx.Node]


def _product(activation: SavedActivation) -> _Product | None:
    saved, matrix = activation.placeholder, _transposed(activation.node) or activation.node
    turned = matrix is not activation.node
    if len(saved.users) == 1 and _transposed(view := next(iter(saved.users))) is saved:
        saved, turned = view, not turned
    match list(saved.users):
        case [fx.Node(target=aten.mm.default, args=(fx.Node() as left, fx.Node() as right)) as product]:
            if left is saved and right is not saved and turned:
                return _Product(product, matrix, right, matrix_first=True)
            gradient = _transposed(left)
            if right is saved and gradient is not None and not turned:
                return _Product(product, matrix, gradient, matrix_first=False)
    return None


def _transposed(node: object) -> fx.Node | None:
    """What a node is the transpose of."""
    match node:
        case fx.Node(target=aten.permute.default, args=(fx.Node() as matrix, [1, 0])):
            return matrix
    return None


class _Names:
    """The same name for all nodes, of both graphs, that have the same value."""

    def __init__(self, split: Split) -> None:
        self.origin = split.origin()
        self.known: dict[fx.Node, str] = {}
        self.short: dict[str, str] = {}

    def of(self, value: object) -> object:
        if not isinstance(value, fx.Node):
            return value
        if value not in self.known:
            self.known[value] = self._find(value)
        return self.known[value]

    def maker(self, value: object) -> object:
        """The forward node that a backward input has the value of; others as they are."""
        return self.origin.get(value, value) if isinstance(value, fx.Node) else value

    def of_rows(self, by: object) -> object:
        """The name of an index, whether it is a column or not; those of other values as they are."""
        maker = self.maker(by)
        match maker:
            case fx.Node(target=aten.view.default | aten.unsqueeze.default, args=(rows, *_)) if _index(rows):
                return self.of(rows)
        return self.of(maker)

    def _find(self, node: fx.Node) -> str:
        if node in self.origin:
            return str(self.of(self.origin[node]))
        target = node.target
        own = f"%{id(node)}"
        if not isinstance(target, torch._ops.OpOverload) or writes(node):
            return own  # an input, say
        if torch.Tag.nondeterministic_seeded in target.tags:
            return own
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _Verbatim(self.of(n)))
        return self.short.setdefault(f"{target} {args} {kwargs}", own)


class _Verbatim(str):
    """A name among arguments: printed without quotes, unlike strings that are arguments themselves."""

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class _RowOp:
    """A node that maps the rows of a matrix.

    kind: "take", for the rows that the index `by` names; "sum", where row k is added to row `by[k]` of zeros; "mul" and
    "div", with one number for each row or one for all. An index may be a column.
    """

    kind: str
    matrix: fx.Node
    by: fx.Node | float


def _row_op(node: fx.Node, names: _Names) -> _RowOp | None:
    found: tuple[str, object, fx.Node | float | None] | None = None
    match node:
        case fx.Node(target=aten.index.Tensor, args=(matrix, [index])):
            found = "take", matrix, _index(index)
        case fx.Node(target=aten.index_select.default, args=(matrix, 0, index)):
            found = "take", matrix, _index(index)
        case fx.Node(target=aten.gather.default, args=(matrix, 0, index)):
            found = "take", matrix, _unexpanded(index)
        case fx.Node(target=aten.index_put.default, args=(zeros, [index], matrix, True)) if _is_zero(zeros, names):
            found = "sum", matrix, _index(index)
        case fx.Node(target=aten.index_add.default, args=(zeros, 0, index, matrix)) if _is_zero(zeros, names):
            found = "sum", matrix, _index(index)
        case fx.Node(target=aten.scatter_add.default, args=(zeros, 0, index, matrix)) if _is_zero(zeros, names):
            found = "sum", matrix, _unexpanded(index) if _same_shape(index, matrix) else None
        case fx.Node(target=aten.mul.Tensor, args=(a, b)):
            matrix, factor = (a, b) if _factor(b) is not None else (b, a)
            found = "mul", matrix, _factor(factor)
        case fx.Node(target=aten.div.Tensor, args=(matrix, factor)):
            found = "div", matrix, _factor(factor)
    if found is None or node.kwargs or not _is_matrix(node):
        return None
    kind, mapped, by = found
    if by is None or not isinstance(mapped, fx.Node) or not _is_matrix(mapped):
        return None
    if not _torch.known_true(node.meta["val"].shape[1] == mapped.meta["val"].shape[1]):
        return None  # a gather of some columns, say
    if kind in ("mul", "div") and not _same_shape(node, mapped):
        return None
    if kind == "sum" and not _torch.known_true(by.meta["val"].shape[0] == mapped.meta["val"].shape[0]):  # type: ignore[union-attr]
        return None  # one row, put at several places
    return _RowOp(kind, mapped, by)


def _same_shape(*values: object) -> bool:
    """Whether tensors have the same shape, at all sizes; makes no guards."""
    shapes = [v.meta["val"].shape for v in values if isinstance(v, fx.Node) and is_tensor(v)]
    if len(shapes) < len(values) or len({len(shape) for shape in shapes}) > 1:
        return False
    return all(_torch.known_true(a == b) for shape in shapes[1:] for a, b in zip(shapes[0], shape, strict=True))


def _is_matrix(value: object) -> bool:
    return isinstance(value, fx.Node) and is_tensor(value) and value.meta["val"].dim() == 2


def _index(value: object) -> fx.Node | None:
    """An index of rows."""
    if not isinstance(value, fx.Node) or not is_tensor(value):
        return None
    index = value.meta["val"]
    return value if index.dim() == 1 and index.dtype in (torch.int64, torch.int32) else None


def _unexpanded(value: object) -> fx.Node | None:
    """The index of rows that was expanded to one of elements, as a column."""
    column = _before_expand(value)
    if not isinstance(column, fx.Node) or not is_tensor(column):
        return None
    shape = column.meta["val"].shape
    return column if len(shape) == 2 and _torch.known_true(shape[1] == 1) else None


def _factor(value: object) -> fx.Node | float | None:
    """One number for each row, or one for all."""
    value = _before_expand(value)
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node) or not is_tensor(value) or not value.meta["val"].is_floating_point():
        return None
    shape = value.meta["val"].shape
    return value if len(shape) <= 2 and (not shape or _torch.known_true(shape[-1] == 1)) else None


def _before_expand(value: object) -> object:
    while isinstance(value, fx.Node) and value.target is aten.expand.default:
        value = value.args[0]
    return value


def _is_zero(value: object, names: _Names) -> bool:
    match names.maker(value):
        case fx.Node(target=aten.full.default, args=(_, 0 | 0.0)):
            return True
    return False


def _terms(node: fx.Node, names: _Names) -> list[tuple[fx.Node, tuple[tuple[str, object], ...]]]:
    """The matrices that a node is the sum of, each with how it maps it; none where it does something else."""
    if node.target in (aten.add.Tensor, aten.expand.default) and not node.kwargs:
        matrices = [a for a in node.args if _is_matrix(a) and _same_shape(a, node)]
        expected = 2 if node.target is aten.add.Tensor else 1
        return [(a, ()) for a in matrices] if len(matrices) == expected else []  # type: ignore[misc]
    op = _row_op(node, names)
    return [] if op is None else [(op.matrix, ((op.kind, names.of_rows(op.by)),))]


def _extend(maps: dict[fx.Node, Map], node: fx.Node, names: _Names) -> None:
    """Adds the map of a node to those of its terms."""
    maps[node] = Map()
    for term, steps in _terms(node, names):
        for product, times in maps[term].items():
            maps[node][product + steps] += times


def _sources(node: fx.Node, names: _Names) -> Iterator[tuple[fx.Node, Map]]:
    """The forward nodes that a node is mapped from, nearest first, with the map."""
    inside: list[fx.Node] = []
    border = {node}
    while len(inside) < LONGEST:
        latest = max(border)  # all that is mapped from it is inside
        terms = _terms(latest, names)
        if not terms:
            return
        inside.append(latest)
        border = (border - {latest}) | {term for term, _ in terms}
        if len(border) == 1:
            (source,) = border
            maps = {source: Map([()])}
            for mapped in reversed(inside):
                _extend(maps, mapped, names)
            yield source, maps[node]


def _find_transpose(product: _Product, mapped: Map, names: _Names) -> _Back | None:
    """Finds the transpose of a map, applied by backward to the product of the same gradient with weights."""
    wanted = Map()
    for steps, times in mapped.items():
        wanted[tuple((TRANSPOSED[kind], by) for kind, by in reversed(steps))] = times
    for start in product.gradient.users:
        if start.target is not aten.mm.default or start.args[0] is not product.gradient or start is product.node:
            continue
        maps, todo = {start: Map([()])}, set(start.users)
        nodes: list[fx.Node] = []
        while todo and len(nodes) < LONGEST:
            node = min(todo)
            todo.remove(node)
            terms = _terms(node, names)
            if not terms or any(term not in maps for term, _ in terms):
                break
            _extend(maps, node, names)
            nodes.append(node)
            if maps[node] == wanted and not todo:
                return _Back(start, nodes)
            todo |= set(node.users)
    return None


def _fits(
    split: Split,
    activation: SavedActivation,
    source: fx.Node,
    product: _Product,
    back: _Back,
    kind: Callable[[fx.Node], object],
) -> bool:
    """Whether moving the map saves memory and costs no time: the gradient is no wider than what was mapped before."""
    narrow, wide = (n.meta["val"].shape[1] for n in (product.gradient, back.start))
    dtypes = {n.meta["val"].dtype for n in (product.matrix, source, product.gradient, back.start)}
    if not _torch.known_true(narrow <= wide) or len(dtypes) > 1:
        return False
    if source.op == "placeholder":
        return not any(writes(user) for user in source.users)  # else backward would not see what forward found there
    if kind(source) != kind(activation.node):
        return False
    value = source.meta["val"]
    new = dense_order(value) is not None and all(split.knows(size) for size in value.shape)
    return _alive(split, source) or (new and computable(split, source))


def _move(split: Split, source: fx.Node, product: _Product, back: _Back, names: _Names) -> None:
    """Maps the gradient instead of the product, and takes both products from the result."""
    graph, last = split.backward.graph, back.nodes[-1]
    saved = next((p for node, p in split.pairs if node is source), None)
    turned = next((p for node, p in split.pairs if _transposed(node) is source), None)
    if saved is None and turned is None:
        saved = split.save(source, f"{source.name}_mapped")
    with graph.inserting_before(last):
        made = {back.start: product.gradient}
        for node in back.nodes:
            made[node] = _copy(split, node, made, names)
        mapped = made[last]
        result = call(graph, aten.mm.default, mapped, back.start.args[1], like=back.start)
        if product.matrix_first:
            factors = turned or call(graph, aten.permute.default, saved, [1, 0]), mapped
        else:
            matrix = saved or call(graph, aten.permute.default, turned, [1, 0])
            factors = call(graph, aten.permute.default, mapped, [1, 0]), matrix
        weights = call(graph, aten.mm.default, *factors, like=product.node)
    last.replace_all_uses_with(result)
    product.node.replace_all_uses_with(weights)
    _move_behind(weights)


def _copy(split: Split, node: fx.Node, made: dict[fx.Node, fx.Node], names: _Names) -> fx.Node:
    """Makes a node of backward's map again, for a gradient that may have another width."""
    graph, value = split.backward.graph, node.meta["val"]
    op = _row_op(node, names)
    if op is None:
        terms = [made[term] for term, _ in _terms(node, names)]
        return terms[0] if len(terms) == 1 else call(graph, aten.add.Tensor, *terms, like=node)
    matrix, by = made[op.matrix], op.by
    if op.kind in ("take", "sum") and by.meta["val"].dim() == 2:  # type: ignore[union-attr]
        by = call(graph, aten.squeeze.dims, by, [1], like=node)
    match op.kind:
        case "take":
            return call(graph, aten.index.Tensor, matrix, [by], like=node)
        case "sum":
            size = [split.size_in_backward(value.shape[0]), matrix.meta["val"].shape[1]]
            zeros = call(graph, aten.full.default, size, 0.0, like=node)
            zeros.kwargs = {"dtype": value.dtype, "device": value.device}
            zeros.meta["val"] = zeros.meta["val"].to(value.dtype)
            return call(graph, aten.index_put.default, zeros, [by], matrix, True, like=node)
    return call(graph, node.target, matrix, by, like=node)


def _move_behind(node: fx.Node) -> None:
    """Moves what is computed from a node to behind it."""
    last, todo = node, {user for user in node.users if user < node}
    while todo:
        user = min(todo)
        todo.remove(user)
        todo |= {n for n in user.users if n < node}
        last.append(user)
        last = user
