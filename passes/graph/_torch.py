"""Every use of a private part of torch, in one place: a new torch breaks this file and no other.

Read and tried with torch 2.13.0.
"""

import functools
import itertools
import math
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import sympy
import torch
import torch._functorch.config as functorch_config

# Inductor, its joint passes with whatever partitioner is configured, and the class such a partitioner must have.
import torch._inductor.config as inductor_config

# How a recurrence is traced: step by step, by ops that autograd knows.
from torch._decomp import decompositions

# What `explain` has to read and put back when it traces without running: graph breaks, cache entries, sizes seen.
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame, eval_frame, guards, pgo

# The backend that runs graphs as they are, giving up its arguments as it goes (so that memory is freed).
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop

# A condition of our own under which Dynamo may take a compiled graph; and what traces a frame for a backend, and the
# backend inside of torch's wrappers: a setting of Dynamo's for ours alone.
from torch._dynamo.convert_frame import ConvertFrameAssert
from torch._dynamo.eval_frame import (
    OptimizedModule,  # what torch.compile(module) returns
    innermost_backend,
)
from torch._dynamo.exc import (
    RestartAnalysis,  # not an error: has Dynamo trace a frame once more
    Unsupported,  # Dynamo can't make graphs of a function, and leaves it to Python
)
from torch._dynamo.guards import install_guard
from torch._dynamo.source import GlobalStateSource, is_from_global_source, is_from_unspecialized_nn_module_source
from torch._dynamo.utils import graph_break_reasons

# Raised by Dynamo where it needs a value to be a constant, such as a size that depends on data.
from torch._dynamo.variables.base import AsPythonConstantNotImplementedError

# Dynamo's list of functions that it asks `__torch_function__` about; it leaves out those of torch.sparse.
from torch._dynamo.variables.torch import get_overridable_functions

# How AOTAutograd marks sizes of tensors that one graph hands to the next: with a name of its own from 2.13 on.
from torch._functorch._aot_autograd import runtime_wrappers

# Descriptors of the inputs and outputs of AOTAutograd's graphs: which of Dynamo's they are, and which output is saved
# for backward; `output.meta["desc"]` must list one per output (2.11+).
from torch._functorch._aot_autograd.descriptors import (
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    SavedForBackwardsAOTOutput,
)

# Marks a function that runs a graph as one that AOTAutograd may hand a list of arguments, to be emptied.
from torch._functorch.aot_autograd import make_boxed_func

# torch's own min-cut; it keeps effects, mutations and collectives right, we rewrite what it returns.
from torch._functorch.partitioners import min_cut_rematerialization_partition

# The fake mode of a graph's values, needed to compute the fake values of inserted nodes.
# Beside it, what tells that Dynamo is at work on this thread, and a condition on a compiled graph.
from torch._guards import CompileContext, Guard, detect_fake_mode

# An op that writes into an argument as a function: Inductor writes in place where that is safe, and copies elsewhere.
from torch._higher_order_ops.auto_functionalize import auto_functionalized

# What Inductor's module of a graph hands its C++ kernels to, and what compiles and loads one: `together` puts kernels
# in one source. `cpp_pybinding(argtypes, source)`, `wait(names)` and `load_async(source)` are the same in 2.11 to 2.14.
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner, partition_fn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.custom_graph_pass import CustomPartitionerFn

# Nodes inserted after the trace must be decomposed by us as Inductor would have ("both a fallback and a decomp").
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InvalidCxxCompiler

# How Inductor compiles an op: the casts and the random masks of ours, which are to fuse like any other.
from torch._inductor.ir import Pointwise
from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.virtualized import V
from torch._inductor.virtualized import ops as loop_ops

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
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    ShapeEnv,
    free_unbacked_symbols,
    statically_known_true,
)

# The identity of a tensor's memory, also of a fake one's, that does not keep it alive.
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

# Turns a sympy expression into graph nodes; torch's own runtime-assert pass uses it so.
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import IntInfinity
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._sympy.value_ranges import bound_sympy

