"""Equal sizes that depend on data share a symbol, others do not; bounds are those of the trace."""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch.partitioners import min_cut_rematerialization_partition

from actcompile.passes.graph import _torch
from actcompile.passes.graph.sizes import sizes
from actcompile.tracing.capture import whole_graphs

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def joint_sizes(function, *inputs, dynamic=None):
    """The symbols that depend on data in the joint graph after `sizes`, with their hints; one graph is required."""
    found = []

    def partition(joint, joint_inputs, **options):
        sizes(joint.graph)
        values = [n.meta.get("val") for n in joint.graph.nodes]
        shapes = [size for v in values if isinstance(v, torch.Tensor) for size in v.shape]
        symbols = _torch.symbols(shapes).items()
        found.append({name: _torch.size_hint(s) for name, s in symbols if _torch.is_unbacked(s)})
        return min_cut_rematerialization_partition(joint, joint_inputs, **options)

    backend = whole_graphs(aot_autograd(fw_compiler=boxed_nop, bw_compiler=boxed_nop, partition_fn=partition))
    torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    (only,) = found
    return only


def layers(select):
    """Two layers that each select rows and add them up, and their input."""
    first, last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(x, e):
        for layer in (first, last):
            rows = select(e)
            x = x.index_add(0, rows, layer(x)[rows])
        return x

    return forward, torch.randn(20, 8, requires_grad=True), torch.randint(0, 20, (50,))


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_same_mask_of_the_same_edges_has_one_size(dynamic):
    (most,) = joint_sizes(*layers(lambda e: e[e > 3]), dynamic=dynamic).values()
    assert most == 50


def test_random_masks_have_sizes_of_their_own():
    found = joint_sizes(*layers(lambda e: e[torch.rand(50) > 0.5]))
    assert list(found.values()) == [50, 50]


def test_other_masks_have_sizes_of_their_own():
    calls = iter(range(10))
    found = joint_sizes(*layers(lambda e: e[e > 3 + next(calls)]))
    assert len(found) == 2


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "select", [lambda e: (e > 3).nonzero()[:, 0] % 20, torch.unique, lambda e: e.masked_select(e > 3)]
)
def test_what_selects_is_bounded_by_what_it_selects_from(select, dynamic):
    (most,) = joint_sizes(*layers(select), dynamic=dynamic).values()
    assert most in (20, 50)
