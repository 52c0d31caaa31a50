"""A broken rewrite is an error that says what broke."""

import pytest
import torch
from torch import fx

from actcompile.passes.graph.split import is_size, is_tensor
from actcompile.passes.write.verify import InvariantError, verify
from tests.helpers import FAST, count, every_pass, uncompressed

ops = torch.ops.actcompile


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


torch.manual_seed(0)
X, W, V = torch.randn(64, 16), torch.randn(16, 32, requires_grad=True), torch.randn(32, 4, requires_grad=True)


def two_outputs(x, w, v):
    h = (x @ w).sin().exp() @ v
    return h, h.relu().sum()


def calls(gm: fx.GraphModule, target) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=target)


def verified(spoil) -> None:
    """Rewrites a real split, spoils it, and verifies it."""
    errors = []

    def transform(split):
        outputs = list(split.user_outputs)
        gradients = len(split.backward.graph.output_node().args[0])
        plan = every_pass(split, **FAST)
        split.finish()
        spoil(split)
        try:
            verify(split, plan, outputs, gradients)
        except (InvariantError, RuntimeError) as error:
            errors.append(error)
        raise StopIteration("the spoilt graphs must not run")

    with pytest.raises(Exception, match="must not run"):
        uncompressed(two_outputs, transform, dynamic=True)(X, W, V)
    if errors:
        raise errors[0]


def test_a_sound_rewrite_passes():
    verified(lambda split: None)


def drop_output(split):
    returned = list(split.output.args[0])
    split.output.args = ((*returned[1:],),)


def swap_outputs(split):
    returned = list(split.output.args[0])
    returned[0], returned[1] = returned[1], returned[0]
    split.output.args = (tuple(returned),)


def drop_gradient(split):
    output = split.backward.graph.output_node()
    output.args = (tuple(output.args[0][:-1]),)


def swap_saved(split):
    returned = list(split.output.args[0])
    i, j = [i for i, n in enumerate(returned) if is_tensor(n) and n in dict(split.pairs)][:2]
    returned[i], returned[j] = returned[j], returned[i]
    split.output.args = (tuple(returned),)


def save_once_more(split):
    split.output.args = ((*split.output.args[0], split.pairs[-1][0]),)


def size_first(split):
    returned = list(split.output.args[0])
    start = len(split.user_outputs)
    split.output.args = ((*returned[:start], returned[-1], *returned[start:-1]),)
    assert is_size(returned[-1])


def save_uncompressed(split):
    node = calls(split.forward, ops.quantize.default)[0].args[0]
    placeholder = split.save(node, "again")
    split.finish()
    assert placeholder in split.backward.graph.nodes


def forbidden_name(split):
    node, placeholder = next((n, p) for n, p in split.pairs if is_tensor(n))
    placeholder.name = "tangents_9"
    split.finish()


def other_dtype(split):
    node, placeholder = next((n, p) for n, p in split.pairs if is_tensor(n))
    placeholder.meta["val"] = placeholder.meta["val"].to(torch.float64)


def same_bits(split):
    first, second = calls(split.forward, ops.quantize.default)[:2]
    second.update_arg(2, first.args[2])


def other_bits(split):
    node = calls(split.backward, ops.dequantize.default)[0]
    node.update_arg(5, 4 if node.args[5] == 2 else 2)


def other_levels(split):
    calls(split.forward, ops.quantize.default)[0].update_arg(5, "uniform")


def quantise_twice(split):
    node = calls(split.forward, ops.quantize.default)[0]
    with split.forward.graph.inserting_after(node):
        split.forward.graph.call_function(node.target, (node.args[0], node.args[1], 77, *node.args[3:]))


def use_before_definition(split):
    node = calls(split.forward, ops.quantize.default)[0]
    node.args[0].append(node)
    next(iter(split.forward.graph.nodes)).prepend(node)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_output, "the user's outputs changed"),
        (swap_outputs, "the user's outputs changed"),
        (drop_gradient, "the number of gradients changed"),
        (swap_saved, "tensors come in another order"),
        (save_once_more, "forward saves another number|sizes are not the last"),
        (size_first, "sizes are not the last"),
        (save_uncompressed, "a compressed activation is saved all the same"),
        (forbidden_name, "a name that torch reads"),
        (other_dtype, "backward takes another tensor than was saved"),
        (same_bits, "two activations share random bits"),
        (other_bits, "formats of the plan and of backward differ"),
        (other_levels, "formats of the plan and of forward differ"),
        (quantise_twice, "formats of the plan and of forward differ"),
        (use_before_definition, "used before it has been defined"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_rewrite_is_an_error(spoil, message):
    with pytest.raises((InvariantError, RuntimeError), match=message):
        verified(spoil)


def test_the_message_asks_for_a_report():
    with pytest.raises(InvariantError, match="actcompile: .*; the graphs were not compiled"):
        verified(same_bits)


def test_what_is_verified_has_something_to_verify():
    def note(split):
        every_pass(split, **FAST)
        assert count(split.forward, "quantize.") >= 2
        assert any(is_size(n) for n, _ in split.pairs)

    uncompressed(two_outputs, note, dynamic=True)(X, W, V)
