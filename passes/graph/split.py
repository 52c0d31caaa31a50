"""`Split`: the forward and the backward graph, and which output of the one is which input of the other."""

import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import fx

from . import _torch
from .origin import Keys

CROSSING = "actcompile_crossing"  # marks an input that was handed on across a graph break


class Split:
    """A partitioned joint graph, as AOTAutograd's contract has it.

    The forward graph returns the user's outputs, then what is saved: tensors with version check, tensors without,
    opaque values, symbolic sizes. The backward graph takes the symbolic sizes first, then the others in the same
    order, then tangents. `pairs` lists, in the forward's order, every saved node with its backward
    placeholder; passes change it through the methods below, and `finish` writes it back.
    `keys` names the forward's nodes.

    Args:
        forward, backward: what torch's partitioner returned; both are changed in place.
        outputs: number of the forward's outputs that are not saved activations.
        parameters: names of the forward's inputs that live from step to step, parameters and buffers.
        crossing: positions of Dynamo's inputs that come from before a graph break: only what saves them holds them.
        handed_on: whether the user's outputs go on to what follows a graph break, and are not held by the user.
    """

    def __init__(
        self,
        forward: fx.GraphModule,
        backward: fx.GraphModule,
        outputs: int,
        parameters: Collection[str] = (),
        crossing: Collection[int] = (),
        handed_on: bool = False,
    ) -> None:
        self.forward, self.backward = forward, backward
        self.keys = Keys(forward.graph)
        self.parameters = {n for n in forward.graph.find_nodes(op="placeholder") if n.name in parameters}
        self.output = forward.graph.output_node()
        returned = list(self.output.args[0])  # type: ignore[arg-type]
        self.user_outputs: list[Any] = returned[:outputs]
        described = self.output.meta.get("desc") or [None] * outputs
        self.returned = {  # what the user holds
            root(n)
            for n, descriptor in zip(self.user_outputs, described, strict=False)
            if isinstance(n, fx.Node) and (not handed_on or _torch.is_input_mutation(descriptor))
        }
        self.crossing = {  # by Dynamo's position
            position: node
            for node in forward.graph.find_nodes(op="placeholder")
            if (position := _torch.input_position(node)) is not None
            and position in crossing
            and is_tensor(node)
            and not any(map(writes, node.users))
        }
        for node in self.crossing.values():
            node.meta[CROSSING] = True
        self.given = {  # outputs that go on, by Dynamo's position
            position: root(n)
            for n, descriptor in zip(self.user_outputs, described, strict=False)
            if handed_on
            and (position := _torch.output_position(descriptor)) is not None
            and isinstance(n, fx.Node)
            and not is_input(root(n))
        }
        saved, inputs = returned[outputs:], backward.graph.find_nodes(op="placeholder")
        sizes = sum(is_size(n) for n in saved)
        # By position: states of random generators (of checkpointed regions) have another name in either graph.
        self.pairs = list(zip(saved, [*inputs[sizes : len(saved)], *inputs[:sizes]], strict=True))
        names = {placeholder.name for placeholder in inputs}
        for node, placeholder in self.pairs:
            if node.name in names and node.name != placeholder.name:
                raise ValueError(f"the saved value {node} of the forward graph is input {placeholder} of backward")
        self.runtime_inputs = inputs[len(saved) :]  # tangents, states of random generators

    def origin(self) -> dict[fx.Node, fx.Node]:
        """From backward placeholder to the forward node whose value it has."""
        return {placeholder: node for node, placeholder in self.pairs}

    def save(self, node: fx.Node, name: str, like: fx.Node | None = None) -> fx.Node:
        """Saves one more forward node; returns its backward placeholder.

        `like` is a saved node in whose place, before which, it goes; without it, it goes before all saved tensors.
        """
        position = next(
            (i for i, (n, _) in enumerate(self.pairs) if n is like or (like is None and is_tensor(n))), len(self.pairs)
        )
        graph = self.backward.graph
        first = self.pairs[position][1] if position < len(self.pairs) else self._first_runtime_input()
        with graph.inserting_before(first):
            placeholder = graph.placeholder(name)
        placeholder.meta["val"] = node.meta["val"]
        if like is not None and like.meta.get("saved_tensor_with_no_vc_check"):
            node.meta["saved_tensor_with_no_vc_check"] = True
        self.pairs.insert(position, (node, placeholder))
        return placeholder

    def save_symbol(self, symbol: Any) -> fx.Node:
        """Saves the value of a size's symbol, which torch leaves out where only sums with it are needed."""
        node, dim = self._dimension(symbol)  # type: ignore[misc]
        graph, size = self.forward.graph, node
        if dim is not None:
            with graph.inserting_after(max(node, *graph.find_nodes(op="placeholder"))):
                size = call(graph, torch.ops.aten.sym_size.int, node, dim, like=node)
        first = next((p for _, p in self.pairs if is_tensor(p)), None) or self._first_runtime_input()
        with self.backward.graph.inserting_before(first):
            placeholder = self.backward.graph.placeholder(f"size_{symbol}")
        placeholder.meta["val"] = size.meta["val"]
        self.pairs.append((size, placeholder))
        return placeholder

    def symbols(self, activations: Iterable[Any]) -> dict[str, Any]:
        """The symbols, by name, in the sizes of saved tensors and of the memory that they are views of."""
        values = [n.meta["val"] for a in activations for n in (a.node, root(a.node)) if is_tensor(n)]
        return _torch.symbols(size for value in values for size in value.shape)

    def hand_on(self, sizes: Iterable[Any]) -> None:
        """Saves the values of symbols, each as such, so that a run tells them."""
        saved = {_torch.expression(n.meta["val"]) for n, _ in self.pairs if is_size(n)}
        for symbol in map(_torch.expression, sizes):
            if symbol not in saved and self._dimension(symbol):
                self.save_symbol(symbol)

    def size_in_backward(self, size: Any) -> Any:
        """An int, or a node of the backward graph that has this symbolic size, made at its insertion point."""
        if isinstance(size, int):
            return size
        symbols = {}
        for node in self.backward.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                symbols[_torch.expression(value)] = node
        expression = _torch.expression(size)
        if expression not in symbols:
            for symbol in sorted(expression.free_symbols - symbols.keys(), key=str):
                symbols[symbol] = self.save_symbol(symbol)
        return _torch.size_node(expression, symbols)

    def knows(self, size: Any) -> bool:
        """Whether backward has, or forward can save, every symbol of a size."""
        if isinstance(size, int):
            return True
        expression = _torch.expression(size)
        saved = {_torch.expression(v) for _, p in self.pairs if isinstance(v := p.meta.get("val"), torch.SymInt)}
        return expression in saved or all(s in saved or self._dimension(s) for s in expression.free_symbols)

    def is_free(self, node: fx.Node) -> bool:
        """Whether saving a forward node costs no memory, since it is alive anyway: nothing of ours changes it."""
        base = root(node)
        return is_input(base) or base.op == "get_attr" or base in self.returned

    def copy_to_forward(self, node: fx.Node, origin: dict[fx.Node, fx.Node]) -> fx.Node:
        """The forward node that computes what backward's `node` computes: one that is there already, or a copy.

        Args:
            origin: as the method of this name returns it; what is found is added.
        """
        if node in origin:
            return origin[node]
        args = fx.map_arg(node.args, lambda n: self.copy_to_forward(n, origin))
        kwargs = fx.map_arg(node.kwargs, lambda n: self.copy_to_forward(n, origin))
        inputs: list[fx.Node] = []
        fx.map_arg((args, kwargs), inputs.append)
        for user in inputs[0].users if inputs else ():
            if user.op == node.op and user.target == node.target and (user.args, user.kwargs) == (args, kwargs):
                origin[node] = user
                return user
        graph = self.forward.graph
        with graph.inserting_after(max([*inputs, *graph.find_nodes(op="placeholder")])):
            copy = graph.node_copy(node, lambda n: origin[n])
        origin[node] = copy
        return copy

    def _dimension(self, symbol: Any) -> tuple[fx.Node, int | None] | None:
        """A forward node that is a size of this symbol (with None), or a tensor and its dimension that has it."""
        for node in self.forward.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and _torch.expression(value) == symbol:
                return node, None
            for dim, size in enumerate(value.shape if is_tensor(node) else ()):
                if not isinstance(size, int) and _torch.expression(size) == symbol:
                    return node, dim
        return None

    def _first_runtime_input(self) -> fx.Node:
        return self.runtime_inputs[0] if self.runtime_inputs else next(iter(self.backward.graph.nodes))

    def drop(self, placeholder: fx.Node) -> None:
        """Saves a node no longer; its placeholder must have no users."""
        self.pairs = [(n, p) for n, p in self.pairs if p is not placeholder]
        self.backward.graph.erase_node(placeholder)

    def drop_unused(self) -> list[fx.Node]:
        """Drops saved tensors that backward does not use any more; returns their forward nodes."""
        self.backward.graph.eliminate_dead_code()
        unused = [(n, p) for n, p in self.pairs if is_tensor(n) and not p.users]
        for _, placeholder in unused:
            self.drop(placeholder)
        return [n for n, _ in unused]

    def finish(self) -> None:
        """Writes the saved values back to the forward's output and recompiles both graphs."""
        saved = [n for n, _ in self.pairs]
        self.output.args = ((*self.user_outputs, *saved),)
        if "desc" in self.output.meta:
            described = list(self.output.meta["desc"][: len(self.user_outputs)])
            self.output.meta["desc"] = described + [_torch.saved_descriptor(i) for i in range(len(saved))]
        for module in (self.forward, self.backward):
            module.graph.eliminate_dead_code()
            module.graph.lint()
            module.recompile()


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_input(node: fx.Node) -> bool:
    """Whether a node is an input of the model, a parameter or a buffer: alive anyway, whoever saves it."""
    return node.op == "placeholder" and CROSSING not in node.meta


