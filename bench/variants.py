"""The ways to train that are compared: ours and the baselines, equal entries of one registry.

A variant turns a model into the callable that is trained. It may set process-wide options of torch, so every variant
runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch_geometric.utils import to_torch_csr_tensor

import actcompile
from actcompile import cast, keep, low_rank, prune, sample_rows
from actcompile.config import GROUPS
from bench import _torch
from bench.workload import Prepare


@dataclass(frozen=True)
class Variant:
    """name: on the command line and in tables. gradient_error: the largest relative error of the gradients, against
    eager ones without dropout, at which the variant still counts as right. checkpointed: the model recomputes by layer.
    compiled: Inductor makes code of it.
    """

    name: str
    note: str
    prepare: Prepare
    gradient_error: float
    checkpointed: bool = False
    compiled: bool = True


VARIANTS: dict[str, Variant] = {}
EXACT = 1e-3  # float32 sums in another order, through BatchNorm, stay far below
ROUNDED = 0.5  # a wrong gradient has an error of about 1 or more; a rounded one's is reported, not judged further
NOISY = float(
    "inf"
)  # projections and samples err by more than 1 in one step: judged by the tests of their mean instead


def variant(
    name: str, note: str, gradient_error: float = EXACT, checkpointed: bool = False, compiled: bool = True
) -> Callable[[Prepare], Prepare]:
    """Registers the decorated function as a variant."""

    def register(prepare: Prepare) -> Prepare:
        VARIANTS[name] = Variant(name, note, prepare, gradient_error, checkpointed, compiled)
        return prepare

    return register


@variant("eager", "no compiler", compiled=False)
def _eager(model: nn.Module) -> Callable[..., Tensor]:
    return model


@variant("inductor", "plain torch.compile")
def _inductor(model: nn.Module) -> Callable[..., Tensor]:
    return torch.compile(model)


@variant("budget-0.5", "torch.compile, activation_memory_budget 0.5")
def _budget_half(model: nn.Module) -> Callable[..., Tensor]:
    _torch.set_recompute_budget(0.5)
    return torch.compile(model)


@variant("budget-0.2", "torch.compile, activation_memory_budget 0.2")
def _budget_fifth(model: nn.Module) -> Callable[..., Tensor]:
    _torch.set_recompute_budget(0.2)
    return torch.compile(model)


@variant("budget-0.1", "torch.compile, activation_memory_budget 0.1")
def _budget_tenth(model: nn.Module) -> Callable[..., Tensor]:
    _torch.set_recompute_budget(0.1)
    return torch.compile(model)


@variant("eager-csr", "no compiler, the edges as a torch.sparse CSR adjacency", compiled=False)
def _eager_csr(model: nn.Module) -> Callable[..., Tensor]:
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def run(x: Tensor, edge_index: Tensor, *rest: Tensor) -> Tensor:
        if rest:
            raise ValueError("a CSR adjacency holds one number for each edge; this model has more to say of its edges")
        if id(edge_index) not in known:
            adjacency = to_torch_csr_tensor(edge_index, size=(x.shape[0], x.shape[0]))
            known[id(edge_index)] = edge_index, adjacency.t().to_sparse_csr()
        return model(x, known[id(edge_index)][1])

    return run


@variant("checkpoint", "torch.utils.checkpoint of every layer, under torch.compile", checkpointed=True)
def _checkpoint(model: nn.Module) -> Callable[..., Tensor]:
    return torch.compile(model)


@variant("fp8", "torch.compile with Inductor's fp8 activation pass", ROUNDED)
def _fp8(model: nn.Module) -> Callable[..., Tensor]:
    quantization = {
        "quant_type": "torch.float8_e5m2",
        "use_scaling": True,  # its default differs between forward and backward
        "size_in_mb": 1.0,
        "exclude_primals": True,
        "allowed_dtypes": "torch.float32;torch.bfloat16",
    }
    options: dict[str, Any] = {"post_grad_fusion_options": {"activation_quantization_aten_pass": quantization}}
    return torch.compile(model, options=options)


@variant("hooks-int8", "torch.compile, saved-tensor hooks that keep 8 bits per element, one scale per row", ROUNDED)
def _hooks(model: nn.Module) -> Callable[..., Tensor]:
    return with_row_hooks(torch.compile(model))


def with_row_hooks(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Runs a compiled model under saved-tensor hooks that AOTAutograd inlines: 8 bits an element, by rows."""
    pack, unpack = _hook(_pack_rows, "pack-rows-8"), _hook(_unpack_rows, "unpack-rows-8")

    def run(*inputs: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return compiled(*inputs)

    return run


ALONE: dict[str, Any] = {"replay": 0, "nonlinear_bits": 4, "block": 256, "metadata": "float32"}
"""Under another codec: the first layer's aggregate is saved, since it is little else that such a codec applies to."""

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "lossless": ("lossless codecs only", {"bits": None, "nonlinear_bits": None}),
    "default": ("its defaults", {}),
    "fused-only": (
        "message passing fused, nothing compressed",
        {"rules": {"*": keep()}, "replay": 0, "rebuild": False},
    ),
    "2-bit": ("2 bits for every float", {"bits": 2}),
    "4-bit": ("4 bits for every float", {"bits": 4}),
    "no-replay": ("its defaults, but the first layer is saved, not done again", {"replay": 0}),
    "smallest": ("preset smallest", {"preset": "smallest"}),
    "exact": ("EXACT: projection to 1/8, a block to a row, 2 bits", {"preset": "exact"}),
    "exact-vm": (
        "EXACT with variance-minimising levels: i-EXACT's levels without its blocks",
        {"preset": "exact", "levels": "variance-minimising"},
    ),
    **{f"iexact-{g}": (f"i-EXACT, blocks of {g} projected rows", {"preset": f"iexact-{g}"}) for g in GROUPS},
    **{f"iexact-{g}-vm": ("the same, with its levels", {"preset": f"iexact-{g}-vm"}) for g in GROUPS},
    "bf16": ("every float in bfloat16", {**ALONE, "method": cast("bfloat16")}),
    "e4m3": ("every float in 8-bit e4m3", {**ALONE, "method": cast("float8_e4m3fn")}),
    "prune-8": ("the largest eighth of each row", {**ALONE, "method": prune(8)}),
    "low-rank-8": ("rank an eighth of the width", {**ALONE, "method": low_rank(8)}),
    "rows-8": ("an eighth of the rows, sampled (WTA-CRS)", {**ALONE, "method": sample_rows(8)}),
}
"""Our own variants: what they do, and the fields of `actcompile.Config` that say so."""


