"""The call that a graph is compiled for: of which module, in which mode, and what of it the graph is a part of.

Dynamo hands a backend a graph and its inputs, and no more. What else has to be known of the call stands on Python's
stack, in the frame of torch's own wrapper around the compiled function.

Where Dynamo cuts a model in several graphs, tensors go from one to the next. Such a tensor is an input of the next
graph, but nothing holds it when the call is over, except what saves it for backward. It is told from the model's own
inputs by what the call was given: whatever can be reached from its arguments, or from the module, is alive anyway.
"""

import gc
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import fx, nn

from actcompile.passes.graph._torch import (
    FakeTensor,
    GlobalStateSource,
    Guard,
    OptimizedModule,
    StorageWeakRef,
    convert_frame,
    eval_frame,
    graph_break_of,
    install_guard,
    known_before_the_call,
)

from .trace import describe_breaks, describe_whole

TORCH, OURS = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
MOST = 100_000  # objects that are looked through for tensors


@dataclass(frozen=True)
class Situation:
    """What decides about a graph beside the config; part of the compile caches' key.

    Attributes:
        training: whether the compiled module is in training mode; True for a function.
        crossing: positions of the inputs that were made in this call before the graph, and that nothing else holds.
        counted: those of them that an earlier graph would save, too, if nothing were compressed.
        handed_on: whether what the graph returns goes on to more of the same call, and not to the caller.
    """

    training: bool = True
    crossing: tuple[int, ...] = ()
    counted: tuple[int, ...] = ()
    handed_on: bool = False


def situation(gm: fx.GraphModule, inputs: Sequence[Any]) -> Situation:
    """That of the graph that is being compiled, from inside of a backend."""
    wrapper = _wrapper()
    if wrapper is None:
        return Situation()
    handed_on = graph_break_of(gm) is not None or _inside_submodule(wrapper)
    crossing = _crossing(gm, inputs, wrapper)
    counted = tuple(i for i in crossing if _made.get(_memory(inputs[i]), _NOWHERE).by_torch)
    return Situation(in_training(), crossing, counted, handed_on)


def in_training() -> bool:
    """Whether the compiled module whose call is running is in training mode; True in the call of a function."""
    module = compiled_module()
    return True if module is None else module.training


def guard_on_mode() -> None:
    """Has the graph that is being compiled taken only in calls that are in the same mode as this one.

    Dynamo itself guards on `training` where forward reads it, and only there: the layers of most graph networks never
    do. A graph of a submodule, or of a function that the module calls, has the compiled module's mode.
    """
    training = in_training()

    def create(builder: Any, _: Guard) -> None:
        what = [f"actcompile: the compiled module is in {'training' if training else 'eval'} mode"]
        builder.guard_manager.root.add_lambda_guard(lambda _: in_training() is training, what, None)

    install_guard(Guard(GlobalStateSource(), create))


def compiled_module() -> nn.Module | None:
    """The compiled module whose call is running; None in the call of a function."""
    wrapper = _wrapper()
    return None if wrapper is None else _module(wrapper)


def breaks(gm: fx.GraphModule) -> list[str]:
    """Why the graph that is being compiled is not the whole call, as far as the graph and the stack tell."""
    reason = graph_break_of(gm)
    found = list(describe_breaks([reason])) if reason is not None else []
    frame, wrapper = sys._getframe(1), _wrapper()
    while wrapper is not None and frame is not wrapper and frame.f_back is not None:
        code = frame.f_code
        if code not in convert_frame.output_codes and not code.co_filename.startswith((TORCH, OURS)):
            found.append(describe_whole(code))
        frame = frame.f_back
    return found


