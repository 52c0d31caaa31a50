"""What rows of edges are made of, as far as programs compute it: rows that are taken of nodes, or other rows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from ..graph import _torch
from ..graph.split import is_tensor
from .computable import is_computable, product_of
from .takes import Take, reduction_of, take_of

DEEPEST = 2  # products one after another in a region; what comes after them begins at rows of edges in memory
MOST_LEAVES = 8  # tensors that a value of rows of edges alone is made of


class Rows:
    """The values of a graph that programs can compute, row by row.

    Attributes:
        taken_of: those that are made of taken rows, and through how many products.
        leaves: of others through how many products they are made, and of which values.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.taken_of: dict[fx.Node, int] = {}
        self.leaves: dict[fx.Node, tuple[int, frozenset[fx.Node]]] = {}
        self.of_nodes = rows_of_nodes(graph)
        for node in graph.nodes:
            if is_tensor(node) and (_takes_floats(node) or is_computable(node) or product_of(node) is not None):
                self._follow(node)

    def _follow(self, node: fx.Node) -> None:
        """Notes what is made of taken rows by what a program can do, or of which other rows, through `DEEPEST` products
        at most."""
        rows = product_of(node)
        if rows is not None and self.has_nodes(node):
            return  # one product for all is faster, and what it makes is no larger than what nodes have anyway
        sources = [rows] if rows is not None else [] if _takes_floats(node) else node.all_input_nodes
        products = [self.taken_of[n] for n in sources if n in self.taken_of]
        depth = max(products, default=0) + (rows is not None)
        if products or _takes_floats(node):
            if depth <= DEEPEST:
                self.taken_of[node] = depth
            return
        sources = [n for n in sources if is_tensor(n) and n.meta["val"].dim() > 1 and _same_rows(n, node)]
        found = [self.leaves.get(n, (0, frozenset((n,)))) for n in sources]
        depth = max((products for products, _ in found), default=0) + (rows is not None)
        leaves = frozenset().union(*(leaves for _, leaves in found))
        if 0 < len(leaves) <= MOST_LEAVES and depth <= DEEPEST:
            self.leaves[node] = depth, leaves

    def has_nodes(self, node: fx.Node) -> bool:
        """Whether the rows of a node are those of nodes, although others are taken or added up for them, too: of the
        atoms of a batch of molecules, say, each of which belongs to one."""
        return any(_torch.known_true(node.meta["val"].shape[0] == size) for size in self.of_nodes)

    def taken(self, node: fx.Node) -> bool:
        """Whether a node is made of taken rows by what a program can do."""
        return node in self.taken_of

    def computed(self, node: fx.Node) -> bool:
        """Whether programs compute a node of rows of edges, rather than read it: it is made of taken rows, or of rows
        of edges that are half as wide at most."""
        if node in self.taken_of:
            return True
        _, leaves = self.leaves.get(node, (0, (node,)))
        return 2 * sum(map(width, leaves)) <= width(node)

    def of_edges(self, value: fx.Node) -> bool:
        """Whether a value has rows of edges, and programs compute it."""
        return self.taken(value) or (self.computed(value) and self.take_beside(value) is not None)

    def take_beside(self, node: fx.Node) -> Take | None:
        """What others take for the edges that a value has rows for, which is made of rows of edges alone."""
        edges = node.meta["val"].shape[0]
        for rows in self.taken_of:
            take = take_of(rows)
            if take is None or not _torch.known_true(take.index.edges == edges):
                continue
            known = isinstance(take.matrix.meta["val"].shape[0], int) or take.matrix < node
            if known and take.index.tensor < node:
                return take
        return None

    def takes(self, node: fx.Node, seen: set[fx.Node]) -> Iterator[Take]:
        """The takes that a node is made of, but for those of nodes that were seen."""
        if node in seen:
            return
        seen.add(node)
        take = take_of(node)
        if take is not None:
            yield take
        elif self.taken(node):
            for operand in node.all_input_nodes:
                if self.taken(operand):
                    yield from self.takes(operand, seen)


def rows_of_nodes(graph: fx.Graph) -> list[object]:
    """The numbers of rows of matrices of which rows are taken, or to which they are added up, for edges of another
    number."""
    found: list[object] = []
    for node in graph.nodes:
        if not is_tensor(node):
            continue
        take, reduction = take_of(node), reduction_of(node)
        of = take or reduction
        if of is None:
            continue
        size = (take.matrix if take is not None else node).meta["val"].shape[0]
        if not any(_torch.known_true(size == known) for known in (*found, of.index.edges)):
            found.append(size)
    return found


def width(node: fx.Node) -> int:
    """The number of elements in a row, as traced."""
    sizes = node.meta["val"].shape[1:]
    product = 1
    for size in sizes:
        product *= _torch.size_hint(size)
    return product


def _same_rows(node: fx.Node, other: fx.Node) -> bool:
    sizes = other.meta["val"].shape
    return len(sizes) > 0 and _torch.known_true(node.meta["val"].shape[0] == sizes[0])


def _takes_floats(node: fx.Node) -> bool:
    return node.meta["val"].is_floating_point() and take_of(node) is not None
