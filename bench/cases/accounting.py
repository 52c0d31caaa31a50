"""The published memory column of i-EXACT, computed from shapes, and our plans for the same network beside it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

import actcompile
from bench import models
from bench.accounting import LABEL, MB, PUBLISHED, Setting, in_their_convention, modelled
from bench.registry import Options, case
from bench.results import megabytes, show

TOLERANCE = 0.05  # MB of 2**20
EDGES = 1_166_243  # nothing that is saved has a row per edge: both directions, which the paper uses, cost the same
PLANS: dict[str, dict[str, Any]] = {
    "default": {},
    "default, bits=2": {"bits": 2},
    "default, replay=0.4, bits=2": {"replay": 0.4, "bits": 2},
    "default, replay=0.4, bits=4": {"replay": 0.4, "bits": 4},
    "preset exact": {"preset": "exact"},
    "preset iexact-64": {"preset": "iexact-64"},
    "preset smallest": {"preset": "smallest"},
}


@case("accounting", "i-EXACT's published memory column from shapes alone, and our plans counted the same way")
def run(options: Options) -> dict[str, Any]:
    model = modelled()
    rows = [
        [_method(key), f"{value:.2f}", f"{model[key]:.2f}", f"{model[key] - value:+.3f}"]
        for key, value in PUBLISHED.items()
    ]
    header = ["ogbn-arxiv, GraphSAGE, 3 layers of 128", "published", "modelled", "difference"]
    show(options.console, "activation memory, MB of 2**20 bytes", header, rows)

    setting = Setting()
    plans = {name: plan(setting, fields) for name, fields in PLANS.items()}
    rows = [
        [
            name,
            megabytes(p["saved_bytes_before"]),
            megabytes(p["saved_bytes"]),
            f"{p['saved_bytes'] / MB:.2f}",
            f"{p['their_megabytes']:.2f}",
        ]
        for name, p in plans.items()
    ]
    header = ["our plans", "torch.compile, MB", "saved, MB", "saved, MB of 2**20", "+ labels, as published"]
    show(options.console, "the same network, planned by us", header, rows)
    return {
        "settings": asdict(setting) | {"edges": EDGES, "dropout": 0.5},
        "published": {_method(k): v for k, v in PUBLISHED.items()},
        "modelled": {_method(k): v for k, v in model.items()},
        "plans": plans,
        "correct": all(abs(model[key] - value) <= TOLERANCE for key, value in PUBLISHED.items()),
    }


def plan(setting: Setting, fields: dict[str, Any], edges: int = EDGES) -> dict[str, Any]:
    """Bytes that our plan saves for the published network, traced on meta tensors, in both conventions."""
    model = models.build("sage", setting.features, setting.classes, hidden=setting.hidden, layers=setting.layers)
    x = torch.empty(setting.nodes, setting.features, device="meta")
    edge_index = torch.empty(2, edges, dtype=torch.long, device="meta")
    config = actcompile.Config.make(**fields)
    report = actcompile.explain(model, x, edge_index, config=config)
    return {
        "config": fields,
        "saved_bytes_before": report.saved_bytes_before,
        "saved_bytes": report.saved_bytes_after,
        "label_bytes": LABEL * setting.training_nodes,
        "their_megabytes": in_their_convention(report, setting.training_nodes),
    }


def _method(key: str | int) -> str:
    if isinstance(key, str):
        return key
    return "EXACT" if key == 1 else f"i-EXACT, G/R = {key}"
