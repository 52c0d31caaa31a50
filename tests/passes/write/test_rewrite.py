"""Which ops are inserted, how many and where, and that lossless ones change no gradient."""

import pytest
import torch
from torch import fx
from torch._dynamo import config as dynamo_config

from actcompile.passes.codecs.codecs import Keep, Narrow, PackBits, Quantize, Recompute
from actcompile.passes.graph.split import is_size, is_tensor, is_view
from tests.helpers import EXACT, FAST, Mlp, assert_close, count, every_pass, gnn, graph, ops, step, uncompressed

NAMES = ("draw_seed", "quantize", "pack_bits", "narrow", "dequantize", "unpack_bits", "widen")
torch.manual_seed(0)
X, W, V = torch.randn(64, 16), torch.randn(16, 32, requires_grad=True), torch.randn(32, 4, requires_grad=True)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def rewritten(function, *inputs, dynamic=None, **options):
    """The split after every pass, the plan, and the ops of both graphs before."""
    made = []

    def note(split):
        before = ops(split.forward), ops(split.backward)
        made.extend((split, every_pass(split, **{**FAST, **options}), before))

    uncompressed(function, note, dynamic=dynamic)(*inputs)
    return made


def number_of(gm: fx.GraphModule) -> dict[str, int]:
    return {name: count(gm, f"actcompile.{name}.") for name in NAMES if count(gm, f"actcompile.{name}.")}


def test_one_encoding_and_one_decoding_for_each_choice():
    split, plan, (forward, backward) = rewritten(gnn(layers=3, dropout=0.0), *graph())
    kinds = [type(c.codec) for c in plan.choices]
    quantised, packed = kinds.count(Quantize), kinds.count(PackBits)
    assert quantised >= 5 and packed == 2
    assert not any("actcompile" in op for op in (*forward, *backward))
    assert number_of(split.forward) == {"draw_seed": 1, "quantize": quantised, "pack_bits": packed}
    assert number_of(split.backward) == {"dequantize": quantised, "unpack_bits": packed}
    assert kinds.count(Recompute) == 1
    assert count(split.backward, "aten.full.") == sum("aten.full." in op for op in backward) + 1


def test_lossless_draws_no_seed():
    split, plan, _ = rewritten(gnn(dropout=0.0), *graph(), **EXACT)
    assert {type(c.codec) for c in plan.choices} == {Keep, Recompute, PackBits}
    assert number_of(split.forward) == {"pack_bits": 1}
    assert number_of(split.backward) == {"unpack_bits": 1}


def test_each_activation_has_its_own_row_of_seeds():
    split, plan, _ = rewritten(gnn(layers=3), *graph())
    dropped, seed = split.forward.graph.find_nodes(op="call_function", target=torch.ops.actcompile.draw_seed.default)
    nodes = split.forward.graph.find_nodes(op="call_function", target=torch.ops.actcompile.quantize.default)
    assert sorted(n.args[2] for n in nodes) == list(range(len(nodes)))
    assert seed.args[0] == len(nodes) and seed.meta["val"].shape == (len(nodes), 2)
    assert all(n.args[1] is seed for n in nodes)
    assert dropped.args[0] == count(split.forward, "random_mask") == 2


@pytest.mark.parametrize("name", ["sage", "gin", "edge_mlp"])
def test_decoding_stands_just_before_the_first_use(name):
    split, _, _ = rewritten(gnn(name), *graph())
    for node in split.backward.graph.nodes:
        if str(node.target).startswith("actcompile."):
            following = node.next
            while is_view(following):  # views of what was decoded
                assert following.args[0] in (node, following.prev)
                following = following.next
            assert {node, following.prev} & set(following.all_input_nodes), f"{node} is decoded before {following}"


def test_no_encoded_activation_is_saved_as_it_was():
    split, plan, _ = rewritten(gnn(), *graph())
    saved = {n for n, _ in split.pairs}
    for choice in plan.choices:
        assert (choice.activation.node in saved) == isinstance(choice.codec, Keep)


