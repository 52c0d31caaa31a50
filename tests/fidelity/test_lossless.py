"""Lossless codecs: the gradients are those of the same compiler without us, to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import actcompile
from tests.fidelity.measure import compressed, gradients, uncompressed
from tests.fidelity.stacks import LAYERS, build, examples, specs
from tests.helpers import quickly


def assert_same(ours, reference):
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize("layer", quickly(LAYERS, ["gcn plain", "gatv2"]))
@examples(1)
@given(data=st.data())
def test_gradients_are_bit_equal(layer, data):
    torch.compiler.reset()
    spec = data.draw(specs(first=[layer]))
    model, *arguments = build(spec)
    ours, reference = compressed(model, fuse=False), uncompressed(model)
    for step in range(2):  # the second one with other running statistics, and other random numbers
        torch.manual_seed(step)
        expected = gradients(reference, *arguments)
        torch.manual_seed(step)
        assert_same(gradients(ours, *arguments), expected)
    for (name, ours_now), reference_now in zip(ours.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(ours_now, reference_now), name
    codecs = {row.codec for g in actcompile.explain(ours).graphs for row in g.rows}
    assert codecs & {"pack_bits", "recompute"} and not any(c.startswith("quantize") for c in codecs)
