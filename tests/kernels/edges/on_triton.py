"""Has message passing on the CPU run as on CUDA: grouped by torch ops, and by Triton kernels, in the interpreter."""

import os
from functools import partial

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.interpreter import TensorHandle

from actcompile.kernels.edges import group as group_file
from actcompile.kernels.edges import ops as ops_file
from actcompile.kernels.edges import triton_run

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_edges_in_the_interpreter.py"

FUNCTIONS = ("exp", "log", "log1p", "expm1", "sin", "cos", "erf", "pow", "tanh")


def interpreted(function):
    """A function of torch as the interpreter calls one of the device's library, which it can't read."""

    def apply(*arguments):
        arrays = [torch.from_numpy(np.ascontiguousarray(a.handle.data)) for a in arguments]
        result, dtype = function(*arrays).numpy(), arguments[0].dtype
        return tl.core.tensor(TensorHandle(result, dtype), tl.block_type(dtype, list(result.shape)))

    return apply


def kernel_for(_, text, heads, columns):
    """Products in programs are for the CPU only: of these the reference is run."""
    return None if triton_run.parse(text).inner else partial(triton_run.run_triton, text)


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """The outputs that Triton kernels computed, by kind."""
    run, ran = triton_run._run_output, []

    def counted(text, i, *arguments):
        ran.append(triton_run.parse(text).outputs[i].kind)
        run(text, i, *arguments)

    for name in FUNCTIONS:
        monkeypatch.setattr(libdevice, name, interpreted(getattr(torch, name)))
    monkeypatch.setattr(triton_run, "_run_output", counted)
    monkeypatch.setattr(group_file, "has_compiler", lambda: False)
    monkeypatch.setattr(ops_file, "kernel_for", kernel_for)
    monkeypatch.setattr(ops_file, "_begun", lambda text, heads, columns: None)
    return ran
