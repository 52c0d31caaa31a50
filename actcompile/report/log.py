"""Logging: `logging.getLogger("actcompile")`, so `TORCH_LOGS="+actcompile"` works, and trace artefacts."""

import json
import logging
from dataclasses import asdict

from actcompile.passes.graph import _torch

from .data import GraphReport

logger = logging.getLogger("actcompile")


def graph(report: GraphReport) -> None:
    """Logs one rewritten graph: a line at INFO, a line per activation and both graphs' code at DEBUG."""
    logger.info("saved activations: %d -> %d bytes", report.bytes_before, report.bytes_after)
    if logger.isEnabledFor(logging.DEBUG):
        for row in report.rows:
            logger.debug("%s [%s]: %s, %d -> %d bytes: %s", row.name, row.module, row.codec, row.bytes_before,
                         row.bytes_after, row.reason)  # fmt: skip
        logger.debug("forward:\n%s", report.forward)
        logger.debug("backward:\n%s", report.backward)
    _torch.trace_artefact("actcompile_plan", "json", lambda: json.dumps([asdict(row) for row in report.rows]))
    _torch.trace_artefact("actcompile_forward", "string", lambda: report.forward)
    _torch.trace_artefact("actcompile_backward", "string", lambda: report.backward)
