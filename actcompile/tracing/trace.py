"""Trace a model as ``torch.compile`` would, graph break by graph break, without running it or allocating its tensors.

The model and its inputs are copied with every tensor replaced by a fake one (shape, stride, dtype, device, autograd
state, no data), and the copy is compiled and called under that fake mode. Dynamo and AOTAutograd do what they always
do; where the compiled graph would run, the traced graph is called on fake tensors instead, so that Python goes on past
graph breaks with tensors that have the right shapes and a ``grad_fn``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import random
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from actcompile.passes.graph._torch import (
    ConvertFrameAssert,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    IntInfinity,
    OptimizedModule,
    ShapeEnv,
    Unsupported,
    UnsupportedFakeTensorException,
    bound_sympy,
    convert_frame,
    dynamo_config,
    eval_frame,
    graph_break_reasons,
    guards,
    pgo,
    pytree,
)

from .capture import whole_graphs

Backend = Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]

_NO_VALUE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
# What torch says, as a plain RuntimeError or the like, when Python reaches for the data of a tensor that has none.
_NO_VALUE_TEXTS = ("data pointer", "not supported for tensor subclasses")

# The functions that a trace could not make graphs of; None while nothing is traced.
_left_to_python: ContextVar[list[CodeType] | None] = ContextVar("actcompile_left_to_python", default=None)


@dataclass(frozen=True)
class TraceResult:
    """What a trace went through.

    Attributes:
        graphs: how many graphs the backend was given.
        breaks: why each graph ended early, with the line of the model at fault; empty for a model in one graph.
        stopped: why the trace ended before the model did (Python needed a value that only a real run has), or None.
        estimated: operators whose result's size depends on data and was taken at its upper bound after a break.
    """

    graphs: int
    breaks: tuple[str, ...]
    stopped: str | None
    estimated: tuple[str, ...]


def trace(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    backend: Backend,
    *,
    dynamic: bool | None = None,
) -> TraceResult:
    """Calls ``backend(gm, example_inputs)`` for every graph, as ``torch.compile`` would, and runs nothing.

    Gradients are on, whatever the caller's grad mode; ``model.training`` is as it is. The model, its buffers, its
    compile caches and the random states stay as they are. Python code between graphs does run (a ``print`` prints).
    A function is not copied as a module is: tensors that it closes over are used as they are.

    Args:
        model: a module, compiled or not, or a function.
        args: its positional inputs: real, fake or meta tensors of any size, in any nesting that can be deep-copied.
            A meta tensor stands for one on the device of the model's parameters.
        kwargs: its keyword inputs.
        backend: a ``torch.compile`` backend. What it returns is called with fake tensors.
        dynamic: as in ``torch.compile``.

    Raises:
        TypeError: the model or its inputs cannot be deep-copied.
        ValueError: a fake input has a size that depends on data, or is on a device that this machine does not have.
        torch._dynamo.exc.BackendCompilerFailed: the backend raised.
    """
    if isinstance(model, OptimizedModule):
        model = model._orig_mod
    mode = _Mode()
    copied, args, kwargs = _without_data((model, tuple(args), dict(kwargs or {})), mode)
    graphs = 0

    @whole_graphs
    def traced(gm: torch.fx.GraphModule, example_inputs: list[Any], **options: Any) -> Callable[..., Any]:
        nonlocal graphs
        compiled = backend(gm, example_inputs, **options)
        graphs += 1

        changing = _changing_dims(gm)

        def run(*inputs: Any) -> Any:
            with mode:
                outputs = compiled(*inputs)
            for tensor, dims in zip(outputs, changing, strict=True):
                if dims:  # as AOTAutograd's runtime does, so that the next graph has dynamic sizes too
                    tensor._dynamo_propagated_dynamic_indices = dims.copy()
            return outputs

        return run

    stopped = None
    compiled = torch.compile(copied, backend=traced, dynamic=dynamic, **isolated())
    with _undisturbed(traced, _region(compiled)) as breaks:
        try:
            with torch.inference_mode(False), torch.enable_grad(), mode:
                compiled(*args, **kwargs)
        except Exception as error:
            if not _needs_value(error):
                raise
            stopped = _describe_stop(error)
        reasons = breaks()
    return TraceResult(graphs, reasons, stopped, tuple(dict.fromkeys(mode.estimated)))


class _Mode(FakeTensorMode):
    """Fake tensors with plain sizes: a size that depends on data becomes the largest that it can be."""

    def __init__(self) -> None:
        # Constants that Dynamo keeps beside a graph, and what a function closes over, are real.
        super().__init__(allow_non_fake_inputs=True, shape_env=None)
        self.estimated: list[str] = []

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return super().dispatch(func, types, args, kwargs)
        except DynamicOutputShapeException:
            if self.shape_env is not None:
                raise
            self.shape_env = ShapeEnv(allow_dynamic_output_shape_ops=True)
            try:
                out = super().dispatch(func, types, args, kwargs)
            finally:
                self.shape_env = None
            out = pytree.tree_map_only(torch.Tensor, lambda t: self._largest(t, func), out)
            self.estimated.append(str(func))
            return out

    def _largest(self, tensor: torch.Tensor, func: Any) -> torch.Tensor:
        sizes = []
        for size in tensor.shape:
            if isinstance(size, torch.SymInt):
                bound = bound_sympy(size.node.expr, size.node.shape_env.var_to_range).upper
                if isinstance(bound, IntInfinity) or int(bound) >= sys.maxsize - 1:
                    raise DynamicOutputShapeException(func)
                size = int(bound)
            sizes.append(size)
        with self:
            return torch.empty(sizes, dtype=tensor.dtype, device=tensor.device)


class _Fakeify(TorchFunctionMode):
    """While active, ``copy.deepcopy`` gives fake tensors for tensors of any kind."""

    def __init__(self, mode: FakeTensorMode, device: torch.device) -> None:
        super().__init__()
        self.mode, self.device = mode, device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self.fake(tensor)
            return memo[id(tensor)]
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch._C.TensorBase.clone:  # how a Parameter copies itself
                return self.fake(args[0])
            return func(*args, **(kwargs or {}))

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        _check_device(self.device if tensor.is_meta else tensor.device)
        if tensor.layout is torch.strided and (isinstance(tensor, FakeTensor) or tensor.is_meta):
            with self.mode:
                fake = torch.empty_strided(
                    [_hint(s) for s in tensor.shape],
                    [_hint(s) for s in tensor.stride()],
                    dtype=tensor.dtype,
                    device=self.device if tensor.is_meta else tensor.device,
                    requires_grad=tensor.requires_grad,
                )
        else:
            fake = self.mode.from_tensor(tensor, static_shapes=True)
        for name, value in vars(tensor).items():
            if name.startswith("_dynamo_"):  # mark_dynamic, mark_static, mark_unbacked
                setattr(fake, name, copy.copy(value))
        return fake


def _changing_dims(gm: torch.fx.GraphModule) -> list[set[int]]:
    outputs = [node.meta.get("example_value") for node in gm.graph.output_node().args[0]]  # type: ignore[union-attr]
    return [
        {i for i, s in enumerate(o.shape) if isinstance(s, torch.SymInt)} if isinstance(o, torch.Tensor) else set()
        for o in outputs
    ]


def _without_data(objects: Any, mode: FakeTensorMode) -> Any:
    model = objects[0]
    tensors = [t for t in pytree.tree_leaves(objects) if isinstance(t, torch.Tensor)]
    if isinstance(model, torch.nn.Module):
        tensors = [*model.parameters(), *model.buffers(), *tensors]
    devices = [t.device for t in tensors if not t.is_meta]
    default = torch.get_default_device()
    device = devices[0] if devices else torch.device("cpu") if default.type == "meta" else default
    try:
        with _Fakeify(mode, device):
            return copy.deepcopy(objects)
    except TypeError as error:
        raise TypeError(f"the model is traced on a copy without data, but cannot be copied: {error}") from error


def _check_device(device: torch.device) -> None:
    # Without this, autograd's device guard ends the process: "PyTorch is not linked with support for cuda devices".
    if device.type not in ("cpu", "meta") and not torch.get_device_module(device).is_available():
        raise ValueError(f"a tensor is on {device}, a device that is not here; trace with meta tensors or on the CPU")


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    if (hint := size.node.hint) is None:
        raise ValueError(f"an input has the size {size}, which depends on data; give it a number")
    return int(hint)


def isolated() -> dict[str, Any]:
    """Own cache entries, recompile limits and skip marks on code that the user's compiled models share (2.13)."""
    return {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


def _region(compiled: Any) -> int:
    return getattr(getattr(compiled, "dynamo_ctx", compiled), "_isolate_recompiles_id", -1)


@contextmanager
def _undisturbed(backend: Backend, region: int) -> Iterator[Callable[[], tuple[str, ...]]]:
    """Puts back what a compilation leaves behind in this process; yields a function that gives its graph breaks."""
    first_break = len(graph_break_reasons)
    left_to_python: list[CodeType] = []
    token = _left_to_python.set(left_to_python)
    pgo.get_code_state()
    # Sizes seen before decide what is dynamic: start from them, but do not add to them.
    sizes_seen, sizes_loaded = pgo._CODE_STATE, pgo._INIT_CODE_STATE
    pgo._CODE_STATE = copy.deepcopy(sizes_seen)
    rng, python_rng = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_rng = numpy.random.get_state() if numpy else None
    own: dict[str, Any] = {
        "suppress_errors": False,
        "automatic_dynamic_local_pgo": False,
        "automatic_dynamic_remote_pgo": False,
    }
    try:
        with dynamo_config.patch(**own):
            yield lambda: describe_breaks(graph_break_reasons[first_break:], left_to_python)
    finally:
        torch.set_rng_state(rng)
        random.setstate(python_rng)
        if numpy:
            numpy.random.set_state(numpy_rng)
        pgo._CODE_STATE, pgo._INIT_CODE_STATE = sizes_seen, sizes_loaded
        _left_to_python.reset(token)
        del graph_break_reasons[first_break:]
        _drop_cache_entries(backend, region)


def _drop_cache_entries(backend: Backend, region: int) -> None:
    """Frees what Dynamo keeps on code objects (the model's ``forward`` and others') for this backend."""
    wrappers = [w for w in eval_frame.cached_backends.values() if getattr(w, "compiler_fn", w) is backend]
    for wrapper in wrappers:
        del eval_frame.cached_backends[id(wrapper)]
    gone = guards.DeletedGuardManagerWrapper("the trace that made it is over")
    # An entry stays in the list, and counts as a recompile unless it is of another object than those that are called:
    # `_has_same_id_matched_objs` in `torch._dynamo.cache_size` (2.11 and 2.12; later ones count by region).
    gone.id_matched_objs = {"": weakref.ref(gone)}
    for reference in convert_frame.input_codes.seen:
        if (code := reference()) is not None:
            for entry in _cache_entries(code, region):
                if any(entry.backend is w for w in wrappers):
                    entry.guard_manager.extra_state.invalidate(entry, gone)


def _cache_entries(code: Any, region: int) -> list[Any]:
    if region < 0:
        return eval_frame._debug_get_cache_entry_list(code)
    return eval_frame._get_cache_entries_for_region(code, region)


def _needs_value(error: BaseException | None) -> bool:
    return isinstance(error, _NO_VALUE) or (
        isinstance(error, RuntimeError | TypeError | ValueError) and any(t in str(error) for t in _NO_VALUE_TEXTS)
    )


def _describe_stop(error: Exception) -> str:
    torch_root = str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((torch_root, __file__))]
    where = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}: " if frames else ""
    return f"{where}Python needs a value that only a real run has ({type(error).__name__}: {error})"


