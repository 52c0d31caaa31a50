"""C++ kernels: compiled by what Inductor compiles its own with, and kept where Inductor keeps its own."""

import ctypes
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from ._torch import load_cpp

log = logging.getLogger(__name__)
P, I32, I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
Functions = Mapping[str, tuple[Any, ...]]
"""By name, the types of the arguments; where a function returns something, these and its type, as a pair."""
Made = TypeVar("Made")
_compilers = ThreadPoolExecutor(2, "actcompile-compile")


def begin(make: Callable[..., Made], *arguments: Any) -> Future[Made]:
    """Calls what compiles beside what else goes on. A second call meanwhile waits for the same file, by its lock."""
    return _compilers.submit(make, *arguments)


def library(file: str, functions: Functions, **constants: int) -> ctypes.CDLL | None:
    """The library of a file in this package, with constants defined in front; None where it can't be compiled."""
    return _library(file, tuple(functions.items()), tuple(constants.items()))


@lru_cache
def _library(
    file: str, functions: tuple[tuple[str, tuple[Any, ...]], ...], constants: tuple[tuple[str, int], ...]
) -> ctypes.CDLL | None:
    source = "".join(f"#define {name} {value}\n" for name, value in constants)
    return compile_source(source + (Path(__file__).parent / file).read_text(), dict(functions))


def compile_source(source: str, functions: Functions) -> ctypes.CDLL | None:
    """The library of a source; None, and one warning, where it can't be compiled."""
    try:
        loaded = load_cpp(source)
    except (RuntimeError, OSError) as error:
        _warn(str(error).strip().splitlines()[0])
        return None
    for name, types in functions.items():
        function = getattr(loaded, name)
        returns = isinstance(types[0], tuple)
        function.argtypes, function.restype = types if returns else (types, None)
    return loaded


@lru_cache
def _warn(reason: str) -> None:
    log.warning(
        "No C++ kernels (%s): activations on the CPU are encoded by plain torch ops, many times slower. Install g++ or "
        "clang, or set CXX to one.",
        reason,
    )
