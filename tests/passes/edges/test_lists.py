"""What the report lists as tensors with a row for each edge is what is allocated, no more and no less."""

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import actcompile
import actcompile.backend  # noqa: F401  the module; `actcompile.backend` is the function
from actcompile.report import GraphReport
from tests.helpers import EXACT, step
from tests.passes.edges.layers import build, graph

ops = torch.ops.actcompile
TORCH = sys.modules["actcompile.backend"]._torch
ENCODERS = (ops.narrow.default, ops.pack_bits.default, ops.quantize.default, ops.copy.default)
NODES, EDGES = 53, 211


class Allocated(TorchDispatchMode):
    """Counts tensors by shape and dtype as ops make them; views and what is saved encoded left out."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        if func not in ENCODERS:
            for t in tensors(out):
                if t.dim() and t.untyped_storage().data_ptr() not in given:
                    self.made[tuple(t.shape), str(t.dtype)[6:]] += 1
        return out


def tensors(value):
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


@pytest.fixture
def allocated(monkeypatch):
    """What the compiled graphs allocate, run op by op."""
    recorder, plain = Allocated(), TORCH.boxed_nop

    def recording(module, inputs):
        run = plain(module, inputs)

        def recorded(args):
            with recorder:
                return run(args)

        return TORCH.make_boxed_func(lambda *args: recorded(list(args)))

    monkeypatch.setattr(TORCH, "boxed_nop", recording)
    torch._dynamo.reset()
    return recorder.made


def run(model, inputs, **options):
    """A step, and the report of its only graph."""
    model = actcompile.compress(model, **{**EXACT, **options})
    step(model, inputs, model.parameters())
    (made,) = actcompile.explain(model).graphs
    return made


def listed(report: GraphReport):
    sizes = {name: str(size) for name, size in report.sizes.items()}
    shapes = ([str(eval(s, {k: int(v) for k, v in sizes.items()})) for s in row.shape] for row in report.edges)
    return Counter((tuple(map(int, shape)), row.dtype) for shape, row in zip(shapes, report.edges, strict=True))


def lengths(edge_index):
    """The numbers of edges, of those that are no loops, and of those with a loop at every node."""
    others = int((edge_index[0] != edge_index[1]).sum())
    return {edge_index.shape[1], others, others + NODES}


LISTED = ["two SAGE", "SAGE max", "GCN", "GCN weighted", "two GAT", "GAT 2 heads", "GINE", "EdgeConv", "own gate"]
LISTED += ["Transformer edges", "NNConv", "PNA", "segment", "scatter mul", "edge scores"]


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", LISTED)
def test_what_is_listed_is_what_is_allocated(name, fuse, allocated):
    model, takes = build(name)
    inputs = graph(nodes=NODES, edges=EDGES, takes=takes)
    report = run(model, inputs, fuse=fuse)
    known = lengths(inputs[1])
    expected = {key: number for key, number in allocated.items() if known & set(key[0])}
    found = listed(report)
    loops = {key: number for key, number in found.items() if not known & set(key[0])}
    assert {key: n for key, n in found.items() if key not in loops} == expected
    assert all(NODES in shape for shape, _ in loops)  # parts of a list of edges: the loops that were added
