"""The private names of torch that the benchmarks need, each with the reason. Read from torch 2.13.0."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def set_recompute_budget(ratio: float) -> None:
    """Lets the min-cut partitioner recompute until about `ratio` of the saved bytes are left, in this process.

    `torch._functorch.config` is the only place where the budget can be set (2.11 to 2.14).
    """
    torch._functorch.config.activation_memory_budget = ratio


def compilations() -> int:
    """How many graphs Dynamo has compiled in this process since the last `forget_compilations`.

    `torch._dynamo.utils.counters` has no public twin (2.11 to 2.14).
    """
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def forget_compilations() -> None:
    """Drops every compiled graph of this process and sets the count to zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def one_graph_despite_data_dependent_sizes() -> AbstractContextManager[None]:
    """Traces self-loops added inside a layer, whose number depends on data, without a graph break.

    `capture_dynamic_output_shape_ops` can be set in `torch._dynamo.config` only (2.11 to 2.14).
    """
    return torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)


def saved_without_version_check(node: Any) -> list[Tensor]:
    """What a compiled graph's autograd node holds outside `saved_tensors`.

    Since torch 2.11 AOTAutograd keeps tensors whose version it does not check in an attribute of the context.
    """
    return list(getattr(node, "_tensors_no_vc_check", None) or ())


def attach_cache_key(module: torch.fx.GraphModule, key: str) -> torch.fx.GraphModule:
    """Names a saved-tensor hook for the compile caches, which cannot hash the Python function it calls."""
    module.meta["user_cache_hash"] = key
    return module
