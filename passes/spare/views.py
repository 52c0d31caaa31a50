"""`views`: of several saved views of one tensor, either each is saved alone, or what they are views of, once.

`chunk`, `select`, `unbind` and slices cut the result of one op into pieces, and torch saves the pieces. Each is a view
that keeps the memory of the whole alive. But what is encoded is values, not memory, so at every step of the way from
the tensor to its saved views there is a choice: to encode what is there, and take the views again in backward, or to
encode what comes of it, one by one. The fewest bytes win: the pieces, where only some of the tensor is used; the
tensor, where they overlap. Where both take the same, the pieces win: they are rounded independently of each other, so
that a product of two of them (a query and a key, a value and its gate) is a product of two sources, and each is decoded
where it is needed, not before. Pieces too small to be encoded stay together.

Torch may also save the tensor and leave the cutting to backward. Then the pieces are taken in forward first.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from ..graph.find import SavedActivation, numel_hint, own_nbytes
from ..graph.split import Split, first_use, is_size, is_tensor, is_view, root

Kind = Callable[[fx.Node], object]


@dataclass(frozen=True)
class Viewed:
    """An activation that is not saved itself, since what it is a view of is, or are its pieces: `instead`."""

    activation: SavedActivation
    instead: tuple[fx.Node, ...]

    @property
    def reason(self) -> str:
        names = ", ".join(n.name for n in self.instead)
        if self.activation.value.is_complex():
            return f"pairs of real numbers are saved instead: {names}"
        if self.activation.node in _ancestors(self.instead[0]):
            return f"only pieces of it are used, which are saved: {names}"
        return f"a view of {names}, which is saved once"


def views(split: Split, activations: Iterable[SavedActivation], kind: Kind, min_bytes: int) -> list[Viewed]:
    """Changes which of the tensors that share memory are saved; returns those that are not saved any more.

    Args:
        activations: what `find` returned.
        kind: only nodes of one kind can be saved as one: a rule for one module holds for what it made.
        min_bytes: pieces below this are not encoded.
    """
    found = {a.node: a for a in activations}
    made = []
    for activation in found.values():
        pieces = _pieces(activation.placeholder) if activation.nbytes else []
        sizes = [_nbytes(piece) for piece in pieces]
        fit = pieces and sum(sizes) <= _nbytes(activation.node) and min(sizes) >= min_bytes
        if fit and all(kind(piece) == kind(activation.node) for piece in pieces):
            made.append(Viewed(activation, _take_in_forward(split, activation, pieces)))
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node, _ in split.pairs:
        if is_tensor(node) and not split.is_free(node):
            groups.setdefault(root(node), []).append(node)
    for base, saved in groups.items():
        ways = {node: [*reversed(_ancestors(node)), node] for node in saved}
        for source, of_it in _Choice(split, kind, min_bytes, ways).best(base).saved.items():
            gone = [node for node in of_it if node is not source]
            if gone:
                _take_in_backward(split, source, {node: ways[node] for node in gone})
                made += [Viewed(found[node], (source,)) for node in gone if node in found]
    return made


@dataclass(frozen=True)
class _Saved:
    """What to save, each with the views that come of it, and the bytes of that as it is."""

    nbytes: int = 0
    saved: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)

    def __add__(self, other: "_Saved") -> "_Saved":
        return _Saved(self.nbytes + other.nbytes, self.saved | other.saved)


@dataclass
class _Choice:
    """The choice of what to save of one tensor. `ways`: of every saved view the nodes from the tensor to itself."""

    split: Split
    kind: Kind
    min_bytes: int
    ways: dict[fx.Node, list[fx.Node]]

    def best(self, node: fx.Node) -> _Saved:
        """The fewest bytes for `node`, where it is saved, and all saved views of it."""
        below = [v for v, way in self.ways.items() if node in way]
        steps = dict.fromkeys(way[way.index(node) + 1] for v in below if (way := self.ways[v])[-1] is not node)
        parts = [self.best(step) for step in steps]
        alone = _Saved(_nbytes(node), {node: [node]}) if node in self.ways else _Saved()
        apart = sum(parts, alone)
        if not is_tensor(node) or not steps or not all(self._follows(v, node) for v in below):
            return apart
        together = _Saved(_nbytes(node), {node: below})
        small = len(apart.saved) > 1 and min(map(_nbytes, apart.saved)) < self.min_bytes <= together.nbytes
        joined = any(source not in of_it for source, of_it in apart.saved.items())  # then rather of the tensor itself
        as_good = together.nbytes == apart.nbytes and (small or joined)
        return together if as_good or together.nbytes < apart.nbytes else apart

    def _follows(self, view: fx.Node, node: fx.Node) -> bool:
        """Whether backward could take a view again from what is decoded of `node`."""
        way = self.ways[view]
        value = node.meta["val"]
        return (
            view.meta["val"].dtype == value.dtype
            and self.kind(view) == self.kind(node)
            and all(self.split.knows(size) for size in value.shape)
            and all(self._repeatable(step) for step in way[way.index(node) + 1 :])
        )

    def _repeatable(self, view: fx.Node) -> bool:
        if view.target is torch.ops.aten.as_strided.default:
            return False  # goes by the memory, which is another one
        sizes = view.all_input_nodes[1:]
        return all(is_size(n) and self.split.knows(n.meta["val"]) for n in sizes)


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """What a node is a view of, nearest first."""
    found = []
    while is_view(node):
        node = node.args[0]  # type: ignore[assignment]
        found.append(node)
    return found


def _nbytes(node: fx.Node) -> int:
    return own_nbytes(node.meta["val"])


def _pieces(placeholder: fx.Node) -> list[fx.Node]:
    """The views that backward takes of a saved tensor, if it uses nothing else of it and each is smaller."""
    whole = numel_hint(placeholder.meta["val"])
    found, todo = [], [placeholder]
    while todo:
        for user in todo.pop().users:
            if not is_view(user) or user.target is torch.ops.aten.as_strided.default:
                return []
            if is_tensor(user) and numel_hint(user.meta["val"]) < whole:
                found.append(user)
            else:
                todo.append(user)
    return found


def _take_in_forward(split: Split, activation: SavedActivation, pieces: list[fx.Node]) -> tuple[fx.Node, ...]:
    """Saves pieces instead of a tensor; returns their forward nodes."""
    origin = split.origin()
    taken = []
    for piece in pieces:
        node = split.copy_to_forward(piece, origin)
        saved = next((p for n, p in split.pairs if n is node), None)
        piece.replace_all_uses_with(saved or split.save(node, f"{piece.name}_piece", like=activation.node))
        taken.append(node)
    split.drop_unused()
    return tuple(taken)


def _take_in_backward(split: Split, source: fx.Node, ways: dict[fx.Node, list[fx.Node]]) -> None:
    """Saves `source` instead of views of it, and takes these again in backward, each before its first use."""
    graph, here = split.backward.graph, dict(split.pairs)
    kept = here.get(source) or split.save(source, f"{source.name}_base", like=next(iter(ways)))
    copies = {source: kept}
    for view in sorted(ways, key=lambda v: first_use(here[v])):
        way, old = ways[view], here[view]
        with graph.inserting_before(first_use(old)):
            for step in way[way.index(source) + 1 :]:
                if step not in copies:
                    copies[step] = graph.node_copy(
                        step, lambda n: split.size_in_backward(n.meta["val"]) if is_size(n) else copies[n]
                    )
        old.replace_all_uses_with(copies[view])
        split.drop(old)
