"""Everything that users compare us with, in one table: memory, time and gradients of a training step."""

from __future__ import annotations

from typing import Any

from bench import plots
from bench.cases.models import REFERENCE, compare
from bench.registry import Options, case
from bench.variants import OURS

NAME = "peers"
MODELS = (
    "sage",
    "sage-max",
    "gcn",
    "gin",
    "gat",
    "gatv2",
    "transformer",
    "edge-conv",
    "pna",
    "gated-gcn",
    "molecules",
    "sampled",
)
COMPARED = (
    "eager", "eager-csr", REFERENCE, "fp8", "budget-0.5", "budget-0.1", "checkpoint", "exact", "iexact-4-vm",
    "fused-only", "default",
)  # fmt: skip


@case(NAME, "eager, CSR, torch.compile, its budget and fp8 pass, checkpoints, EXACT, i-EXACT, ours: 12 models")
def run(options: Options) -> dict[str, Any]:
    content = compare(options, NAME, MODELS, COMPARED)
    panels = {name: _points(model["variants"]) for name, model in content["models"].items()}
    size = content["settings"]["size"]
    title = f"A step of training, {size}: memory against time"
    path = options.out.joinpath(f"{NAME}-{size}.svg")
    plots.scatters(path, title, f"step, of {REFERENCE}'s", f"peak, of {REFERENCE}'s", panels)
    return content


def _points(variants: dict[str, Any]) -> plots.Points:
    """By who made it: name, step and peak relative to the reference's."""
    reference = variants.get(REFERENCE, {}).get("peak_bytes")
    found: dict[str, list[tuple[str, float, float, float]]] = {"other codecs": [], "actcompile": []}
    for name, r in variants.items():
        if reference and r.get("peak_bytes") and r.get("ratio"):
            ours = name in OURS and "exact" not in name
            point = name, r["ratio"], r["peak_bytes"] / reference, 0.0
            found["actcompile" if ours else "other codecs"].append(point)
    return found