# What min-cut is told about a node: to compute it again in backward rather than save it.
from torch.utils.checkpoint import CheckpointPolicy

# Tensor subclasses: made without a copy, used without asking their `__torch_function__`, and those without one.
DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass
disabled_torch_function = torch._C._disabled_torch_function_impl
make_subclass = torch.Tensor._make_subclass

__all__ = [
    "AsPythonConstantNotImplementedError",
    "AsyncCompile",
    "ConvertFrameAssert",
    "CppPythonBindingsCodeCache",
    "CustomPartitionerFn",
    "DataDependentOutputException",
    "DisableTorchFunctionSubclass",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "GlobalStateSource",
    "Guard",
    "GuardOnDataDependentSymNode",
    "IntInfinity",
    "InvalidCxxCompiler",
    "OptimizedModule",
    "Pointwise",
    "RestartAnalysis",
    "ShapeEnv",
    "StorageWeakRef",
    "Unsupported",
    "UnsupportedFakeTensorException",
    "V",
    "aot_autograd",
    "ask_before_unrolling",
    "at_most",
    "bound_sympy",
    "bound",
    "boxed_nop",
    "call_functional",
    "compile_fx",
    "compile_fx_inner",
    "compile_in_place",
    "compiling",
    "convert_frame",
    "decompose",
    "dispatch_in_traces",
    "detect_fake_mode",
    "disabled_torch_function",
    "dynamo_config",
    "eval_frame",
    "evaluate",
    "expression",
    "fake_values",
    "formula",
    "free_unbacked_symbols",
    "functorch_config",
    "get_compile_threads",
    "get_cpp_compiler",
    "gradient_of",
    "graph_break_reasons",
    "graph_break_of",
    "guards",
    "inductor_partition",
    "input_position",
    "install_guard",
    "is_input_mutation",
    "known_before_the_call",
    "known_true",
    "innermost_backend",
    "is_unbacked",
    "largest",
    "least_product",
    "loop_ops",
    "lowerings",
    "make_boxed_func",
    "makes_sizes",
    "make_sizes_constant",
    "make_subclass",
    "min_cut_rematerialization_partition",
    "most_ratio",
    "must_recompute",
    "number",
    "output_position",
    "pgo",
    "pytree",
    "register_lowering",
    "same_sizes",
    "saved_descriptor",
    "select_decomp_table",
    "size_hint",
    "sizes_for_backward",
    "size_node",
    "symbols",
    "sympy",
    "trace_artefact",
    "unify",
    "wants_eager_randomness",
]


def inductor_partition(joint: Any, inputs: Any, partitioner: Any, **options: Any) -> Any:
    """Inductor's joint passes, then `partitioner`, as inside `compile_fx`, which sets the fake mode that they need."""
    with inductor_config.patch(custom_partitioner_fn=partitioner), V.set_fake_mode(detect_fake_mode(inputs)):
        return partition_fn(joint, inputs, **options)


def at_most(size: Any, limit: int) -> bool:
    """Whether a size in an Inductor lowering, a sympy expression, is known to be no larger for all sizes."""
    return bool(V.graph.sizevars.statically_known_leq(size, limit))


def wants_eager_randomness() -> bool:
    """Whether Inductor is set to draw the random numbers that eager mode draws."""
    return bool(inductor_config.fallback_random)


