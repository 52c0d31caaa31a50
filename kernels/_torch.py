"""The private names of torch that the kernels need, each with the reason (torch 2.11 to 2.14)."""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch

# Inductor turns loops' vectors off, since it writes them itself. Comparisons and roots become vectors only where they
# need not set flags or errno, which nothing reads; values are the same.
FLAGS: tuple[str, ...] = ("-ftree-loop-vectorize", "-fno-trapping-math", "-fno-math-errno")


def load_cpp(source: str) -> ctypes.CDLL:
    """Compiles C++ with the flags that Inductor found for this machine, and loads it; kept on disk by its text.

    `torch.utils.cpp_extension` is public, but includes torch's headers, which takes half a minute, and needs ninja.
    A process that is killed while its compiler writes leaves a file that nobody could load; it is made anew.

    Raises:
        RuntimeError, OSError: there is no C++ compiler, it fails, or what it made can't be loaded.
    """
    from torch._inductor.codecache import CppCodeCache

    try:
        library = CppCodeCache.load(source, extra_flags=FLAGS)
    except OSError as error:
        broken = Path(str(error).partition(": ")[0])
        if broken.suffix != ".so" or not broken.is_file():
            raise
        broken.unlink(missing_ok=True)
        library = CppCodeCache.load(source, extra_flags=FLAGS)
    assert isinstance(library, ctypes.CDLL)
    return library


@lru_cache
def _torchs_own() -> ctypes.CDLL | None:
    """The library of torch's CPU ops, and through it those that it uses."""
    files = sorted(Path(torch.__path__[0], "lib").glob("*torch_cpu.*"))
    return ctypes.CDLL(str(files[0])) if files else None


def work_alone() -> None:
    """Has torch's ops use no other threads on the thread that calls.

    `torch.set_num_threads` is of the whole process. Both numbers are those that OpenMP and MKL keep for each thread;
    where torch uses neither, its ops go on to share their work: slower, and nothing else.
    """
    torch.get_num_threads()  # torch sets a thread's number of threads at its first use
    for function in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"):
        try:
            getattr(_torchs_own(), function)(1)
        except AttributeError:
            continue


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """Has a CUDA device stop with an error where a condition is false, without waiting, as torch's indexing does."""
    torch._assert_async(condition, message)
