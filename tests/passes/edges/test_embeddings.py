"""Rows of tables that are looked up for every edge are in no memory, and the tables' gradients are eager's."""

import pytest
import torch
from torch import nn
from torch_geometric import nn as pyg

from tests.passes.edges.layers import WIDTH, mlp
from tests.passes.edges.test_edges import called, check, graphs, wide  # noqa: F401  a fixture

# ruff: noqa: F811  the fixture

ATOMS, BONDS = 5, 4
aten = torch.ops.aten
OF_ITS_OWN = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)  # before, the gradient is any sum by index
LOOKUPS = (aten.embedding.default, aten._unsafe_masked_index_put_accumulate.default)


class Molecules(nn.Module):
    """Two GINE layers on embedded atoms and bonds, whose tables are summed up as OGB's encoders do."""

    def __init__(self, shared=False, **options):
        super().__init__()
        self.atoms = nn.Embedding(ATOMS, WIDTH)
        tables = [nn.ModuleList(nn.Embedding(BONDS, WIDTH, **options) for _ in range(2)) for _ in range(2)]
        self.bonds = nn.ModuleList([tables[0], tables[0] if shared else tables[1]])
        self.layers = nn.ModuleList(pyg.GINEConv(mlp(WIDTH)) for _ in range(2))

    def forward(self, atoms, edge_index, bonds):
        x = self.atoms(atoms)
        for layer, tables in zip(self.layers, self.bonds, strict=True):
            x = x + layer(x, edge_index, sum(table(bonds[:, i]) for i, table in enumerate(tables))).tanh()
        return x


def molecules(nodes=29, edges=70, dtype=torch.int64):
    return (
        torch.randint(ATOMS, (nodes,), dtype=dtype),
        torch.randint(nodes, (2, edges)),
        torch.randint(BONDS, (edges, 2), dtype=dtype),
    )


@pytest.mark.parametrize("edges", [70, 29, 1, 0])
@pytest.mark.parametrize("options", [{}, {"shared": True}, {"padding_idx": 1}], ids=str)
def test_embedded_bonds_are_taken_inside_of_regions(options, edges, graphs):
    torch.manual_seed(0)
    check(Molecules(**options).double(), molecules(edges=edges))
    if edges == 70:  # rows of edges are told from rows of nodes by their number
        assert len(called(graphs, *LOOKUPS)) == 1 + OF_ITS_OWN  # of atoms
        assert wide(graphs, edges, 1) == []


def test_indices_may_be_int32(graphs):
    torch.manual_seed(0)
    check(Molecules().double(), molecules(dtype=torch.int32))
    assert wide(graphs, 70, 1) == []


def test_gradients_may_be_scaled_by_frequency(graphs):
    torch.manual_seed(0)
    check(Molecules(scale_grad_by_freq=True).double(), molecules())


def test_embeddings_without_message_passing_are_left_to_torch(graphs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)).double()
    check(model, [torch.randint(7, (40,))])
    assert called(graphs, aten.embedding.default) or not OF_ITS_OWN
