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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ..graph import _torch
from ..graph.find import SavedActivation
from ..graph.origin import module_path
from ..graph.rows import TRANSPOSED, Map, Names, extend, row_op, terms
from ..graph.split import Split, call, is_input, writes
from .rebuild import computable

aten = torch.ops.aten

LONGEST = 16  # ops of a map of rows


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
    names = Names(split)
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
    return is_input(node) or any(node in (saved, _transposed(saved)) for saved, _ in split.pairs)


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


def _sources(node: fx.Node, names: Names) -> Iterator[tuple[fx.Node, Map]]:
    """The forward nodes that a node is mapped from, nearest first, with the map."""
    inside: list[fx.Node] = []
    border = {node}
    while len(inside) < LONGEST:
        latest = max(border)  # all that is mapped from it is inside
        summands = terms(latest, names)
        if not summands:
            return
        inside.append(latest)
        border = (border - {latest}) | {term for term, _ in summands}
        if len(border) == 1:
            (source,) = border
            maps = {source: Map([()])}
            for mapped in reversed(inside):
                extend(maps, mapped, names)
            yield source, maps[node]


def _find_transpose(product: _Product, mapped: Map, names: Names) -> _Back | None:
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
            summands = terms(node, names)
            if not summands or any(term not in maps for term, _ in summands):
                break
            extend(maps, node, names)
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
    if is_input(source):
        return not any(writes(user) for user in source.users)  # else backward would not see what forward found there
    if kind(source) != kind(activation.node):
        return False
    value = source.meta["val"]
    new = all(split.knows(size) for size in value.shape)
    return _alive(split, source) or (new and computable(split, source))


def _move(split: Split, source: fx.Node, product: _Product, back: _Back, names: Names) -> None:
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


def _copy(split: Split, node: fx.Node, made: dict[fx.Node, fx.Node], names: Names) -> fx.Node:
    """Makes a node of backward's map again, for a gradient that may have another width."""
    graph, value = split.backward.graph, node.meta["val"]
    op = row_op(node, names)
    if op is None:
        summands = [made[term] for term, _ in terms(node, names)]
        return summands[0] if len(summands) == 1 else call(graph, aten.add.Tensor, *summands, like=node)
    if op.kind not in ("take", "sum"):
        return copy_row_op(graph, node, made, names)
    matrix, by = made[op.matrix], op.by
    if by.meta["val"].dim() == 2:  # type: ignore[union-attr]
        by = call(graph, aten.squeeze.dims, by, [1], like=node)
    if op.kind == "take":
        return call(graph, aten.index.Tensor, matrix, [by], like=node)
    size = [split.size_in_backward(value.shape[0]), matrix.meta["val"].shape[1]]
    zeros = call(graph, aten.full.default, size, 0.0, like=node)
    zeros.kwargs = {"dtype": value.dtype, "device": value.device}
    zeros.meta["val"] = zeros.meta["val"].to(value.dtype)
    return call(graph, aten.index_put.default, zeros, [by], matrix, True, like=node)


def copy_row_op(graph: fx.Graph, node: fx.Node, made: dict[fx.Node, fx.Node], names: Names) -> fx.Node:
    """Makes a map of rows, other than a take or a sum alone, again for what `made` has in its matrix's place."""
    op = row_op(node, names)
    assert op is not None
    matrix = made[op.matrix]
    if op.kind.startswith("spmm"):
        return call(graph, node.target, *node.args[:3], matrix, *node.args[4:], like=node)
    if op.kind == "aggregate":
        return call(graph, node.target, matrix, *node.args[1:], like=node)
    return call(graph, node.target, matrix, op.by, like=node)


def _move_behind(node: fx.Node) -> None:
    """Moves what is computed from a node to behind it."""
    last, todo = node, {user for user in node.users if user < node}
    while todo:
        user = min(todo)
        todo.remove(user)
        todo |= {n for n in user.users if n < node}
        last.append(user)
        last = user
