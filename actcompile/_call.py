"""The call that a graph is compiled for: of which module, in which mode.

Dynamo hands a backend a graph and its inputs, and no more. What else has to be known of the call stands on Python's
stack, in the frame of torch's own wrapper around the compiled function.
"""

import sys
from types import FrameType

from torch import nn

from actcompile.passes._torch import GlobalStateSource, Guard, OptimizedModule, eval_frame, install_guard


def in_training() -> bool:
    """Whether the compiled module whose call is running is in training mode; True in the call of a function."""
    wrapper = _wrapper()
    module = None if wrapper is None else _module(wrapper)
    return True if module is None else module.training


def guard_on_mode() -> None:
    """Has the graph that is being compiled taken only in calls that are in the same mode as this one.

    Dynamo itself guards on `training` where forward reads it, and only there: the layers of most graph networks never do.
    A graph of a submodule, or of a function that the module calls, has the compiled module's mode.
    """
    training = in_training()

    def create(builder: object, _: Guard) -> None:
        what = [f"actcompile: the compiled module is in {'training' if training else 'eval'} mode"]
        builder.guard_manager.root.add_lambda_guard(lambda _: in_training() is training, what, None)  # type: ignore[attr-defined]

    install_guard(Guard(GlobalStateSource(), create))


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
    owner = caller.f_locals.get("self") if caller is not None else None
    if isinstance(owner, OptimizedModule):
        return owner._orig_mod
    if isinstance(owner, nn.Module) and caller.f_code.co_filename == nn.modules.module.__file__:  # type: ignore[union-attr]
        return owner
    method_of = getattr(wrapper.f_locals.get("fn"), "__self__", None)
    return method_of if isinstance(method_of, nn.Module) else None