def trace_artefact(name: str, encoding: str, payload: Any) -> None:
    """Adds an artefact to torch's structured trace (TORCH_TRACE), where one is being written."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


def compile_in_place(model: torch.nn.Module, **options: Any) -> Any:
    """`model.compile`, also for modules of torch itself, such as `nn.Sequential`, whose frames Dynamo skips.

    Returns the compiled function.

    Those are called from a function of ours. Each gets a code object of its own, since Dynamo counts recompiles, and
    keeps what it compiled, by code object. So does every model where torch cannot tell the models of a class apart
    (before 2.13). `_compiled_call_impl` is what `nn.Module.compile` sets (2.0 to 2.14).
    """
    # A graph module's forward, such as that of to_hetero, is generated and belongs to no module.
    of_torch = (type(model).forward.__module__ or "").partition(".")[0] == "torch"
    if not of_torch and "isolate_recompiles" in options:
        model.compile(**options)
        return model._compiled_call_impl
    call = model._call_impl

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    own = types.FunctionType(forward.__code__.replace(), globals(), "forward", None, forward.__closure__)
    model._compiled_call_impl = torch.compile(own, **options)  # type: ignore[assignment]
    return model._compiled_call_impl


def compiling() -> bool:
    """Whether torch.compile itself, not a model, is what calls: it looks at a tensor to trace with it."""
    return CompileContext.try_get() is not None


def make_sizes_constant(values: Any) -> None:
    """Has Dynamo take the sizes of tensors as constants that were symbols in the graph that returned them.

    AOTAutograd marks these tensors for the graphs that follow (`_dynamo_propagated_dynamic_indices`, 2.13 and 2.14;
    2.11 does so as users do, `_dynamo_weak_dynamic_indices`).
    """
    of_their_own = hasattr(runtime_wrappers, "mark_dynamo_propagated_dynamic_indices")
    mark = "_dynamo_propagated_dynamic_indices" if of_their_own else "_dynamo_weak_dynamic_indices"
    for value in pytree.tree_leaves(values):
        if isinstance(value, torch.Tensor) and hasattr(value, mark):
            delattr(value, mark)


def ask_before_unrolling(ask: Callable[[torch.Tensor | None], None]) -> None:
    """Calls `ask` with a sequence, [steps, batch, features], or None for a packed one, before a trace goes through it.

    LSTM, GRU and RNN are traced step by step, by these functions for each layer and direction (2.11 to 2.14).
    """

    def asking(unroll: Callable[..., Any], packed: bool) -> Callable[..., Any]:
        @functools.wraps(unroll)
        def layer(inp: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            ask(None if packed else inp)
            return unroll(inp, *args, **kwargs)

        return layer

    for name in ("one_layer_lstm", "one_layer_rnn", "one_layer_lstm_data", "one_layer_rnn_data"):
        setattr(decompositions, name, asking(getattr(decompositions, name), name.endswith("_data")))


def _trainable(select: Callable[..., Any]) -> Callable[..., Any]:
    """torch's choice of how a layer of an LSTM is traced on the CPU, but never of a kernel that has no backward.

    It takes oneDNN's kernel for inference where the input requires no gradient, whatever the weights do (2.11 to 2.14).
    """

    @functools.wraps(select)
    def choose(input: Any, hx: Any, params: Any) -> Any:
        trained = any(t.requires_grad for t in (*hx, *itertools.chain.from_iterable(params)))
        return decompositions.one_layer_lstm if torch.is_grad_enabled() and trained else select(input, hx, params)

    return choose


decompositions.select_one_layer_lstm_function = _trainable(decompositions.select_one_layer_lstm_function)


def dispatch_in_traces(*functions: Any) -> None:
    """Has Dynamo ask `__torch_function__` about these functions, as Python does."""
    get_overridable_functions().update(functions)


def must_recompute(node: torch.fx.Node) -> None:
    """Has min-cut compute a node again in backward."""
    node.meta["recompute"], node.meta["ac_graph_id"] = CheckpointPolicy.MUST_RECOMPUTE, 0


def call_functional(graph: torch.fx.Graph, op: Any, **arguments: Any) -> torch.fx.Node:
    """Inserts a call of an op that writes into its first argument; returns None and the new value of that argument."""
    node = graph.call_function(auto_functionalized, (op,), arguments)
    node.meta["val"] = (None, next(iter(arguments.values())).meta["val"])
    return node


def saved_descriptor(position: int) -> Any:
    return SavedForBackwardsAOTOutput(position)


def gradient_of(descriptor: Any) -> int | None:
    """The position of the graph's input whose gradient a backward output is, by its descriptor; None for others.

    `GradAOTOutput(grad_of=PlainAOTInput(idx=3))` in `output.meta["desc"]` of the backward graph (2.11 to 2.14).
    """
    return getattr(getattr(descriptor, "grad_of", None), "idx", None)


def input_position(node: torch.fx.Node) -> int | None:
    """Which input of Dynamo's graph a placeholder of AOTAutograd's is; None for a part of one, or a state."""
    descriptor = node.meta.get("desc")
    return descriptor.idx if isinstance(descriptor, PlainAOTInput) else None


def output_position(descriptor: Any) -> int | None:
    """Which output of Dynamo's graph an output of AOTAutograd's is."""
    return descriptor.idx if isinstance(descriptor, PlainAOTOutput) else None


def is_input_mutation(descriptor: Any) -> bool:
    """Whether an output of AOTAutograd's graph is the new value of an input."""
    return isinstance(descriptor, InputMutationAOTOutput)