def test_bytes_are_those_of_the_plan():
    split, plan, _ = rewritten(gnn("gin"), *graph())
    nodes = [n for n, _ in split.pairs if is_tensor(n)]
    encoded = [n for n in nodes if "actcompile" in str(n.target) or "actcompile" in str(n.all_input_nodes[:1])
               or (n.all_input_nodes and "actcompile" in str(n.all_input_nodes[0].target))]  # fmt: skip
    nbytes = sum(n.meta["val"].numel() * n.meta["val"].dtype.itemsize for n in encoded)
    assert nbytes == sum(c.nbytes for c in plan.choices if not isinstance(c.codec, Keep))


def test_forward_s_own_ops_stay():
    split, _, (forward, backward) = rewritten(Mlp(), X)
    theirs = [op for op in ops(split.forward) if "actcompile" not in op and "getitem" not in op]
    assert [op for op in theirs if op in forward] == [op for op in forward if op in theirs]
    assert all(op.startswith("aten.logical") or "permute" in op for op in theirs if op not in forward)


def transposed(x, w, v):
    h = (w.t() @ x.t()).t().sin()
    return h.exp() @ v


def permuted(x, w, v):
    h = (x @ w).view(4, 16, 32).permute(2, 0, 1)
    return h.sin().exp().sum(0).sum() * v.sum()


def views_in_backward(x, w, v):
    h = (x @ w).exp()
    return h.view(32, 64).t().reshape(64, 32) @ v * h.sum()


@pytest.mark.parametrize("function", [transposed, permuted, views_in_backward], ids=lambda f: f.__name__)
def test_strides_and_views_come_back(function):
    parameters = [W, V]
    reference = step(uncompressed(function), [X, *parameters], parameters)
    torch._dynamo.reset()
    rounded = uncompressed(function, lambda split: every_pass(split, **FAST | {"bits": 8, "nonlinear_bits": 8}))
    assert_close(step(rounded, [X, *parameters], parameters), reference, within=0.05)


def indexed(x, w, v):
    index = (x[:, 0] * 1000).long().abs() % x.shape[0]
    return (x @ w).exp().index_select(0, index) @ v


def test_an_index_below_a_number_is_narrowed_to_what_holds_it():
    split, plan, _ = rewritten(indexed, X, W, V, **EXACT)
    assert [c.codec.dtype for c in plan.choices if isinstance(c.codec, Narrow)] == [torch.int8]
    assert number_of(split.forward)["narrow"] == number_of(split.backward)["widen"] == 1
    assert not count(split.backward, "_assert_scalar")


def test_an_index_below_a_symbol_is_asserted_to_fit():
    split, plan, _ = rewritten(indexed, X, W, V, dynamic=True, **EXACT)
    assert [c.codec.dtype for c in plan.choices if isinstance(c.codec, Narrow)] == [torch.int32]
    assert count(split.backward, "_assert_scalar") == 1
    (node,) = split.backward.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default)
    compare = node.args[0]
    assert compare.args[1] == 2**31 - 1 and is_size(compare.args[0])
    assert "does not fit torch.int32" in node.args[1]


def test_the_assertion_holds_back_a_size_that_does_not_fit():
    graphs = []

    def transform(split):
        every_pass(split, **EXACT)
        (node,) = split.backward.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default)
        node.args[0].update_arg(1, 50)  # as if 50 were the largest int32
        graphs.append(split)

    run = uncompressed(indexed, transform, dynamic=True)
    run(X[:40].clone(), W, V).sum().backward()
    with pytest.raises(RuntimeError, match="does not fit"):
        run(X, W, V).sum().backward()
    assert len(graphs) == 1


def test_a_constant_of_symbolic_size_is_made_anew():
    split, plan, _ = rewritten(gnn(), *graph(), dynamic=True, **EXACT)
    assert any(isinstance(c.codec, Recompute) for c in plan.choices)
    fills = split.backward.graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)
    assert any(isinstance(size, fx.Node) and is_size(size) for n in fills for size in n.args[0])


def test_a_symbol_that_torch_leaves_out_is_saved_with_the_rest():
    with dynamo_config.patch(capture_dynamic_output_shape_ops=True):
        split, _, _ = rewritten(gnn("gcn"), *graph(), **EXACT)
    saved = [n for n, _ in split.pairs]
    sizes = [n for n in saved if is_size(n)]
    assert sizes and saved[-len(sizes) :] == sizes
    inputs = split.backward.graph.find_nodes(op="placeholder")
    assert [p for n, p in split.pairs if is_size(n)] == inputs[: len(sizes)]
