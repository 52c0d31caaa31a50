"""`least_first`: the order in which a compiler that schedules for memory runs a graph's ops.

Inductor tries several orders before it fuses, and takes the one with the lowest peak; mostly that is of "least peak
memory first" (its `topological_sort_lpmf`, after Murthy and Bhattacharyya's buffer optimisation): of all ops that can
run, the one after which least is alive, among those that stay under the peak so far; if there are none, the smallest.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import fx

from ..graph.split import is_size, is_view, root, writes


def least_first(
    graph: fx.Graph,
    nbytes: Mapping[fx.Node, int],
    kept: Collection[fx.Node],
    readers_of: Callable[[fx.Node], Iterable[fx.Node]],
    inlined: Callable[[fx.Node], bool],
) -> list[fx.Node]:
    """The nodes of a graph in that order, which is one of their topological orders.

    Args:
        nbytes: of the memory that the graph makes, or is given to let go: by the node that it is of.
        kept: memory that outlives the graph.
        readers_of: the ops that read a node's memory, themselves or through loops.
        inlined: whether an op is computed where loops read it.
    """
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    steps = [n for n in nodes if n.op == "call_function" and not _goes_along(n) and not inlined(n)]
    needs = _dependencies(nodes, set(steps))
    reads: dict[fx.Node, set[fx.Node]] = defaultdict(set)  # by step, the memory that it reads
    makes: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for memory in nbytes:
        makes[memory.args[0] if memory.target is operator.getitem else memory].append(memory)  # type: ignore[index]
    readers = {m: set(readers_of(m)).intersection(steps) for m in nbytes if m not in kept}
    for memory, found in readers.items():
        for step in found:
            reads[step].add(memory)

    waiting = {step: len(needs[step]) for step in steps}
    after: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for step in steps:
        for needed in needs[step]:
            after[needed].append(step)
    size = {step: sum(nbytes[m] for m in makes[step]) for step in steps}
    frees = {s: sum(nbytes[m] for m in makes[s] if m not in kept and not readers[m]) for s in steps}
    for step in steps:
        frees[step] += sum(nbytes[m] for m in reads[step] if len(readers[m]) == 1)
    live = sum(n for m, n in nbytes.items() if m.op == "placeholder")
    most = max(live, sum(nbytes[m] for m in kept if m in nbytes))
    ready, ordered = [s for s in steps if not waiting[s]], list[fx.Node]()
    while ready:
        room = most - live
        step = min(ready, key=lambda s: (size[s] if size[s] > room else 0, size[s] - frees[s], place[s]))
        ready.remove(step)
        ordered.append(step)
        most = max(most, live + size[step])
        live += size[step] - frees[step]
        for memory in reads[step]:
            readers[memory].discard(step)
            if len(readers[memory]) == 1:
                frees[next(iter(readers[memory]))] += nbytes[memory]
        for following in after[step]:
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)
    return _with_others(nodes, ordered, set(steps))


def _goes_along(node: fx.Node) -> bool:
    """Whether a node costs nothing where it stands: views, parts of a tuple, sizes."""
    return is_view(node) or node.target is operator.getitem or is_size(node)


def _dependencies(nodes: list[fx.Node], steps: Collection[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """The steps that each step has to come after: those that it reads, and what reads or writes the same memory."""
    made_by: dict[fx.Node, set[fx.Node]] = {}
    touched: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    wrote: dict[fx.Node, fx.Node] = {}
    needs: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        above = set[fx.Node]().union(*(made_by[n] for n in node.all_input_nodes))
        if node in steps:
            for memory in map(_written_memory, node.all_input_nodes):
                if writes(node):
                    above |= touched[memory]
                    wrote[memory] = node
                elif memory in wrote:
                    above.add(wrote[memory])
                touched[memory].add(node)
            needs[node] = above - {node}
            above = {node}
        made_by[node] = above
    return needs


def _written_memory(node: fx.Node) -> fx.Node:
    """The node whose memory a node is, also where it is the result of a write."""
    while writes(node := root(node)) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _with_others(nodes: list[fx.Node], ordered: list[fx.Node], steps: Collection[fx.Node]) -> list[fx.Node]:
    """The order with what is no step put before the first step that needs it."""
    made, result = set[fx.Node](), list[fx.Node]()

    def put(node: fx.Node) -> None:
        todo = [node]
        while todo:
            last = todo[-1]
            missing = [n for n in last.all_input_nodes if n not in made and n not in steps]
            todo += missing
            if not missing:
                todo.pop()
                if last not in made:
                    made.add(last)
                    result.append(last)

    for node in [*(n for n in nodes if n.op != "call_function" and n.op != "output"), *ordered, *nodes]:
        put(node)
    return result
