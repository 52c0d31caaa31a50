"""Where rounding biases a gradient: the report says so, the error falls with the bits, and what must be exact is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fidelity.measure import compressed, flat, gradients, rounded, truth, uncompressed
from tests.fidelity.stacks import Spec, build, examples, specs
from tests.helpers import quickly

BITS = (2, 4, 8)


@pytest.mark.parametrize(
    ("layer", "norm", "activation", "through"),
    [
        ("sage", "batch", "relu", "aten.mul.Tensor"),
        ("gin", "layer", "relu", "aten.relu.default"),
        ("gin", "none", "gelu", "aten.erf.default"),
        ("gin", "none", "elu", "aten.expm1.default"),
    ],
)
def test_biased_activations_are_reported_and_their_error_falls_with_the_bits(layer, norm, activation, through):
    """With 8 bits an element is off by a step at most, a 255th of its block's range, and by half of that in the root
    mean square at most: 1 % of a standard deviation, for blocks that span six. Gradients, as sums, must be closer."""
    model, *arguments = build(Spec((layer, layer), activation, norm, nodes=60, edges=150, width=16))
    exact = flat(truth(model, *arguments))
    error = {}
    for bits in BITS:
        torch.compiler.reset()
        ours = compressed(model, nonlinear_bits=bits)
        drawn = []
        for seed in range(5):
            torch.manual_seed(seed)
            drawn.append(flat(gradients(ours, *arguments)))
        error[bits] = float((torch.stack(drawn) - exact).square().mean().sqrt() / exact.square().mean().sqrt())
        found = rounded(ours)
        assert found and all(row.biased and f"quantize({bits} bits" in row.codec for row in found)
        assert through in {row.through for row in found}
    assert error[8] < 0.01
    assert error[8] < error[4] / 4 < error[2] / 8


LINEAR = ("sage", "gcn plain", "gin", "max min", "edge mlp")  # their gradient by their input sees only masks


@examples(3)
@given(
    spec=specs(last=LINEAR, activations=["relu"], norms=["batch"], dropouts=("none", "fixed")),
    bits=st.sampled_from((1, 2)),
)
def test_relu_masks_are_exact_behind_a_rounded_batch_norm(spec, bits):
    """The gradient of BatchNorm's bias is a sum over ReLU's mask, and nothing else that is rounded reaches it."""
    torch.compiler.reset()
    model, *arguments = build(spec)
    ours = compressed(model, bits=bits, nonlinear_bits=bits)
    found, exact = gradients(ours, *arguments), gradients(uncompressed(model), *arguments)
    assert any(row.biased for row in rounded(ours))
    assert torch.equal(found["norms.0.bias"], exact["norms.0.bias"])
    assert not torch.equal(found["norms.0.weight"], exact["norms.0.weight"])


@pytest.mark.parametrize("layer", quickly(["sage", "gin", "gat"], ["gin"]))
@examples(1)
@given(data=st.data())
def test_non_finite_activations_reach_the_gradients(layer, data):
    """Wherever the uncompressed model has NaN or infinity in a gradient, the compressed one has."""
    torch.compiler.reset()
    spec = data.draw(specs(first=[layer], dropouts=("none", "fixed")))
    model, x, edges, gradient = build(spec)
    ours, reference = compressed(model, bits=2, nonlinear_bits=8), uncompressed(model)
    for value in (float("nan"), float("inf"), -float("inf")):
        poisoned = x.clone()
        poisoned[data.draw(st.integers(0, spec.nodes - 1)), data.draw(st.integers(0, spec.width - 1))] = value
        found, expected = (flat(gradients(m, poisoned, edges, gradient)) for m in (ours, reference))
        assert not expected.isfinite().all()
        assert not found[~expected.isfinite()].isfinite().any()
    assert rounded(ours)
    assert flat(gradients(ours, x, edges, gradient)).isfinite().all()
