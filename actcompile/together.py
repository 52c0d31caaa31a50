"""Inductor's C++ kernels of a graph are compiled together: as many sources as threads that compile, not one for each.

Most of the time that a C++ compiler takes for a kernel goes by before it has read one: it loads the headers' 150 MB,
makes Python bindings, links. Calls of ours, between which Inductor's loops stand, make more and smaller kernels of a
graph. So the kernels of a graph are parts of a few sources. Each part has a namespace, and its `kernel` a name of
its own; nothing else of them changes.

Inductor's module of a graph hands over each kernel's source, and then waits for all: between the two they are put
together. That is so while a graph is compiled, or loaded from a cache, for a backend of ours, and for no other graph.
What can't be compiled together is compiled kernel by kernel, as Inductor itself does.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actcompile.passes.graph._torch import AsyncCompile, CppPythonBindingsCodeCache, get_compile_threads

BINDINGS = Path(__file__).with_name("together.cpp")
_together: ContextVar[bool] = ContextVar("actcompile_together", default=False)


log = logging.getLogger(__name__)


@dataclass(eq=False)
class Pending:
    """Stands for a kernel until its graph's module waits; `alone` has Inductor compile it."""

    source: str
    alone: Callable[[], Any]


@contextmanager
def together() -> Iterator[None]:
    """Kernels of the graphs that are compiled or loaded inside are compiled together."""
    token = _together.set(True)
    try:
        yield
    finally:
        _together.reset(token)


def compile_together(sources: Sequence[str]) -> list[Callable[..., None]]:
    """The kernels of sources of Inductor's, each a function `kernel`, as functions of Python."""
    threads = get_compile_threads()
    libraries = []
    for part in shared_out(sources, threads):
        text = joined([sources[i] for i in part])
        submit = AsyncCompile.submit if threads > 1 else None
        libraries.append((part, CppPythonBindingsCodeCache.load_async(text, submit_fn=submit)))
    kernels = {i: (load, k) for part, load in libraries for k, i in enumerate(part)}
    return [getattr(load(), f"kernel_{k}") for _, (load, k) in sorted(kernels.items())]


def shared_out(sources: Sequence[str], parts: int) -> list[list[int]]:
    """The positions of sources in at most so many parts of about the same length; the same for the same sources."""
    found: list[list[int]] = [[] for _ in range(max(parts, 1))]
    lengths = [0] * len(found)
    for i in sorted(range(len(sources)), key=lambda i: -len(sources[i])):
        shortest = min(range(len(found)), key=lengths.__getitem__)
        found[shortest].append(i)
        lengths[shortest] += len(sources[i])
    return [sorted(part) for part in found if part]


def joined(sources: Sequence[str]) -> str:
    """One source of several: a module of Python's whose functions are `kernel_0`, `kernel_1` and so on."""
    lines = [line for source in sources for line in source.splitlines()]
    includes = [line for line in lines if line.lstrip().startswith("#include")]
    text = "\n".join([*dict.fromkeys(includes), BINDINGS.read_text()])
    for i, source in enumerate(sources):
        body = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith("#include"))
        text += f"\nnamespace source_{i} {{\n#define kernel kernel_{i}\n{body}\n#undef kernel\n}}\n"
    functions = ", ".join(f"FUNCTION({i})" for i in range(len(sources)))
    return f"{text}\nMODULE({functions})\n"


def _handing_over(cpp_pybinding: Callable[..., Any]) -> Callable[..., Any]:
    """`AsyncCompile.cpp_pybinding`, which begins to compile a kernel."""

    @functools.wraps(cpp_pybinding)
    def call(self: AsyncCompile, argtypes: list[str], source_code: str) -> Any:
        alone = functools.partial(cpp_pybinding, self, argtypes, source_code)
        return Pending(source_code, alone) if _together.get() else alone()

    return call


def _waiting(wait: Callable[..., None]) -> Callable[..., None]:
    """`AsyncCompile.wait`, which puts kernels in the place of what stands for them in a module's names."""

    @functools.wraps(wait)
    def call(self: AsyncCompile, scope: dict[str, Any]) -> None:
        pending = {name: value for name, value in scope.items() if isinstance(value, Pending)}
        try:
            kernels = compile_together([kernel.source for kernel in pending.values()])
        except Exception as error:  # whatever a compiler, or Inductor's code that is not as we know it, may raise
            log.warning("Inductor's kernels are compiled one by one: %s", str(error).strip().splitlines()[:1])
            kernels = [kernel.alone() for kernel in pending.values()]
        scope.update(zip(pending, kernels, strict=True))
        wait(self, scope)

    return call


AsyncCompile.cpp_pybinding = _handing_over(AsyncCompile.cpp_pybinding)  # type: ignore[method-assign]
AsyncCompile.wait = _waiting(AsyncCompile.wait)  # type: ignore[method-assign]
