"""The private names of torch that the kernels need, each with the reason (torch 2.11 to 2.14)."""

import ctypes

import torch


def load_cpp(source: str) -> ctypes.CDLL:
    """Compiles C++ with the flags that Inductor found for this machine, and loads it; kept on disk by its text.

    Inductor turns gcc's vectoriser off, since it writes vectors itself; these kernels need it.
    `torch.utils.cpp_extension` is public, but includes torch's headers, which takes half a minute, and needs ninja.

    Raises:
        RuntimeError, OSError: there is no C++ compiler, it fails, or what it made can't be loaded.
    """
    from torch._inductor.codecache import CppCodeCache

    library = CppCodeCache.load(source, extra_flags=("-ftree-loop-vectorize",))
    assert isinstance(library, ctypes.CDLL)
    return library


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """Has a CUDA device stop with an error where a condition is false, without waiting, as torch's indexing does."""
    torch._assert_async(condition, message)
