"""Sums of products, new and in place, against torch's own."""

import pytest
import torch

from actcompile.kernels.rows import products as file

ops = torch.ops.actcompile


@pytest.fixture(params=[1, 64, 1 << 18])
def _tiles(request, monkeypatch):
    monkeypatch.setattr(file, "TILE", request.param)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("nodes", [0, 1, 17])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("more", [0, 2])
def test_products_add_up(nodes, with_bias, more):
    torch.manual_seed(0)
    left = [torch.randn(nodes, 8, dtype=torch.float64) for _ in range(more + 1)]
    right = [torch.randn(8, 8, dtype=torch.float64).T for _ in left]
    bias = torch.randn(8, dtype=torch.float64) if with_bias else None
    expected = sum(a @ b for a, b in zip(left, right, strict=True)) + (0 if bias is None else bias)
    torch.testing.assert_close(ops.products(bias, left, right), expected)
    into = left[0].clone()
    ops.products_(into, right[0], bias, left[1:], right[1:])
    torch.testing.assert_close(into, expected)


def test_the_ops_are_some_of_torchs():
    a, b, c = torch.randn(6, 4), torch.randn(4, 4), torch.randn(4)
    torch.library.opcheck(ops.products.default, (c, [a, a], [b, b]))
    torch.library.opcheck(ops.products_.default, (a.clone(), b, None, [a], [b]))
