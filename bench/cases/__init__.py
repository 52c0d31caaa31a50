"""Every module here registers its cases when it is imported."""

from bench.cases import (
    accounting,
    accuracy,
    blocks,
    copy_speed,
    costmodel,
    distributions,
    gpu,
    gradients,
    levels,
    minibatch,
    models,
    paper,
    peers,
    sage_arxiv,
    scale,
    triton,
)

__all__ = [
    "accounting",
    "accuracy",
    "blocks",
    "copy_speed",
    "costmodel",
    "distributions",
    "gpu",
    "gradients",
    "levels",
    "minibatch",
    "models",
    "paper",
    "peers",
    "sage_arxiv",
    "scale",
    "triton",
]