def is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


def call(graph: fx.Graph, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
    """Inserts a call at the graph's insertion point, with its fake value, and with the origin of `like`."""
    node = graph.call_function(target, args, kwargs)
    with _torch.fake_values(graph):
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)
    if like is not None:
        inherit_origin(node, like)
    return node


def inherit_origin(node: fx.Node, like: fx.Node) -> None:
    """Gives a node the module and the source line of another one."""
    for key in ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "seq_nr", "original_aten"):
        if key in like.meta:
            node.meta[key] = like.meta[key]


def is_view(node: fx.Node) -> bool:
    """Whether a node's value, or each of a list of values, shares memory with its first argument."""
    target = node.target
    if target is operator.getitem:
        return is_view(node.args[0])  # type: ignore[arg-type]  # one of the views that `split` or `unbind` returns
    if not isinstance(target, torch._ops.OpOverload):
        return False
    returns = target._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def writes(node: fx.Node) -> bool:
    """Whether a node may write into one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def root(node: fx.Node) -> fx.Node:
    """The node whose memory `node` is a view of: itself, unless it is a view."""
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def readers_of(node: fx.Node) -> list[fx.Node]:
    """What reads a node's memory, also through views."""
    views, readers = [node], []
    for view in views:
        found = [user for user in view.users if is_view(user) and user.args[0] is view]
        views += found
        readers += [user for user in view.users if user not in found]
    return readers


