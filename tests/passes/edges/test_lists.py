"""What the report lists as tensors with a row for each edge is what is allocated, no more and no less."""

import gc
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric import nn as pyg

import actcompile
import actcompile.backend  # noqa: F401  the module; `actcompile.backend` is the function
from actcompile.kernels.edges.group import remembered_nbytes
from actcompile.report import GraphReport
from tests.helpers import EXACT, FAST, step
from tests.passes.edges.layers import FEATURES, WIDTH, build, graph

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


FUSED = ["two SAGE", "GCN", "GAT 2 heads", "EdgeConv", "Transformer edges", "NNConv", "scatter mul", "edge scores"]
PLAIN = ["two SAGE", "SAGE max", "GCN", "GAT 2 heads"]


@pytest.mark.parametrize(("name", "fuse"), [(name, True) for name in FUSED] + [(name, False) for name in PLAIN])
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


def test_a_graph_with_as_many_edges_as_nodes_or_columns(allocated):
    """Sizes tell nothing here."""
    made = []
    for nodes, edges in ((NODES, EDGES), (EDGES, EDGES), (WIDTH, WIDTH)):
        torch._dynamo.reset()
        report = run(build("NNConv")[0], graph(nodes=nodes, edges=edges, takes="attr"))
        made.append({row.name for row in report.edges})
    assert made[0] == made[1] >= made[2] != set()  # of so few edges masks are not packed


def wide_messages():
    """Messages of an MLP whose matrices are too large to be multiplied with edge by edge."""
    torch.manual_seed(0)
    return pyg.EdgeConv(nn.Sequential(nn.Linear(2 * FEATURES, 3000), nn.ReLU(), nn.Linear(3000, WIDTH))).double()


def reasons(report):
    return {row.reason for row in report.edges}


def test_reasons():
    torch._dynamo.reset()
    inputs = graph(nodes=NODES, edges=EDGES)
    fused = run(build("two SAGE")[0], inputs)
    assert reasons(fused) == set() and fused.fused > 0
    plain = run(build("two SAGE")[0], inputs, fuse=False)
    assert "fuse=False" in reasons(plain) and plain.fused == 0
    assert "read by a matrix product (aten.addmm.default)" in reasons(run(wide_messages(), inputs))
    loops = reasons(run(build("GAT")[0], inputs))
    assert "a list of edges that the model makes itself" in loops
    assert "the edges in the order of nodes, for fused message passing" in loops
    product = run(build("scatter mul")[0], graph(nodes=NODES, edges=EDGES, takes="attr"))
    assert any("aten.scatter_reduce.two" in reason for reason in reasons(product))


class Ids(nn.Module):
    """Takes rows of a table by the kinds of nodes, and pools them by graph: one index each, and no edges."""

    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Parameter(torch.randn(7, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, kinds, batch):
        x = self.last(self.table[kinds]).relu()
        return torch.zeros(4, WIDTH).index_add(0, batch, x)


def test_nodes_are_no_edges():
    torch._dynamo.reset()
    made = run(Ids(), (torch.randint(7, (NODES,)), torch.randint(4, (NODES,))))
    assert made.edges == ()


def test_what_is_held_of_edges_is_what_the_rows_say():
    torch._dynamo.reset()
    model, inputs = wide_messages().float(), graph(nodes=NODES, edges=EDGES, dtype=torch.float32)
    made = run(model, inputs, **{**FAST, "bits": 8, "nonlinear_bits": 8})
    held = {row.name: row.held for row in made.edges if row.held}
    assert held and held == {row.name: row.bytes_after for row in made.rows if row.name in held}
    assert any(row.codec.startswith("quantize") for row in made.edges)


def test_groupings_are_counted_while_they_are_remembered():
    torch._dynamo.reset()
    model, _ = build("two SAGE")
    model = actcompile.compress(model, **EXACT)
    inputs = graph(nodes=NODES, edges=EDGES)
    assert actcompile.explain(model, *inputs).graphs[0].remembered == 0
    gc.collect()
    before = remembered_nbytes()
    step(model, inputs, model.parameters())
    report = actcompile.explain(model)
    assert report.graphs[0].remembered == remembered_nbytes() - before > 0
    assert "remembered across steps" in str(report)
    del inputs
    gc.collect()
    assert actcompile.explain(model).graphs[0].remembered == 0


def test_sizes_that_depend_on_data_are_those_of_the_run():
    torch._dynamo.reset()
    model, _ = build("GCN")
    model = actcompile.compress(model, **EXACT)
    for seed in range(2):
        inputs = graph(nodes=NODES, edges=EDGES, seed=seed)
        step(model, inputs, model.parameters())
        others = int((inputs[1][0] != inputs[1][1]).sum())
        (made,) = actcompile.explain(model).graphs
        order = next(row for row in made.edges if "order of nodes" in row.reason)
        assert order.nbytes == 4 * (others + NODES)


class Typed(nn.Module):
    """Nodes of two types each, which are looked up in tables as large as each other, normed by graph, twice."""

    def __init__(self):
        super().__init__()
        self.types = nn.ModuleList(nn.Embedding(5, WIDTH) for _ in range(2))
        self.layers = nn.ModuleList(pyg.SAGEConv(WIDTH, WIDTH) for _ in range(2))
        self.norms = nn.ModuleList(pyg.GraphNorm(WIDTH) for _ in range(2))

    def forward(self, types, edge_index):
        x = sum(table.weight[types[:, i]] for i, table in enumerate(self.types))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x, edge_index)).tanh()
        return x


def test_types_and_graphs_of_nodes_are_no_ends_of_edges():
    torch._dynamo.reset()
    types, edge_index = torch.randint(5, (NODES, 2)), torch.randint(NODES, (2, EDGES))
    rows = actcompile.explain(Typed(), types, edge_index, options=FAST).graphs[0].edges
    assert {row.shape[0] for row in rows} <= {str(EDGES)} and not [row for row in rows if row.shape[1:]]
