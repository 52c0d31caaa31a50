"""Keep the report of a compiled graph where torch keeps the graph itself.

When AOTAutograd's cache has a graph, the partitioner is not called, in a new process too, and with it nobody writes a
report. So the report travels inside the cache entry: it has the entry's key, is written and read with it atomically,
and disappears with it. There is no second store that could be stale.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

_FIELD = "actcompile"


def attach(joint: torch.fx.GraphModule, report: dict[str, Any]) -> None:
    """Has ``report`` saved with what is compiled from ``joint``; for a partitioner, after its own work.

    Args:
        joint: the joint graph module that the partitioner was given, the same object.
        report: anything that JSON can hold.

    Raises:
        TypeError: JSON cannot hold the report.
    """
    # torch 2.13: AOTAutograd reads this attribute after partitioning and saves it in its cache entry, a string that
    # it logs and never interprets. Min-cut puts its own JSON object there: keep that, and add to it.
    info = _read(getattr(joint.graph, "_min_cut_info_str", None))
    joint.graph._min_cut_info_str = json.dumps({**info, _FIELD: report})  # type: ignore[attr-defined]


def attached(compiled: Callable[..., Any]) -> dict[str, Any] | None:
    """The report saved with a graph that came from the cache, or None.

    Args:
        compiled: what ``compile_fx`` returned. Without a report there (a graph for inference, compiled by another
            version of torch, or compiled just now) the answer is None.
    """
    # torch 2.13: aot_module_simplified leaves this function on what it returns; None where nothing is cached.
    serialize = getattr(compiled, "serialize", None)
    if serialize is None:
        return None
    return _read(getattr(serialize(), "min_cut_info_str", None)).get(_FIELD)


def lost(compiled: Callable[..., Any]) -> bool:
    """Whether a graph with a backward comes from a cache that keeps no reports, as that of torch 2.11 does."""
    serialize = getattr(compiled, "serialize", None)
    entry = serialize() if serialize is not None else None
    return getattr(entry, "compiled_bw", None) is not None and not hasattr(entry, "min_cut_info_str")


def _read(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
