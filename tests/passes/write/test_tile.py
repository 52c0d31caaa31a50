"""What is made for sums over rows alone is made by tiles; gradients are those of before."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from actcompile import compress, explain
from actcompile.passes.write import accumulate, tile
from tests.helpers import FAST, assert_close, gnn, graph, quickly, step

NODES = 1300  # two tiles of 512 rows, and a part of one


@pytest.fixture
def tiles(monkeypatch):
    """Has tiles made of small tensors, too."""
    monkeypatch.setattr(tile, "TILE", 1 << 10)
    monkeypatch.setattr(accumulate, "LEAST", 1 << 10)


def gradients(make, inputs, **options):
    model = make()
    run = compress(model, **{**FAST, **options})
    return step(run, inputs, model.parameters()), explain(model).graphs[0]


def ops_of(made):
    return [node.op for node in made.backward_nodes]


class Square(nn.Module):
    """Linear layers of equal width, whose gradients may be written over each other, with a residual."""

    def __init__(self, norm):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.norms = nn.ModuleList(norm() for _ in range(3))

    def forward(self, x, edge_index):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + F.dropout(F.elu(norm(layer(x))), 0.5)
        return x


MODELS = {
    **{name: lambda name=name: gnn(name, layers=3) for name in ("sage", "sage_max", "gcn", "gin", "gat", "edge_mlp")},
    "square": lambda: Square(lambda: nn.BatchNorm1d(32)),
    "square, LayerNorm": lambda: Square(lambda: nn.LayerNorm(32)),
}


CASES = [*((name, {}) for name in MODELS), ("sage", {"replay": 0}), ("sage", {"bits": 8, "rebuild": False})]


def compare(name, options, request, within, **tiled_options):
    def make():
        torch.manual_seed(0)
        return MODELS[name]()

    x, edge_index = graph(NODES, 4000, 32 if "square" in name else 16)
    whole, before = gradients(make, (x, edge_index), **options)
    request.getfixturevalue("tiles")
    torch._dynamo.reset()
    tiled, after = gradients(make, (x, edge_index), **{**options, **tiled_options})
    largest = max(gradient.norm() for gradient in whole)
    some = [i for i, gradient in enumerate(whole) if gradient.norm() > 1e-4 * largest]  # a bias before a norm has none
    assert_close([tiled[i] for i in some], [whole[i] for i in some], within)
    assert "actcompile.row_sums.default" not in ops_of(before)
    return ops_of(after)


@pytest.mark.parametrize(
    ("name", "options"), quickly(CASES, [(name, {}) for name in ("sage", "gcn", "edge_mlp")]), ids=str
)
def test_gradients_are_those_of_whole_tensors(name, options, request):
    assert "actcompile.row_sums.default" in compare(name, {"bits": 2, **options}, request, within=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sage", "gin", "square"])
def test_inductor_writes_over_nothing_that_is_read(name, request):
    assert "auto_functionalized" in compare(name, {}, request, within=1e-2, inner="inductor")  # codes flip


def test_backward_runs_twice(tiles):
    torch.manual_seed(0)
    model = MODELS["square"]()
    x, edge_index = graph(NODES, 4000, 32)
    out = compress(model, **FAST)(x, edge_index).sum()
    first, second = (torch.autograd.grad(out, [*model.parameters()], retain_graph=True) for _ in range(2))
    assert_close(second, first, within=1e-5)


@pytest.mark.usefixtures("tiles")
def test_what_weights_read_is_not_made_as_a_whole():
    x, edge_index = graph(NODES, 4000)
    _, made = gradients(lambda: gnn("sage", layers=3, norm=False), (x, edge_index), replay=0)
    assert not [op for op in ops_of(made) if "dequantize" in op]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", ["sage", "gin"])
def test_pointwise_ops_of_a_tile_are_one_loop(name, monkeypatch):
    programs = []
    monkeypatch.setattr(tile.Tiled, "dump", lambda self, dump=tile.Tiled.dump: programs.append(self) or dump(self))
    gradients(MODELS[name], graph(NODES, 4000))
    called = [step.op for program in programs for step in program.steps]
    assert "loop" in called
    assert not [
        op for op in called if op.startswith("aten") and not op.startswith(("aten.view", "aten.mm", "aten.addmm"))
    ]