def known_before_the_call(placeholder: torch.fx.Node) -> bool:
    """Whether an input of Dynamo's graph is a global, or belongs to a module."""
    source = getattr(placeholder, "_dynamo_source", None)
    return source is None or is_from_global_source(source) or is_from_unspecialized_nn_module_source(source)


def graph_break_of(gm: torch.fx.GraphModule) -> Any:
    """Dynamo's record of the break that ended a graph, with `reason` and `user_stack`; None for one that returns."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason if reason is not None and reason.graph_break else None


_bounds: "weakref.WeakKeyDictionary[ShapeEnv, dict[Any, int]]" = weakref.WeakKeyDictionary()
_guesses: "weakref.WeakKeyDictionary[ShapeEnv, dict[Any, int]]" = weakref.WeakKeyDictionary()


def size_hint(size: Any, fallback: int = 4096) -> int:
    """The value that a size had when it was traced; never guards.

    What depends on data counts with the largest value that it can have, or, where there is no such, with a guess.
    """
    if isinstance(size, int):
        return size
    expr, env = size.node.expr, size.node.shape_env
    return int(expr.xreplace({symbol: _value(symbol, env, fallback) for symbol in expr.free_symbols}))


def _value(symbol: Any, env: ShapeEnv, fallback: int) -> int:
    traced = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # of older versions
    if symbol in traced:
        return traced[symbol]
    if symbol in (known := _bounds.get(env, {})):
        return known[symbol]
    largest = _largest(symbol, env)
    return _guesses.get(env, {}).get(symbol, fallback) if largest is None else largest


def _largest(symbol: Any, env: ShapeEnv) -> int | None:
    """The upper end of a symbol's range, if it has one."""
    largest = env.var_to_range[symbol].upper if symbol in env.var_to_range else None
    return int(largest) if largest is not None and largest < sys.maxsize - 1 else None


def bound(size: Any, largest: int) -> None:
    """Takes down how large a size is at most, at the sizes of the trace, if its value depends on data."""
    if is_unbacked(size):
        known = _bounds.setdefault(size.node.shape_env, {})
        known[size.node.expr] = min(largest, size_hint(size, largest))


def guess(size: Any, value: int) -> None:
    """Takes down what a size may be whose value depends on data and has no bound."""
    if is_unbacked(size):
        _guesses.setdefault(size.node.shape_env, {})[size.node.expr] = value


def is_guess(size: Any) -> bool:
    """Whether `size_hint` has neither a value nor a bound for a symbol."""
    env, symbol = size.node.shape_env, size.node.expr
    return is_unbacked(size) and symbol not in _bounds.get(env, {}) and _largest(symbol, env) is None


def unify(known: Any, size: Any) -> None:
    """Gives a size that depends on data the symbol of one that is the same."""
    if is_unbacked(known) and is_unbacked(size) and known.node.expr != size.node.expr:
        size.node.shape_env._rename_unbacked_to(size.node.expr, known.node.expr)


def makes_sizes(node: torch.fx.Node) -> bool:
    """Whether a node's value has sizes that depend on data and that none of its arguments has, as `nonzero` makes."""
    sizes = free_unbacked_symbols(node.meta["val"])
    return bool(sizes) and bool(sizes - free_unbacked_symbols([n.meta["val"] for n in node.all_input_nodes]))