def reached_from(node: fx.Node) -> set[fx.Node]:
    """All that depends on a node."""
    return descendants(node.users)


def descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that depends on them."""
    return _closed(nodes, lambda node: node.users)


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that they are made of."""
    return _closed(nodes, lambda node: node.all_input_nodes)


def _closed(nodes: Iterable[fx.Node], beside: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found, todo = set(), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += beside(node)
    return found


def first_use(placeholder: fx.Node, users: Iterable[fx.Node] | None = None) -> fx.Node:
    """Moves views of a saved value down to the first op that reads it, and returns the first of these nodes.

    `users`: those of the value's users that count, all by default.
    """
    views: list[fx.Node] = []
    todo, reads = [list(placeholder.users if users is None else users)], []
    while todo:
        for user in todo.pop():
            if is_view(user) and user.args[0] in (placeholder, *views):
                views.append(user)
                todo.append(list(user.users))
            else:
                reads.append(user)
    first = min(reads) if reads else max(views)
    moved = sorted({v for v in views if v < first})
    for view in moved:
        first.prepend(view)
    return moved[0] if moved else first


def renew_views(node: fx.Node) -> None:
    """Gives all views of a node the fake values that follow from its own."""
    for user in node.users:
        if is_view(user):
            with _torch.fake_values(node.graph):
                args, kwargs = fx.map_arg((user.args, user.kwargs), lambda n: n.meta["val"])
                user.meta["val"] = user.target(*args, **kwargs)  # type: ignore[operator]
            renew_views(user)
