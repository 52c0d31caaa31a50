"""The rule table: pure, one choice with a reason for every saved activation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from actcompile.kernels.blocks.format import LANES
from actcompile.passes.codecs.codecs import Keep, Narrow, PackBits, Quantize, Recompute
from actcompile.passes.graph.bias import Dependence
from actcompile.passes.graph.find import SavedActivation
from actcompile.passes.plan.formats import block_format, plane_width
from actcompile.passes.plan.plan import plan
from actcompile.passes.plan.policy import Policy

aten = torch.ops.aten


def activation(value: torch.Tensor, target=aten.sin.default, **facts) -> SavedActivation:
    """A saved activation as `find` would list it, with fields changed."""
    graph = fx.Graph()
    node = graph.call_function(target, ([8], 0) if target is aten.full.default else ())
    node.meta["val"] = value
    made = {"module": "", "source": "", "op": str(target), "uses": (), "refusal": None}
    made["nbytes"] = value.numel() * value.dtype.itemsize
    return SavedActivation(node=node, placeholder=graph.placeholder("x"), **{**made, **facts})


def choice(a: SavedActivation, policy: Policy, biased: str | None = None):
    through = None
    if biased:
        through = fx.Graph().call_function(getattr(aten, biased).Tensor)
    dependence = Dependence(through is not None, through) if a.value.is_floating_point() else None
    (made,) = plan([a], {a.placeholder: dependence}, policy).choices
    assert made.reason
    return made


FLOAT, MASK, INDEX = torch.zeros(512, 64), torch.zeros(512, 64, dtype=torch.bool), torch.zeros(8192, dtype=torch.int64)
POLICY = Policy()


@pytest.mark.parametrize(
    ("a", "policy", "biased", "codec", "reason"),
    [
        (activation(FLOAT), POLICY, None, "quantize(2 bits", "unbiased"),
        (activation(FLOAT), POLICY, "div", "quantize(8 bits", "biased through"),
        (activation(FLOAT), Policy(nonlinear_bits=2), "div", "quantize(2 bits", "biased through"),
        (activation(FLOAT), Policy(nonlinear_bits=None), "div", "keep", "kept exact"),
        (activation(FLOAT), Policy(bits=None), None, "keep", "kept exact"),
        (activation(FLOAT), Policy(bits=None), "div", "quantize(8 bits", "biased through"),
        (activation(torch.zeros(8192, 1)), POLICY, "div", "keep", "one number per row"),
        (activation(torch.zeros(8192, 1)), POLICY, None, "keep", "one number per row"),
        (activation(torch.zeros(8192, 8, 1)), POLICY, None, "keep", "one number per row"),  # of heads
        (activation(torch.zeros(8192, 64, 1)), POLICY, None, "quantize(2 bits", "unbiased"),  # of an outer product
        (activation(torch.zeros(8192, 64, 1)), POLICY, "div", "quantize(8 bits", "biased through"),
        (activation(FLOAT, refusal="the model returns it"), POLICY, None, "keep", "the model returns it"),
        (activation(FLOAT[:1]), POLICY, None, "keep", "small"),
        (activation(FLOAT[:1]), Policy(min_bytes=0), None, "quantize(2 bits", "unbiased"),
        (activation(FLOAT), Policy(lossless=False), None, "keep", "configuration"),
        (activation(MASK), Policy(bits=None, nonlinear_bits=None), None, "pack_bits", "one bit"),
        (activation(FLOAT, aten.full.default), Policy(bits=None), None, "recompute", "constant"),
        (activation(INDEX, bound=127), POLICY, None, "narrow(int8)", "below 127"),
        (activation(INDEX, bound=128), POLICY, None, "narrow(int16)", "below 128"),
        (activation(INDEX, bound=2**31), POLICY, None, "keep", "whole range"),
        (activation(INDEX), POLICY, None, "keep", "range is not known"),
        (activation(INDEX.int(), bound=2**20), POLICY, None, "keep", "whole range"),
    ],
)
def test_table(a, policy, biased, codec, reason):
    made = choice(a, policy, biased)
    assert str(made.codec).startswith(codec)
    assert reason in made.reason
    assert made.nbytes <= a.nbytes


@pytest.mark.parametrize("over, reason", [(1, "element by element"), (8, "its variance over 8"), (1024, "over 1024")])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, None])
def test_bias_that_is_averaged_takes_fewer_bits(over, reason, bits):
    a = activation(FLOAT)
    mul = fx.Graph().call_function(aten.mul.Tensor)
    (made,) = plan([a], {a.placeholder: Dependence(True, mul, over)}, Policy(bits=bits, min_bytes=0)).choices
    assert made.codec.format.bits == {1: 8, 8: max(4, bits or 4), 1024: bits or 4}[over]
    assert reason in made.reason


def test_what_would_grow_is_kept():
    made = choice(activation(torch.zeros(2, 4)), Policy(min_bytes=0))
    assert made.codec == Keep() and "not less" in made.reason


def test_free_memory_is_left_alone():
    assert choice(activation(FLOAT, nbytes=0), Policy(min_bytes=0)).codec == Keep()


def test_a_rule_of_the_module_decides():
    policy = Policy(rules=(("convs.0", Policy(bits=8)), ("convs.*", Policy(lossless=False))))
    assert choice(activation(FLOAT, module="convs.0.lin"), policy).codec.format.bits == 8
    assert choice(activation(FLOAT, module="convs.1"), policy).codec == Keep()
    assert choice(activation(FLOAT), policy).codec.format.bits == 2


def test_the_plan_is_in_order_and_pure():
    activations = [
        activation(FLOAT),
        activation(MASK),
        activation(INDEX, bound=9),
        activation(FLOAT, aten.full.default),
    ]
    graphs = [str(a.node.graph) for a in activations]
    made = plan(activations, {}, POLICY)
    assert [c.activation for c in made.choices] == activations
    assert [type(c.codec) for c in made.choices] == [Quantize, PackBits, Narrow, Recompute]
    assert made == plan(activations, {}, POLICY)
    assert [str(a.node.graph) for a in activations] == graphs
    assert made.bytes_before == sum(a.nbytes for a in activations)
    assert made.bytes_after == sum(c.codec.nbytes(c.activation.shape, c.activation.value.dtype) for c in made.choices)


@given(st.integers(1, 5000), st.sampled_from((1, 2, 4, 8)), st.sampled_from((8, 32, 64, 256, 1024, 4096)))
def test_a_fitted_format_is_valid_and_near_the_wish(width, bits, block):
    fmt = block_format(width, bits, block)
    assert fmt.bits == bits
    assert fmt.block <= 6 * max(block, 16 * (32 // bits))  # never so large that the levels get much coarser


@given(st.integers(1, 5000))
def test_planes_do_not_straddle_rows_where_the_width_allows(width):
    words = plane_width(width, 16, 256)
    assert LANES <= words <= 64
    divisors = [d for d in range(LANES, 65) if width % d == 0]
    if width < LANES or divisors:
        assert width % words == 0 or words % width == 0
