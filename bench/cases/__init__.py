"""Every module here registers its cases when it is imported."""

from bench.cases import accuracy, minibatch, sage_arxiv

__all__ = ["accuracy", "minibatch", "sage_arxiv"]
