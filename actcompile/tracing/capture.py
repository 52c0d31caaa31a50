"""What Dynamo leaves out of graphs stays in those of our backends: sizes and numbers that depend on data, recurrences.

`x[mask]` and `nonzero`, as in the self-loops of GCNConv and GATConv, make tensors whose size only a run knows. Dynamo
ends a graph there, unless `torch._dynamo.config.capture_dynamic_output_shape_ops` is set, at numbers that Python takes
from tensors (`int(batch.max()) + 1`, as PyG's pooling counts graphs), unless `capture_scalar_outputs` is, and at LSTM,
GRU and RNN modules, unless `allow_rnn` is: for the whole process. Here all are set while a frame is traced for a
backend of ours, and for nothing else: not for other models, whenever and in whatever thread they are compiled, nor for
the Python between graphs. Nothing guards on them, so nothing is compiled again for their sake.

A frame that cannot be compiled so, because Python, Dynamo or a compiler needs to know such a number, or because a
recurrence has many steps, is traced again without the settings that may be why, one after the other, as if they had
never been.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import fx

from actcompile.passes.graph._torch import (
    AsPythonConstantNotImplementedError,
    ConvertFrameAssert,
    GuardOnDataDependentSymNode,
    RestartAnalysis,
    ask_before_unrolling,
    dynamo_config,
    free_unbacked_symbols,
    functorch_config,
    innermost_backend,
    make_sizes_constant,
)
from actcompile.passes.plan.fit import Impossible

Backend = TypeVar("Backend", bound=Callable[..., Any])

SIZES, NUMBERS, RECURRENCES = "capture_dynamic_output_shape_ops", "capture_scalar_outputs", "allow_rnn"
SETTINGS = RECURRENCES, NUMBERS, SIZES  # in the order in which they are given up
MOST_STEPS = 16  # of a recurrence, some ten ops each: more are slow to compile
_capturing: ContextVar[frozenset[str]] = ContextVar(  # without what the user has set
    "actcompile_capturing", default=frozenset()
)


class _Refused(RuntimeError):
    """A graph is not compiled with what these settings let into it."""

    def __init__(self, message: str, settings: frozenset[str]) -> None:
        super().__init__(message)
        self.settings = settings


NEED_SIZES = GuardOnDataDependentSymNode, AsPythonConstantNotImplementedError


def whole_graphs(backend: Backend) -> Backend:
    """Marks a `torch.compile` backend: sizes and numbers that depend on data, short recurrences, are in its graphs."""

    @functools.wraps(backend)
    def compile_graph(gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        holds = {SIZES: _depends_on_data(gm), NUMBERS: _takes_numbers(gm), RECURRENCES: _recurs(gm)}
        captured = frozenset(setting for setting in _capturing.get() if holds[setting])
        if not captured:
            return backend(gm, inputs, **options)
        try:
            # Backward now, not at its first call, so that what its compiler cannot do is known here.
            with functorch_config.patch(force_non_lazy_backward_lowering=True):
                return backend(gm, inputs, **options)
        except (RestartAnalysis, Impossible):  # Dynamo traces the frame once more; the user's bounds, not the sizes
            raise
        except Exception as error:
            raise _Refused(f"could not be compiled with {', '.join(sorted(captured))}", captured) from error

    compile_graph._takes_whole_graphs = True  # type: ignore[attr-defined]
    return compile_graph  # type: ignore[return-value]


def _with_settings(convert: Callable[..., Any]) -> Callable[..., Any]:
    """`ConvertFrameAssert.__call__`, which traces a frame and compiles its graphs, or raises."""

    @functools.wraps(convert)
    def call(self: ConvertFrameAssert, *args: Any, **options: Any) -> Any:
        backend = innermost_backend(self)
        backend = getattr(backend, "compiler_fn", backend)  # torch.compile keeps it in an object of its own
        ours = getattr(backend, "_takes_whole_graphs", False)
        settings = frozenset(s for s in SETTINGS if ours and not getattr(dynamo_config, s))
        while settings:
            token = _capturing.set(settings)
            try:
                # Called under Dynamo's compile lock: no other trace sees this, also where settings are not per thread.
                with dynamo_config.patch(dict.fromkeys(settings, True)):
                    return convert(self, *args, **options)
            except Exception as error:
                causes = list(_causes(error))
                refused = next((s for s in SETTINGS if s in settings & _refused_by(causes)), None)
                if refused is None:
                    raise
                if refused == SIZES and any(isinstance(e, AsPythonConstantNotImplementedError) for e in causes):
                    make_sizes_constant(args[0].f_locals)  # also those that an earlier graph of ours has captured
                settings -= {refused}
            finally:
                _capturing.reset(token)
        return convert(self, *args, **options)

    return call


def _refused_by(causes: Iterable[BaseException]) -> set[str]:
    """The settings that may be why a frame cannot be traced or compiled."""
    refused: set[str] = set()
    for error in causes:
        if isinstance(error, _Refused):
            refused |= error.settings
        elif isinstance(error, NEED_SIZES):
            refused |= {SIZES, NUMBERS}
    return refused


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


def _takes_numbers(gm: fx.GraphModule) -> bool:
    """Whether Python has numbers of tensors in a graph of Dynamo's."""
    return any(node.op == "call_method" and node.target == "item" for node in gm.graph.nodes)


def _recurs(gm: fx.GraphModule) -> bool:
    """Whether a graph of Dynamo's has recurrences."""
    return any(node.target in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu) for node in gm.graph.nodes)


def _refuse_many_steps(sequence: torch.Tensor | None) -> None:
    """Stops the trace of a recurrence of ours with more steps than are quickly compiled, or a number that changes."""
    steps = None if sequence is None else sequence.shape[0]
    if RECURRENCES in _capturing.get() and not (isinstance(steps, int) and steps <= MOST_STEPS):
        raise _Refused("a recurrence has many steps", frozenset((RECURRENCES,)))


ask_before_unrolling(_refuse_many_steps)
ConvertFrameAssert.__call__ = _with_settings(ConvertFrameAssert.__call__)  # type: ignore[method-assign]
