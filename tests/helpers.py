"""What several tests need: models that compile in a second, their gradients, and graphs between two passes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from actcompile import Config
from actcompile.passes.graph.bias import bias
from actcompile.passes.graph.find import find
from actcompile.passes.graph.split import Split
from actcompile.passes.plan.plan import Plan, plan
from actcompile.passes.spare.dropout import dropout
from actcompile.passes.spare.masks import masks
from actcompile.passes.write.rewrite import rewrite
from bench.models import build

Pass = Callable[[Split], Any]
FAST: dict[str, Any] = {"inner": "aot_eager", "min_bytes": 0}  # no C++ compiler, and small tensors count too
SAVED: dict[str, Any] = {**FAST, "replay": 0, "bits": 2}
"""What a step's peak would decide is fixed: a first layer, most of a small model, is saved as all others; 2 bits."""
EXACT: dict[str, Any] = {**FAST, "bits": None, "nonlinear_bits": None}


def quickly(cases: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """Parameters of a test. Those that are `slow`, since others among them try the same, are left to the slow tests."""

    def marked(case: Any) -> Any:
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)

    return [marked(case) if case in slow else case for case in cases]


def graph(nodes: int = 64, edges: int = 256, features: int = 16) -> tuple[Tensor, Tensor]:
    """Features [nodes, features] and a random edge_index [2, edges]."""
    return torch.randn(nodes, features), torch.randint(0, nodes, (2, edges))


def gnn(name: str = "sage", **options: Any) -> nn.Module:
    """A model of two layers from 16 features to 4 classes, the same one every time."""
    torch.manual_seed(0)
    return build(name, 16, 4, **{"hidden": 32, "layers": 2, **options})


class Mlp(nn.Module):
    """Linear, ReLU, dropout, linear: two floats and two masks that a step saves."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.first, self.last, self.dropout = nn.Linear(16, 32), nn.Linear(32, 4), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(self.first(x).relu()))


def leaves(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


def loss(outputs: Any) -> Tensor:
    """A scalar whose gradient differs from element to element."""
    return torch.stack(
        [(t * torch.linspace(-1, 1, t.numel(), device=t.device).view_as(t)).sum() for t in leaves(outputs)]
    ).sum()


def step(function: Callable[..., Any], inputs: Iterable[Any], parameters: Iterable[Tensor], seed: int = 0) -> list[Any]:
    """One forward and backward with the default generator seeded; returns outputs and gradients, all copied."""
    parameters = list(parameters)
    torch.manual_seed(seed)
    outputs = function(*inputs)
    gradients = torch.autograd.grad(loss(outputs), parameters, allow_unused=True)
    return [t if t is None else t.detach().clone() for t in (*leaves(outputs), *gradients)]


def held_bytes(outputs: Any, alive: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward of `outputs`.

    Args:
        alive: tensors that are alive anyway, such as parameters and inputs; those and `outputs` themselves are free.
    """
    free = {t.untyped_storage().data_ptr() for t in (*alive, *leaves(outputs))}
    held: dict[int, int] = {}
    todo, seen = [t.grad_fn for t in leaves(outputs)], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names = [n for n in dir(node) if n.startswith("_saved") or n in ("saved_tensors", "_tensors_no_vc_check")]
        for tensor in leaves([getattr(node, name) for name in names]):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in free:
                held[storage.data_ptr()] = storage.nbytes()
        todo += [function for function, _ in node.next_functions]
    return sum(held.values())


def assert_equal(ours: list[Any], reference: list[Any]) -> None:
    """Equal to the bit, up to the sign of zero."""
    assert len(ours) == len(reference)
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert (a is None) == (b is None), f"number {i}: {a} and {b}"
        assert a is None or torch.equal(a, b), f"number {i} differs by up to {(a - b).abs().max()}"


def assert_close(ours: list[Any], reference: list[Any], within: float) -> None:
    """Equal up to what rounding does: each tensor's difference in norm, relative to the tensor's norm."""
    assert len(ours) == len(reference)
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        if a is None or b is None:
            assert a is b, f"number {i}: {a} and {b}"
            continue
        error = float((a - b).norm() / b.norm().clamp_min(1e-6))
        assert error < within, f"number {i} is {error:.2f} of its norm away"


def uncompressed(function: Any, transform: Pass | None = None, **options: Any) -> Any:
    """`function` compiled as `inner="aot_eager"` does it, without us; `transform` may change every split.

    Only what is dropped is what we drop: outputs and gradients can be compared.
    """

    def partition(joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **keywords: Any) -> Any:
        names = [n.name for n in joint.graph.find_nodes(op="placeholder")]
        parameters = [names[i] for i in keywords["static_lifetime_input_indices"]]
        dropout(joint, num_fwd_outputs)
        forward, backward = min_cut_rematerialization_partition(
            joint, inputs, num_fwd_outputs=num_fwd_outputs, **keywords
        )
        if transform is not None:
            split = Split(forward, backward, num_fwd_outputs, parameters)
            transform(split)
            split.finish()
        return forward, backward

    backend = aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=boxed_nop,
        partition_fn=partition,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    return torch.compile(function, backend=backend, **options)


def every_pass(split: Split, **options: Any) -> Plan:
    """What the backend does to a split, up to `Split.finish`."""
    masks(split)
    activations = find(split)
    floats = [a.placeholder for a in activations if a.refusal is None and a.value.is_floating_point()]
    chosen = plan(activations, bias(split.backward.graph, floats), Config(**options).policy())
    rewrite(split, chosen)
    return chosen


def ops(gm: fx.GraphModule | fx.Graph) -> list[str]:
    """The names of what a graph calls, in order."""
    g = gm.graph if isinstance(gm, fx.GraphModule) else gm
    return [str(n.target) for n in g.nodes if n.op == "call_function"]


def count(gm: fx.GraphModule | fx.Graph, name: str) -> int:
    return sum(name in op for op in ops(gm))
