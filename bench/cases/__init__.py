"""Every module here registers its cases when it is imported."""

from bench.cases import accuracy, copy_speed, levels, minibatch, sage_arxiv, triton

__all__ = ["accuracy", "copy_speed", "levels", "minibatch", "sage_arxiv", "triton"]
