"""`compress`, `explain` and the `torch.compile` backend."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from actcompile.passes.graph import _torch
from actcompile.passes.plan.policy import matches

from .adjacency.inputs import accept_sparse, with_stand_ins
from .backend import analyse, compile_graph
from .config import Config
from .report import GraphReport, Report
from .report.last_run import LastRun
from .tracing import trace as _trace
from .tracing.call import breaks, compiled_module, noted
from .tracing.capture import whole_graphs

Module = TypeVar("Module", bound=nn.Module)

_configs: "weakref.WeakKeyDictionary[nn.Module, Config]" = weakref.WeakKeyDictionary()
_compressed: "weakref.WeakKeyDictionary[nn.Module, list[LastRun]]" = weakref.WeakKeyDictionary()
_breaks: "weakref.WeakKeyDictionary[nn.Module, list[str]]" = weakref.WeakKeyDictionary()
_compiled = WeakTensorKeyDictionary()  # parameter or buffer -> the graphs that take it


def compress(
    model: Module,
    config: Config | None = None,
    *,
    preset: str | None = None,
    dynamic: bool | None = None,
    **options: Any,
) -> Module:
    """Has `model` trained through `torch.compile` with its saved activations compressed.

    The same module object comes back: its parameters, `state_dict`, hooks and class are untouched, and only calling it
    changes. A `copy.deepcopy` of it is an uncompressed copy.

    Args:
        model: any module that `torch.compile` can trace.
        config: a `Config`; `options` change single fields of it.
        preset: instead, a config by name: "exact", "iexact-8", "iexact-64-vm" and others; see `Config.make`.
        dynamic: as in `torch.compile`: True for sizes that change from the first call on, None to find out.
        options: fields of `Config`, such as `bits=4` or `rules={"head": actcompile.bits(8)}`.

    Raises:
        TypeError, ValueError: the model is no module, a field is wrong, or a rule matches no module of the model; the
            message names the field.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; for a function use "
            'torch.compile(function, backend="actcompile")'
        )
    made = Config.make(config, preset, **options)
    if isinstance(model, _torch.OptimizedModule):
        raise TypeError("model is compiled already; pass the module itself to compress, before torch.compile")
    _check_rules(model, made)
    graphs: list[LastRun] = []
    compile_calls(model, _backend_with(made, graphs), dynamic)
    _configs[model], _compressed[model] = made, graphs
    _breaks.pop(model, None)
    return model


def compile_calls(model: nn.Module, backend: Callable[..., Any], dynamic: bool | None) -> Any:
    """Has calls of `model` compiled by a backend of ours; returns the function that torch made of its forward."""
    # Isolated: models of one class share code objects, and with them a limit of eight compilations.
    compiled = _torch.compile_in_place(model, backend=backend, dynamic=dynamic, **_trace.isolated())
    model._compiled_call_impl = accept_sparse(model, compiled)  # type: ignore[assignment]
    return compiled


@whole_graphs
def backend(gm: fx.GraphModule, inputs: list[Any], *, options: dict[str, Any] | None = None, **_: Any) -> Any:
    """The backend of `torch.compile(model, backend="actcompile", options={...})`; options are fields of `Config`."""
    return _compile(gm, inputs, Config.make(**(options or {})), [])


def _check_rules(model: nn.Module, config: Config) -> None:
    paths = [path for path, _ in model.named_modules()]
    for pattern in dict(config.rules):
        if not any(matches(pattern, path) for path in paths):
            known = ", ".join(path for path, _ in model.named_children())
            raise ValueError(
                f"rules[{pattern!r}] matches no module of {type(model).__name__}; its children are {known or 'none'}"
            )


def _backend_with(config: Config, graphs: list[LastRun]) -> Callable[..., Any]:
    @whole_graphs
    def actcompile(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        return _compile(gm, inputs, config, graphs)

    return actcompile


def _compile(gm: fx.GraphModule, inputs: list[Any], config: Config, graphs: list[LastRun]) -> Any:
    if (module := compiled_module()) is not None:
        _breaks.setdefault(module, []).extend(breaks(gm))
    compiled, made = compile_watched(gm, inputs, config)
    graphs += made
    for tensor in [*inputs, *gm.parameters(), *gm.buffers()]:
        if isinstance(tensor, nn.Parameter) or getattr(tensor, "_dynamo_static_input_type", None):
            _compiled.setdefault(tensor, []).extend(made)
    return compiled


def compile_watched(
    gm: fx.GraphModule, inputs: list[Any], config: Config, only: frozenset[str] | None = None
) -> tuple[Callable[..., Any], list[LastRun]]:
    """`compile_graph`, whose reports have the sizes of the last run."""
    compiled, reports = compile_graph(gm, inputs, config, only)
    made = [LastRun(report) for report in reports]
    for graph in made:
        compiled = graph.watch(compiled)
    return compiled, made


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    config: Config | None = None,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
    **keywords: Any,
) -> Report:
    """Tells what is saved for backward, in how many bytes, how it is kept, and why.

    With inputs, the model is traced as `torch.compile` would, without running it and without allocating its
    activations: inputs may also be fake or meta tensors. Without inputs, the report is of what was compiled when the
    model ran, also where that came from a warm compile cache. Of a model that was given to `torch.compile`, not to
    `compress`, those are the graphs that use its parameters or buffers.

    Args:
        model: a module, compressed or not, a compiled one, or a function.
        inputs, keywords: what the model is called with.
        config, options: the config to explain; by default that of `compress`, or the defaults.
        dynamic: as in `torch.compile`.

    Raises:
        ValueError: without inputs, for a function: only a module's compiled graphs can be told from others.
    """
    module = getattr(model, "_orig_mod", model)
    if not inputs and not keywords:
        return _explain_compiled(module)
    known = _configs.get(module) if isinstance(module, nn.Module) else None
    made = Config.make(config or known, **(options or {}))
    graphs: list[GraphReport] = []
    (inputs, keywords), _ = with_stand_ins(module, (inputs, keywords))

    def trace(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.extend(found := analyse(gm, example_inputs, made))
        return noted(gm.forward, *(found[0].handed() if found else ({}, {})))

    result = _trace.trace(module, inputs, keywords, trace, dynamic=dynamic)
    notes = [f"graph break: {reason}" for reason in result.breaks]
    if isinstance(module, nn.Module) and not module.training and made.when == "training":
        notes.append("the model is in eval mode, where gradients are exact; after model.train() this shows training")
    notes += [f"sizes of {op} depend on data and were taken at their largest" for op in result.estimated]
    if result.stopped:
        notes.append(f"the trace ended here: {result.stopped}")
    return Report(tuple(graphs), tuple(notes))


def _explain_compiled(module: Any) -> Report:
    if not isinstance(module, nn.Module):
        raise ValueError("explain(function) needs the function's inputs: explain(function, *inputs)")
    notes = tuple(f"graph break: {reason}" for reason in dict.fromkeys(_breaks.get(module, ())))
    compressed = [_compressed[part] for part in module.modules() if part in _compressed]  # an encoder, or inside DDP
    if compressed:
        return Report(tuple(graph.report for reports in compressed for graph in reports), notes)
    graphs: list[LastRun] = []
    for tensor in [*module.parameters(), *module.buffers()]:
        graphs += [g for g in _compiled.get(tensor, []) if not any(g is known for known in graphs)]
    return Report(tuple(graph.report for graph in graphs), notes)
