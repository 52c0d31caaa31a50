"""The backend: a graph of Dynamo's, compiled by the inner compiler with our partition of the joint graph."""

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

import actcompile
from actcompile.passes.codecs import lowerings  # noqa: F401  registers the lowerings of casts
from actcompile.passes.graph import _torch
from actcompile.passes.spare.dropout import dropout
from actcompile.passes.write.prepare import prepare

from .config import Config
from .pipeline import partition, recording
from .report import cache as _report_cache
from .report.data import GraphReport
from .together import together
from .tracing.call import Situation, guard_on_mode, noted, situation


@functools.cache
def source_hash() -> str:
    """A hash of everything that decides how a graph is rewritten; part of the compile caches' key."""
    digest = hashlib.sha256(torch.__version__.encode())
    for folder, _, files in sorted(os.walk(actcompile.__path__[0], followlinks=True)):  # passes and kernels, too
        for file in sorted(f for f in files if f.endswith((".py", ".cpp"))):
            digest.update(Path(folder, file).read_bytes())
    return digest.hexdigest()


class Partitioner(_torch.CustomPartitionerFn):
    """`partition` as Inductor takes it; pickled into the compile caches' key, so it holds what decides and no more."""

    def __init__(
        self,
        config: Config,
        situation: Situation = Situation(),  # noqa: B008
        only: frozenset[str] | None = None,
    ) -> None:
        self.config, self.situation, self.only = config, situation, only

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.config, self.situation, self.only)

    def uuid(self) -> tuple[str, ...]:
        only = repr(self.only and sorted(self.only))
        return "actcompile", source_hash(), repr(self.config), repr(self.situation), only

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = self.partition(gm, joint_inputs, **kwargs)
        prepare(forward.graph, backward.graph)
        return forward, backward

    def partition(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        return partition(gm, joint_inputs, config=self.config, situation=self.situation, only=self.only, **kwargs)


class Analyser(Partitioner):
    """A partitioner of graphs that won't run."""

    __call__ = Partitioner.partition


class PlainPartitioner(Partitioner):
    """torch's own cut, and none of our passes but that on dropout: it drops what `Partitioner` drops."""

    def uuid(self) -> tuple[str, ...]:
        return "actcompile, plain", source_hash(), repr(self.config.fast_dropout)

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        if self.config.fast_dropout:
            dropout(gm, kwargs["num_fwd_outputs"])
        return _torch.min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)


def compile_graph(
    gm: fx.GraphModule, inputs: list[Any], config: Config, only: frozenset[str] | None = None
) -> tuple[Callable[..., Any], list[GraphReport]]:
    """Compiles one graph of Dynamo's; returns the callable and the reports of what was done to it (none without
    gradients). `only` as in `partition`.

    Raises:
        RuntimeError: the machine lacks a compiler that Inductor needs; the message says what to install.
    """
    partitioner = Partitioner(config, situation(gm, inputs), only)
    guard_on_mode()
    with recording() as reports:
        compiled = _compile(gm, inputs, partitioner)
    if not reports:  # from the cache, where the report is too, or a graph without backward
        cached = _report_cache.attached(compiled)
        if cached is not None:
            reports = [GraphReport.from_dict(cached)]
        elif _report_cache.lost(compiled):
            reports = analyse(gm, inputs, config)
    return _noted(compiled, reports), reports


def compile_plain(gm: fx.GraphModule, inputs: list[Any], config: Config) -> Callable[..., Any]:
    """Compiles one graph with `config.inner` and no pass of ours, but with the dropout of `compile_graph`."""
    return _compile(gm, inputs, PlainPartitioner(config))


def _compile(gm: fx.GraphModule, inputs: list[Any], partitioner: Partitioner) -> Any:
    if partitioner.config.inner == "inductor":
        check_compilers(inputs)
        inner = together()(_torch.compile_fx_inner)  # a second time, since backward is compiled when it runs
        with together():
            return _torch.compile_fx(gm, inputs, inner, config_patches={"custom_partitioner_fn": partitioner})
    compiler = _torch.aot_autograd(
        fw_compiler=_torch.boxed_nop,
        bw_compiler=_torch.boxed_nop,
        partition_fn=partitioner,
        decompositions=_torch.select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    return compiler(gm, inputs)


def _noted(compiled: Callable[..., Any], reports: list[GraphReport]) -> Callable[..., Any]:
    """`compiled`, with word of what it saves left to graphs that are compiled later in the same call."""
    found = next((report for report in reports if report.taken or report.given), None)
    return noted(compiled, *found.handed()) if found is not None else compiled


def check_compilers(inputs: Sequence[Any]) -> None:
    """Says early, and in words, what Inductor would stumble over."""
    devices = {t.device.type for t in inputs if isinstance(t, torch.Tensor)}
    if "cuda" in devices:
        try:
            import triton  # noqa: F401
        except ImportError:
            raise RuntimeError(
                "compiling for CUDA needs Triton, which is not installed: pip install triton, or pass "
                'inner="aot_eager" to run the rewritten graphs without a compiler'
            ) from None
    elif "cpu" in devices:
        try:
            _torch.get_cpp_compiler()
        except _torch.InvalidCxxCompiler:
            raise RuntimeError(
                "compiling for the CPU needs a C++ compiler, and none was found: install g++ or clang, or set CXX to "
                'one, or pass inner="aot_eager" to run the rewritten graphs without a compiler'
            ) from None


def analyse(gm: fx.GraphModule, inputs: list[Any], config: Config) -> list[GraphReport]:
    """Does to a graph what `compile_graph` does up to the rewritten graphs, and compiles nothing."""
    partitioner = Analyser(config, situation(gm, inputs))

    def split(joint: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        if config.inner == "aot_eager":
            return partitioner(joint, joint_inputs, **kwargs)
        return _torch.inductor_partition(joint, joint_inputs, partitioner, **kwargs)

    compiler = _torch.aot_autograd(
        fw_compiler=_torch.boxed_nop,
        bw_compiler=_torch.boxed_nop,
        partition_fn=split,
        decompositions=_torch.select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    with recording() as reports:
        compiler(gm, inputs)
    return reports