def describe_breaks(reasons: list[Any], whole: Sequence[CodeType] = ()) -> tuple[str, ...]:
    breaks = []
    for reason in reasons:
        where = f"{reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno}: " if reason.user_stack else ""
        breaks.append(where + reason.reason.strip().splitlines()[0])
    # A break inside a loop has no reason object: Dynamo leaves the whole function to Python.
    breaks += map(describe_whole, whole)
    return tuple(dict.fromkeys(breaks))


def describe_whole(code: CodeType) -> str:
    function = f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"
    return f"{function}: not traced as a whole (a graph break in a loop, for one); what it calls is"


def _noting(convert: Callable[..., Any]) -> Callable[..., Any]:
    """`ConvertFrameAssert.__call__`, which raises `Unsupported` where Dynamo leaves a whole function to Python.

    Dynamo itself notes these only from 2.13 on. What was compiled too often has a strategy, and keeps its graphs.
    """

    @functools.wraps(convert)
    def call(self: ConvertFrameAssert, frame: Any, *args: Any, **options: Any) -> Any:
        try:
            return convert(self, frame, *args, **options)
        except Unsupported as error:
            noted = _left_to_python.get()
            if noted is not None and error.frame_exec_strategy is None:
                noted.append(frame.f_code)
            raise

    return call


ConvertFrameAssert.__call__ = _noting(ConvertFrameAssert.__call__)  # type: ignore[method-assign]