def _wrapper() -> FrameType | None:
    """The frame of the innermost running call of what `torch.compile` returned (2.11 to 2.14)."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename == eval_frame.__file__:
            break
        frame = frame.f_back
    return frame


def _module(wrapper: FrameType) -> nn.Module | None:
    """The module whose call was compiled: by `torch.compile(module)`, by `module.compile()`, or its method alone."""
    caller = wrapper.f_back
    while caller is not None and caller.f_code.co_filename.startswith(OURS):
        caller = caller.f_back
    owner = caller.f_locals.get("self") if caller is not None else None
    if isinstance(owner, OptimizedModule):
        return owner._orig_mod
    if isinstance(owner, nn.Module) and caller is not None and _calls_a_module(caller):
        return owner
    method_of = getattr(wrapper.f_locals.get("fn"), "__self__", None)
    return method_of if isinstance(method_of, nn.Module) else None


def _calls_a_module(frame: FrameType) -> bool:
    return frame.f_code.co_filename == nn.modules.module.__file__


def _inside_submodule(wrapper: FrameType) -> bool:
    """Whether the graph being compiled is of a module that the compiled one, left to Python in parts, calls."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wrapper:
        if _calls_a_module(frame):
            return frame.f_locals.get("self") is not _module(wrapper)
        frame = frame.f_back
    return False


@dataclass(frozen=True)
class Handed:
    """What became of a tensor that goes from one graph to another: whether torch would save it, and whether we do."""

    by_torch: bool
    as_it_is: bool


_NOWHERE = Handed(False, False)
_made: dict[StorageWeakRef, Handed] = {}  # of the memory that graphs return to the middle of a call


def _memory(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _crossing(gm: fx.GraphModule, inputs: Sequence[Any], wrapper: FrameType) -> tuple[int, ...]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    candidates = [
        i
        for i, (tensor, placeholder) in enumerate(zip(inputs, placeholders, strict=True))
        if type(tensor) in (torch.Tensor, FakeTensor)
        and tensor.layout is torch.strided
        and not (tensor.is_leaf and tensor.requires_grad)
        and not known_before_the_call(placeholder)
    ]
    if not candidates:
        return ()
    given = [wrapper.f_locals.get(name) for name in ("fn", "args", "kwargs")]
    alive = _memory_of([_module(wrapper), *given])
    return () if alive is None else tuple(i for i in candidates if not _is_held(inputs[i], alive))


def _is_held(tensor: torch.Tensor, alive: set[StorageWeakRef]) -> bool:
    memory = _memory(tensor)
    if memory in alive:
        return True
    if memory in _made:
        return _made[memory].as_it_is
    maker = (tensor if tensor._base is None else tensor._base).grad_fn  # of Python's, between two graphs
    return any(name.startswith("_saved_") and "result" in name for name in dir(type(maker)))


def _memory_of(objects: Iterable[Any]) -> set[StorageWeakRef] | None:
    """The memory of all tensors that can be reached from objects; None where there is too much to look through."""
    memory, seen, todo = set(), set(), list(objects)
    while todo:
        found = todo.pop()
        if id(found) in seen or isinstance(found, type | ModuleType | CodeType | FrameType | str | int | float):
            continue
        seen.add(id(found))
        if len(seen) > MOST:
            return None
        if isinstance(found, torch.Tensor):
            if found.layout is torch.strided:
                memory.add(_memory(found))
            todo += vars(found).values()
        elif isinstance(found, nn.Module):
            todo += [value for name, value in vars(found).items() if name != "_compiled_call_impl"]
            todo.append(type(found).forward)  # what it closes over
        elif isinstance(found, FunctionType):
            todo += [*(found.__closure__ or ()), found.__defaults__, found.__kwdefaults__]
        else:
            todo += gc.get_referents(found)
    return memory


def noted(
    compiled: Callable[..., Any], taken: Mapping[int, Handed], given: Mapping[int, Handed]
) -> Callable[..., Sequence[Any]]:
    """A compiled graph that leaves word for those that are compiled later in the same call.

    Args:
        taken, given: what became of inputs and outputs that are saved, by position.
    """

    def run(*inputs: Any) -> Sequence[Any]:
        outputs = compiled(*inputs)
        for memory in [memory for memory in list(_made) if memory.expired()]:
            _made.pop(memory, None)
        for position, output in enumerate(outputs):
            if isinstance(output, torch.Tensor) and output.layout is torch.strided:
                _made[_memory(output)] = given.get(position, _NOWHERE)
        for position, handed in taken.items():
            _made[_memory(inputs[position])] = handed
        return outputs

    return run
