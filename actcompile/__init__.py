"""Compress what a model saves for backward, as a pass of `torch.compile`.

model = actcompile.compress(model)
step = torch.compile(model, backend="actcompile", options={"bits": 4})
print(actcompile.explain(model, *inputs))
"""

import torch

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(f"actcompile needs torch 2.11 or newer, found {torch.__version__}: pip install 'torch>=2.11'")

from ._estimate import Estimate, estimate
from .adjacency.inputs import edges_of, traceable
from .api import backend, compress, explain
from .checking.calibrate import calibrate
from .checking.check import check
from .checking.measure import measure
from .checking.report import CheckReport
from .config import Config, exact, iexact, smallest
from .exchange import compress_gradients
from .report import Report
from .report.saved_plan import SavedPlan
from .rules import bits, cast, keep, lossless, low_rank, prune, sample_rows

__all__ = [
    "CheckReport",
    "Config",
    "Estimate",
    "Report",
    "SavedPlan",
    "backend",
    "bits",
    "calibrate",
    "cast",
    "edges_of",
    "check",
    "compress",
    "compress_gradients",
    "estimate",
    "exact",
    "explain",
    "iexact",
    "keep",
    "lossless",
    "low_rank",
    "measure",
    "prune",
    "sample_rows",
    "smallest",
    "traceable",
]
__version__ = "0.1.0"