def _actcompile(fields: dict[str, Any]) -> Prepare:
    # The function, not its name: a name is found in what is installed, and a clone need not be.
    return lambda model: torch.compile(model, backend=actcompile.backend, options=fields)


for _name, (_note, _fields) in OURS.items():
    _rounded = _name in ("default", "4-bit", "no-replay")
    _limit = EXACT if _name in ("lossless", "fused-only") else ROUNDED if _rounded else NOISY
    variant(_name, f"actcompile, {_note}", _limit)(_actcompile(_fields))


def _hook(function: Callable[[Any], Any], key: str) -> fx.GraphModule:
    """AOTAutograd inlines hooks that are graph modules; one node that calls a Python function may look at the dtype."""
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("saved"),)))
    return _torch.attach_cache_key(fx.GraphModule(torch.nn.Module(), graph), key)


def _pack_rows(saved: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    if not saved.is_floating_point() or saved.dim() < 2:
        return saved
    low, high = saved.amin(-1, keepdim=True), saved.amax(-1, keepdim=True)
    scale = ((high - low) / 255).clamp_min(1e-20)
    return ((saved - low) / scale).round().to(torch.uint8), low, scale


def _unpack_rows(packed: Tensor | tuple[Tensor, Tensor, Tensor]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    codes, low, scale = packed
    return codes * scale + low
