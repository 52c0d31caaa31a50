"""PyG's own NeighborLoader on machines without pyg-lib or torch-sparse, by a neighbour sampler in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch_geometric.typing
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.loader import NeighborLoader
from torch_geometric.sampler import BaseSampler, EdgeSamplerInput, NodeSamplerInput, SamplerOutput


def sampler_in_use() -> str:
    """Which sampler `neighbor_loader` hands to PyG here."""
    if torch_geometric.typing.WITH_PYG_LIB:
        return "pyg-lib"
    if torch_geometric.typing.WITH_TORCH_SPARSE:
        return "torch-sparse"
    return "plain torch, for want of pyg-lib and torch-sparse"


def neighbor_loader(data: Data, num_neighbors: Sequence[int], **options: Any) -> NeighborLoader:
    """A NeighborLoader; options are its own (batch_size, input_nodes, shuffle, ...)."""
    sampler = None
    if not (torch_geometric.typing.WITH_PYG_LIB or torch_geometric.typing.WITH_TORCH_SPARSE):
        sampler = TorchNeighborSampler(data.edge_index, data.num_nodes, num_neighbors)
    return NeighborLoader(data, list(num_neighbors), neighbor_sampler=sampler, **options)


class TorchNeighborSampler(BaseSampler):
    """Uniform sampling of in-neighbours without replacement, hop by hop, as pyg-lib's directional sampling does.

    edge_index: [2, edges]; num_neighbors: at most how many per node and hop, -1 for all. Draws from torch's default
    generator.
    """

    def __init__(self, edge_index: Tensor, nodes: int, num_neighbors: Sequence[int]) -> None:
        self.num_neighbors = list(num_neighbors)
        self.nodes = nodes
        self.permutation = torch.argsort(edge_index[1], stable=True)
        self.sources = edge_index[0][self.permutation]
        self.degrees = torch.bincount(edge_index[1], minlength=nodes)
        self.starts = self.degrees.cumsum(0) - self.degrees

    def sample_from_nodes(self, index: NodeSamplerInput, **_: Any) -> SamplerOutput:
        local = torch.full((self.nodes,), -1)
        node = index.node
        local[node] = torch.arange(node.numel())
        frontier, rows, columns, edges = node, [], [], []
        hop_nodes, hop_edges = [node.numel()], []
        for limit in self.num_neighbors:
            owner, position = self._choose(frontier, limit)
            source = self.sources[position]
            found = source[local[source] < 0].unique()
            local[found] = node.numel() + torch.arange(found.numel())
            node = torch.cat([node, found])
            rows.append(local[source])
            columns.append(local[owner])
            edges.append(position)
            hop_nodes.append(found.numel())
            hop_edges.append(position.numel())
            frontier = found
        return SamplerOutput(
            node=node,
            row=torch.cat(rows),
            col=torch.cat(columns),
            edge=torch.cat(edges),
            num_sampled_nodes=hop_nodes,
            num_sampled_edges=hop_edges,
            metadata=(index.input_id, index.time),
        )

    def sample_from_edges(self, index: EdgeSamplerInput, *_: Any, **__: Any) -> SamplerOutput:
        raise NotImplementedError("this sampler starts from nodes only; install pyg-lib to sample from edges")

    def _choose(self, frontier: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """For each node of the frontier, up to `limit` positions of its in-edges: (node, position), [chosen] each."""
        counts = self.degrees[frontier]
        first = counts.cumsum(0) - counts
        slot = torch.repeat_interleave(torch.arange(frontier.numel()), counts)
        position = torch.arange(slot.numel()) - first[slot] + self.starts[frontier][slot]
        if limit >= 0:
            # All edges in random order, brought back to their nodes by a stable sort: the first `limit` of each.
            shuffled = torch.randperm(slot.numel())
            order = shuffled[torch.argsort(slot[shuffled], stable=True)]
            order = order[torch.arange(slot.numel()) - first[slot] < limit]
            slot, position = slot[order], position[order]
        return frontier[slot], position

    @property
    def edge_permutation(self) -> Tensor:
        return self.permutation
