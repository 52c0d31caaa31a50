"""Where a node comes from: its module and its source line, and a key that names it in every process."""

import operator
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx


def op_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_function" else node.op


def module_path(node: fx.Node) -> str:
    """The path of the module that a node was traced in, as `named_modules` spells it; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"^(L\['[^']*'\]|L__self__|self)(\.__self__)?", "", path)  # __self__: of a bound method
    path = re.sub(r"_(modules|parameters|buffers)\['([^']*)'\]", r"\2", path)
    path = re.sub(r"\['([^']*)'\]|\[(\d+)\]", r".\1\2", path)
    return path.replace("..", ".").strip(".")


def source_line(node: fx.Node) -> str:
    """The innermost line of user code that a node was traced from, as `file:line code`."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', trace)
    for file, line, code in reversed(frames):
        if not _is_library(file):
            return f"{file.rsplit('/', 1)[-1]}:{line} {code.strip()}"
    return ""


def _is_library(file: str) -> bool:
    parts: Sequence[str] = file.replace("\\", "/").split("/")
    return "site-packages" in parts or "torch" in parts or any(p.startswith("torch_geometric.") for p in parts)


class Keys:
    """Names the tensors of a forward graph alike in every process, at all sizes, and whether these are symbols or not.

    Names of nodes are numbered across the whole graph, and sizes that are symbols have nodes of their own, so that
    `add_6` is `add_11` in another graph of the same model. A key numbers what one op makes in one module:
    `convs.1/add`, `convs.1/add:1`, `convs.0/edges[2]`. A clone has the key of what it is a clone of: which of the two
    is saved is chance.

    Args:
        graph: as it was cut. What passes add later is named after what it is made of.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.known: dict[fx.Node, str] = {}
        self.counts: Counter[str] = Counter()
        for node in filter(_is_tensor, graph.nodes):
            self._name(node, _label(node))

    def of(self, node: fx.Node) -> str:
        if node not in self.known:
            maker = node.all_input_nodes[0] if node.target is operator.getitem else node
            made_of = ", ".join(self.of(n) for n in maker.all_input_nodes if _is_tensor(n))
            self._name(node, f"{_label(node)}({made_of})")
        return self.known[node]

    def _name(self, node: fx.Node, label: str) -> None:
        if node.target is torch.ops.aten.clone.default:
            self.known[node] = self.of(node.all_input_nodes[0])
            return
        path = f"{module_path(node)}/{label}"
        number = self.counts[path]
        self.counts[path] += 1
        self.known[node] = f"{path}:{number}" if number else path


def _label(node: fx.Node) -> str:
    """What makes a node, in a word: an op's name, with the position of one of its several results."""
    if node.op != "call_function":
        return "input" if node.op == "placeholder" else node.op
    if node.target is operator.getitem:
        return f"{_label(node.all_input_nodes[0])}[{node.args[1]}]"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).split(".")[1]
    return getattr(node.target, "__name__", "call")  # no address, which is another in each process


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
