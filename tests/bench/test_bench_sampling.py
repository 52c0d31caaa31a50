"""The plain-torch sampler gives PyG's NeighborLoader what pyg-lib would: real edges, bounded, seeds first."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.loader import NeighborLoader

from actcompile.datasets import generated
from bench.sampling import TorchNeighborSampler


def _loader(data: Data, fanout: list[int], **options: object) -> NeighborLoader:
    sampler = TorchNeighborSampler(data.edge_index, data.num_nodes, fanout)
    return NeighborLoader(data, fanout, neighbor_sampler=sampler, **options)


@pytest.fixture(scope="module")
def data() -> Data:
    return generated(200, 1500, 6, 4, seed=1).to_data()


@pytest.mark.parametrize("fanout", [[3], [5, 2], [-1, 4], [4, 3, 2]])
def test_batches_are_subgraphs_with_bounded_degrees(data: Data, fanout: list[int]) -> None:
    torch.manual_seed(0)
    edges = set(map(tuple, data.edge_index.t().tolist()))
    degrees = torch.bincount(data.edge_index[1], minlength=200)
    seen = 0
    for batch in _loader(data, fanout, batch_size=16, shuffle=True):
        assert torch.equal(batch.n_id[: batch.batch_size], batch.input_id)
        assert batch.n_id.unique().numel() == batch.n_id.numel()
        assert torch.equal(batch.x, data.x[batch.n_id]) and torch.equal(batch.y, data.y[batch.n_id])
        pairs = [tuple(p) for p in batch.n_id[batch.edge_index].t().tolist()]
        assert set(pairs) <= edges and len(set(pairs)) == len(pairs)
        assert torch.equal(data.edge_index[:, batch.e_id], batch.n_id[batch.edge_index])
        got = torch.bincount(batch.edge_index[1], minlength=batch.num_nodes)[: batch.batch_size]
        wanted = degrees[batch.input_id]
        assert torch.equal(got, wanted if fanout[0] < 0 else wanted.clamp_max(fanout[0]))
        assert got.max() <= degrees.max()
        assert sum(batch.num_sampled_nodes) == batch.num_nodes and sum(batch.num_sampled_edges) == batch.num_edges
        seen += batch.batch_size
    assert seen == 200


def test_every_neighbour_is_drawn_equally_often() -> None:
    data = Data(x=torch.zeros(11, 1), edge_index=torch.stack([torch.arange(1, 11), torch.zeros(10, dtype=torch.long)]))
    torch.manual_seed(0)
    sampler = TorchNeighborSampler(data.edge_index, 11, [3])
    loader = NeighborLoader(data, [3], neighbor_sampler=sampler, input_nodes=torch.tensor([0]))
    draws = 2_000
    counts = torch.zeros(11)
    for _ in range(draws):
        counts[next(iter(loader)).n_id[1:]] += 1
    assert counts.sum() == 3 * draws
    spread = (draws * 0.3 * 0.7) ** 0.5
    assert ((counts[1:] - 0.3 * draws).abs() < 5 * spread).all()  # false alarms: below 1 in 10**5
