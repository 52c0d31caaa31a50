"""Compress what a model saves for backward, as a pass of `torch.compile`.

model = actcompile.compress(model)
step = torch.compile(model, backend="actcompile", options={"bits": 4})
print(actcompile.explain(model, *inputs))
"""

import torch

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(f"actcompile needs torch 2.11 or newer, found {torch.__version__}: pip install 'torch>=2.11'")

from .api import backend, compress, explain
from .config import Config, bits, keep, lossless
from .report import Report

__all__ = ["Config", "Report", "backend", "bits", "compress", "explain", "keep", "lossless"]
__version__ = "0.1.0"