def is_unbacked(size: Any) -> bool:
    """Whether a size is a symbol whose value depends on data."""
    if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol:
        return False
    return bool(free_unbacked_symbols(size))


def number(value: Any) -> float | None:
    """A number of a call, or of the sizes at the trace, if it is known without a guess; never guards."""
    if isinstance(value, torch.fx.Node):
        value = value.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        value = getattr(value.node, "hint", None)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def least_product(sizes: Any) -> float:
    """A lower bound of a product of sizes: that of the trace, or 1 where a size depends on data."""
    return math.prod(number(size) or 1.0 for size in sizes)


def most_ratio(sizes: Any, others: Any) -> float:
    """An upper bound of the ratio of two products of sizes: that of the trace, infinite where one depends on data."""
    if all(isinstance(size, int) for size in (*sizes, *others)):
        return math.prod(sizes) / max(math.prod(others), 1)
    remaining = list(others)
    apart = []
    for size in sizes:  # equal sizes cancel, whatever they are
        same = next((i for i, other in enumerate(remaining) if expression(size) == expression(other)), None)
        if same is None:
            apart.append(size)
        else:
            remaining.pop(same)
    top, bottom = [number(s) for s in apart], [number(s) for s in remaining]
    if None in top or None in bottom:
        return math.inf
    return math.prod(top) / max(math.prod(bottom), 1.0)  # type: ignore[arg-type]


def known_true(condition: Any) -> bool:
    """Whether a symbolic condition is true for all sizes; never guards."""
    return statically_known_true(condition)


def same_sizes(shape: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are equal for all sizes; never guards."""
    return len(shape) == len(other) and all(known_true(a == b) for a, b in zip(shape, other, strict=True))


def largest(sizes: Sequence[Any]) -> Any:
    """The largest of several sizes, symbolic where only a run can tell; never guards."""
    found = sizes[0]
    for size in sizes[1:]:
        if not known_true(size <= found):
            found = size if known_true(found <= size) else torch.sym_max(found, size)
    return found


def formula(size: Any) -> str:
    """A size that a run decides as text, such as `4*u0 + 8000`; empty for a number."""
    return "" if isinstance(size, int) or size.node.expr.is_Integer else str(size.node.expr)


def evaluate(text: str, values: Mapping[str, int]) -> int | None:
    """The value of a `formula` with these values of its symbols; None where one is missing."""
    value = sympy.sympify(text).subs(dict(values))
    return int(value) if value.is_Integer else None


def symbols(sizes: Iterable[Any]) -> dict[str, Any]:
    """The symbols in sizes, by name in the order of names, each as a size."""
    found = {
        str(symbol): size.node.shape_env.create_symintnode(symbol, hint=None)
        for size in sizes
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }
    return dict(sorted(found.items()))


def sizes_for_backward(outputs: Sequence[Any]) -> tuple[int, ...]:
    """The sizes that a compiled forward handed to its backward, in order; none where it saved nothing.

    `symints` of the context of AOTAutograd's `CompiledFunction`, which is the `grad_fn` of what it returns, or of what
    that is a view of (2.11 to 2.14).
    """
    nodes = [t.grad_fn for t in outputs if isinstance(t, torch.Tensor) and t.grad_fn is not None]
    for node in [*nodes, *(n.next_functions[0][0] for n in nodes if n.next_functions)]:
        if (sizes := getattr(node, "symints", None)) is not None:
            return tuple(sizes)
    return ()


def expression(size: Any) -> Any:
    """The sympy expression of a size."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


@contextmanager
def fake_values(graph: torch.fx.Graph) -> Iterator[Any]:
    """Enters the fake mode that the graph's values belong to, for ops whose results have the same form at all sizes.

    No guards are made: asked whether a result is contiguous, fake tensors guard on sizes such as a number of groups.
    """
    value = next((v for n in graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)), None)
    with _mode([value]) as mode, mode.shape_env.suppress_guards() if mode.shape_env else nullcontext():
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
