"""Every use of a private part of torch, in one place: a new torch breaks this file and no other.

Read and tried with torch 2.13.0.
"""

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import sympy
import torch

# Inductor, its joint passes with whatever partitioner is configured, and the class such a partitioner must have.
import torch._inductor.config as inductor_config

# What `explain` has to read and put back when it traces without running: graph breaks, cache entries, sizes seen.
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame, eval_frame, guards, pgo

# The backend that runs graphs as they are, giving up its arguments as it goes (so that memory is freed).
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.eval_frame import OptimizedModule  # what torch.compile(module) returns
from torch._dynamo.utils import graph_break_reasons

# Descriptor of a forward output that is saved for backward; `output.meta["desc"]` must list one per output (2.11+).
from torch._functorch._aot_autograd.descriptors import SavedForBackwardsAOTOutput

# Marks a function that runs a graph as one that AOTAutograd may hand a list of arguments, to be emptied.
from torch._functorch.aot_autograd import make_boxed_func

# torch's own min-cut; it keeps effects, mutations and collectives right, we rewrite what it returns.
from torch._functorch.partitioners import min_cut_rematerialization_partition

# The fake mode of a graph's values, needed to compute the fake values of inserted nodes.
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import compile_fx, partition_fn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.custom_graph_pass import CustomPartitionerFn

# Nodes inserted after the trace must be decomposed by us as Inductor would have ("both a fallback and a decomp").
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InvalidCxxCompiler

# How Inductor compiles an op: the casts of ours, which are to fuse like any other.
from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.virtualized import V

# What TORCH_TRACE writes and tlparse reads.
from torch._logging import trace_structured

# torch.compile's own kind of tensor without data, and what it raises where Python asks for the data.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.fx.experimental.proxy_tensor import make_fx

# Symbolic sizes: their environment, what is known of them without guarding, and their bounds.
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.utils import _pytree as pytree

# Turns a sympy expression into graph nodes; torch's own runtime-assert pass uses it so.
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import IntInfinity
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._sympy.value_ranges import bound_sympy

__all__ = [
    "CustomPartitionerFn",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "IntInfinity",
    "InvalidCxxCompiler",
    "OptimizedModule",
    "ShapeEnv",
    "UnsupportedFakeTensorException",
    "V",
    "aot_autograd",
    "bound_sympy",
    "boxed_nop",
    "compile_fx",
    "compile_in_place",
    "convert_frame",
    "decompose",
    "detect_fake_mode",
    "dynamo_config",
    "eval_frame",
    "expression",
    "fake_values",
    "get_cpp_compiler",
    "graph_break_reasons",
    "guards",
    "inductor_partition",
    "known_true",
    "lowerings",
    "make_boxed_func",
    "min_cut_rematerialization_partition",
    "pgo",
    "pytree",
    "register_lowering",
    "saved_descriptor",
    "select_decomp_table",
    "size_hint",
    "size_node",
    "sympy",
    "trace_artefact",
]


def inductor_partition(joint: Any, inputs: Any, partitioner: Any, **options: Any) -> Any:
    """Inductor's joint passes, then `partitioner`, as inside `compile_fx`, which sets the fake mode that they need."""
    with inductor_config.patch(custom_partitioner_fn=partitioner), V.set_fake_mode(detect_fake_mode(inputs)):
        return partition_fn(joint, inputs, **options)


def trace_artefact(name: str, encoding: str, payload: Any) -> None:
    """Adds an artefact to torch's structured trace (TORCH_TRACE), where one is being written."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


def compile_in_place(model: torch.nn.Module, **options: Any) -> None:
    """`model.compile`, also for modules of torch itself, such as `nn.Sequential`, whose frames Dynamo skips.

    Those are called from a function of ours. Each gets a code object of its own, since Dynamo counts recompiles, and
    keeps what it compiled, by code object. `_compiled_call_impl` is what `nn.Module.compile` sets (2.0 to 2.13).
    """
    if type(model).forward.__module__.partition(".")[0] != "torch":
        model.compile(**options)
        return
    call = model._call_impl

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    own = types.FunctionType(forward.__code__.replace(), globals(), "forward", None, forward.__closure__)
    model._compiled_call_impl = torch.compile(own, **options)  # type: ignore[assignment]


def saved_descriptor(position: int) -> Any:
    return SavedForBackwardsAOTOutput(position)


def size_hint(size: Any, fallback: int = 4096) -> int:
    """The value that a symbolic size had when it was traced, or a guess; never guards."""
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)  # SymNode.hint: None for unbacked sizes
    return int(hint) if isinstance(hint, int) else fallback


def known_true(condition: Any) -> bool:
    """Whether a symbolic condition is true for all sizes; never guards."""
    return statically_known_true(condition)


def expression(size: Any) -> Any:
    """The sympy expression of a size."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


@contextmanager
def fake_values(graph: torch.fx.Graph) -> Iterator[Any]:
    """Enters the fake mode that the graph's values belong to, for ops whose results have the same form at all sizes.

    No guards are made: asked whether a result is contiguous, fake tensors guard on sizes such as a number of groups.
    """
    values = [v for n in graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)]
    with _mode(values) as mode, mode.shape_env.suppress_guards() if mode.shape_env else nullcontext():
        yield mode


def _mode(values: Any) -> FakeTensorMode:
    mode = detect_fake_mode(values)
    if mode is None:
        raise RuntimeError("the graph's nodes carry no fake tensors in meta['val']; was it traced by AOTAutograd?")
    return mode


def decompose(function: Any, values: list[Any]) -> torch.fx.GraphModule:
    """Traces `function` on fake values (tensors and sizes) into aten ops, with Inductor's decompositions."""
    with _mode(values):
        return make_fx(function, decomposition_table=select_decomp_table())(*values)


def size_node(expr: Any, symbols: Mapping[Any, torch.fx.Node]) -> Any:
    """Builds the nodes that compute a size from its symbols' nodes, at the graph's insertion point.

    Returns:
        an int, or a node whose `meta["val"]` is the SymInt.
    """
    if expr.is_Integer:
        return int(expr)
    if expr in symbols:
        return symbols[expr]
    tracer = torch.fx.proxy.GraphAppendingTracer(next(iter(symbols.values())).graph)
    proxies = {symbol: torch.fx.Proxy(node, tracer) for symbol, node in symbols.items() if symbol in expr.free_symbols}
    node = sympy_interp(PythonReferenceAnalysis, proxies, expr).node
    for made in reversed(list(_without_value(node))):
        arguments = torch.fx.map_arg((made.args, made.kwargs), lambda n: n.meta["val"])
        made.meta["val"] = made.target(*arguments[0], **arguments[1])  # type: ignore[operator]
    return node


def _without_value(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    if "val" not in node.meta:
        yield node
        for argument in node.all_input_nodes:
            yield from _without_value(argument)
