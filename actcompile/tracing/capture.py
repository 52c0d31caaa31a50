"""Sizes that depend on data stay in one graph, for our backends alone.

`x[mask]` and `nonzero`, as in the self-loops of GCNConv and GATConv, make tensors whose size only a run knows. Dynamo
ends a graph there, unless `torch._dynamo.config.capture_dynamic_output_shape_ops` is set, for the whole process. Here
it is set while a frame is traced for a backend of ours, and for nothing else: not for other models, whenever and in
whatever thread they are compiled, nor for the Python between graphs. Nothing guards on it, so nothing is compiled
again for its sake.

A frame that cannot be compiled so, because Python, Dynamo or a compiler needs to know such a size, is traced again
without, as if the setting had never been.
"""

import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import fx

from actcompile.passes.graph._torch import (
    AsPythonConstantNotImplementedError,
    ConvertFrameAssert,
    GuardOnDataDependentSymNode,
    RestartAnalysis,
    dynamo_config,
    free_unbacked_symbols,
    functorch_config,
    innermost_backend,
    make_sizes_constant,
)
from actcompile.passes.plan.fit import Impossible

Backend = TypeVar("Backend", bound=Callable[..., Any])

SETTING = "capture_dynamic_output_shape_ops"
_capturing: ContextVar[bool] = ContextVar(
    "actcompile_capturing", default=False
)  # not set where it is the user's setting


class _NeedsSizes(RuntimeError):
    """A graph with sizes that depend on data could not be compiled."""


NEED_SIZES = _NeedsSizes, GuardOnDataDependentSymNode, AsPythonConstantNotImplementedError


def capture_sizes(backend: Backend) -> Backend:
    """Marks a `torch.compile` backend: Dynamo gives it sizes that depend on data inside its graphs."""

    @functools.wraps(backend)
    def compile_graph(gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        if not (_capturing.get() and _depends_on_data(gm)):
            return backend(gm, inputs, **options)
        try:
            # Backward now, not at its first call, so that what its compiler cannot do is known here.
            with functorch_config.patch(force_non_lazy_backward_lowering=True):
                return backend(gm, inputs, **options)
        except (RestartAnalysis, Impossible):  # Dynamo traces the frame once more; the user's bounds, not the sizes
            raise
        except Exception as error:
            raise _NeedsSizes("sizes that depend on data could not be compiled") from error

    compile_graph._captures_sizes = True  # type: ignore[attr-defined]
    return compile_graph  # type: ignore[return-value]


def _with_sizes(convert: Callable[..., Any]) -> Callable[..., Any]:
    """`ConvertFrameAssert.__call__`, which traces a frame and compiles its graphs, or raises."""

    @functools.wraps(convert)
    def call(self: ConvertFrameAssert, *args: Any, **options: Any) -> Any:
        backend = innermost_backend(self)
        backend = getattr(backend, "compiler_fn", backend)  # torch.compile keeps it in an object of its own
        if getattr(dynamo_config, SETTING) or not getattr(backend, "_captures_sizes", False):
            return convert(self, *args, **options)
        token = _capturing.set(True)
        try:
            # Called under Dynamo's compile lock, so no other trace sees this, also where the setting is not per thread.
            with dynamo_config.patch({SETTING: True}):
                return convert(self, *args, **options)
        except Exception as error:
            found = [e for e in _causes(error) if isinstance(e, NEED_SIZES)]
            if not found:
                raise
            if any(isinstance(e, AsPythonConstantNotImplementedError) for e in found):
                make_sizes_constant(args[0].f_locals)  # also those that an earlier graph of ours has captured
        finally:
            _capturing.reset(token)
        return convert(self, *args, **options)

    return call


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came of; Dynamo hides some as the context, or as an attribute, of others."""
    seen: set[int] = set()
    todo = [error]
    while todo:
        error = todo.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            yield error
            todo += [error.__cause__, error.__context__, getattr(error, "inner_exception", None)]


def _depends_on_data(gm: fx.GraphModule) -> bool:
    """Whether a graph of Dynamo's has sizes that depend on data."""
    return any(
        isinstance(value := node.meta.get("example_value"), torch.Tensor | torch.SymInt | torch.SymFloat)
        and free_unbacked_symbols(value)
        for node in gm.graph.nodes
    )


ConvertFrameAssert.__call__ = _with_sizes(ConvertFrameAssert.__call__)  # type: ignore[method-assign]
