"""Each rule of the table against the numbers: an output is affine in a choice of arguments exactly if the rule says so.

Every float tensor of a case is an argument `base + t * direction` for those chosen and `base` for the others, so that a
rule that allows one argument at a time, but not two at once, is seen from both sides.
"""

import itertools
import operator

import pytest
import torch
import torch._inductor.inductor_prims  # registers prims::inductor_force_stride_order, prims::fma
from torch import fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from actcompile.passes.graph.bias import bias
from actcompile.passes.graph.linearity import RULES

GENERATOR = torch.Generator().manual_seed(0)


def F(*shape, generator=GENERATOR):
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def I(bound, *shape):  # noqa: E743
    return torch.randint(bound, shape, generator=GENERATOR)


def packet(name):
    namespace, op = name.split(".")[:2]
    return getattr(getattr(torch.ops, namespace), op)


X, MASK, ROWS, IDS = F(3, 4), torch.tensor([True, False, True, True]), torch.tensor([2, 0, 2]), I(3, 3, 4)
POSITIVE = 10 + F(4)
Z, Y = torch.complex(X, F(3, 4)), torch.complex(F(3, 4), F(3, 4))
OFFSETS, BAGS = torch.tensor([0, 2]), torch.tensor([0, 0, 1, 1, 1])
LENGTHS = torch.tensor([2, 1])
ATTENTION = [F(1, 2, 3, 4) for _ in range(5)]
LOGSUMEXP = F(1, 2, 3)
ON = [True, True, True]

# op: the overload, then its arguments; every float tensor among them is tried as a source. A trailing dict: keywords.
CASES = [
    ("actcompile.spmm.default", torch.tensor([0, 2, 2, 5]), I(4, 5), F(5), F(4, 2)),
    ("actcompile.aggregate.default", F(4, 2), F(5, 1), I(4, 5), -1, I(3, 5), -1, 3, []),
    ("actcompile.spmm_transposed.default", torch.tensor([0, 2, 2, 5]), I(4, 5), F(5), F(3, 2), 4),
    *[
        (f"aten.{op}.default", X)
        for op in (
            *("zeros_like", "ones_like", "alias", "clone", "detach", "lift_fresh", "lift_fresh_copy", "_to_copy", "t"),
            *("squeeze", "neg", "sum", "mean", "tril", "triu", "diag_embed", "diagonal", "trace"),
            *("sym_numel", "sym_storage_offset"),
        )
    ],
    ("aten.complex.default", X, F(3, 4)),
    ("aten.view_as_complex.default", F(3, 4, 2)),
    ("aten.view_as_real.default", Z),
    ("aten._conj.default", Z),
    ("aten._fft_r2c.default", X, [1], 0, True),
    ("aten._fft_c2r.default", Z, [1], 0, 6),
    ("aten._fft_c2c.default", Z, [0], 0, True),
    ("aten.mul.Tensor", Z, Y),
    ("aten.mul.Tensor", Z, X),
    ("aten.mm.default", Z, torch.complex(F(4, 2), F(4, 2))),
    ("aten.abs.default", Z),
    ("aten.new_zeros.default", X, [2]),
    ("aten.new_ones.default", X, [2]),
    ("aten.sym_size.int", X, 0),
    ("aten.sym_stride.int", X, 0),
    ("aten.full_like.default", X, 2.0),
    ("aten.new_full.default", X, [2], 2.0),
    ("aten.view.default", X, [4, 3]),
    ("aten.view.dtype", X, torch.int64),
    ("aten._unsafe_view.default", X, [4, 3]),
    ("aten.expand.default", X, [2, 3, 4]),
    ("aten.permute.default", X, [1, 0]),
    ("aten.transpose.int", X, 0, 1),
    ("aten.unsqueeze.default", X, 0),
    ("aten.flip.default", X, [0]),
    ("aten.roll.default", X, [1], [0]),
    ("aten.repeat.default", X, [2, 1]),
    ("aten.as_strided.default", X, [2, 2], [4, 1], 1),
    ("aten.select.int", X, 0, 1),
    ("aten.slice.Tensor", X, 0, 1, 3),
    ("aten.split.Tensor", X, 2),
    ("aten.split_with_sizes.default", X, [1, 2]),
    ("aten.unbind.int", X),
    ("aten.unfold.default", X, 1, 2, 1),
    ("aten.constant_pad_nd.default", X, [1, 0], 0.5),
    ("aten.gather.default", X, 0, IDS),
    ("aten.index.Tensor", X, [ROWS, None]),
    ("aten._unsafe_index.Tensor", X, [ROWS, None]),
    ("aten.index_select.default", X, 0, ROWS),
    ("aten.take.default", X, ROWS),
    ("aten.masked_select.default", X, MASK),
    ("aten.embedding.default", X, ROWS),
    ("aten.cat.default", [X, F(2, 4)]),
    ("aten.stack.default", [X, F(3, 4)]),
    ("aten.copy.default", X, F(3, 4)),
    ("aten.copy.default", I(3, 3, 4), X),
    ("aten.slice_scatter.default", X, F(2, 4), 0, 1, 3),
    ("aten.select_scatter.default", X, F(4), 0, 1),
    ("aten.diagonal_scatter.default", X, F(3)),
    ("aten.as_strided_scatter.default", X, F(2, 2), [2, 2], [4, 1], 1),
    ("aten.index_put.default", X, [I(3, 5)], F(5, 4), True),
    ("aten.index_put.default", X, [ROWS[:2]], F(2, 4)),
    ("aten._unsafe_index_put.default", X, [I(3, 5)], F(5, 4), True),
    ("aten._unsafe_masked_index_put_accumulate.default", X, MASK[:3], [ROWS, ROWS], F(3)),
    ("aten._unsafe_masked_index.default", X, MASK[:3], [ROWS, ROWS], 0.5),
    ("aten.where.self", MASK, X, F(4)),
    ("aten.masked_fill.Tensor", X, MASK, F()),
    ("aten.index_fill.int_Tensor", X, 0, ROWS, F()),
    ("aten.masked_scatter.default", X, MASK, F(12)),
    ("aten.index_copy.default", X, 0, ROWS[:2], F(2, 4)),
    ("prims.convert_element_type.default", X, torch.float64),
    ("prims.convert_element_type.default", X, torch.int64),
    ("prims.broadcast_in_dim.default", X, [2, 3, 4], [1, 2]),
    ("prims.transpose.default", X, [1, 0]),
    ("prims.split_dim.default", X, 1, 2),
    ("prims.collapse.default", X, 0, 1),
    ("prims.collapse_view.default", X, 0, 1),
    ("prims.squeeze.default", F(3, 1), [1]),
    ("prims.reshape.default", X, [12]),
    ("prims.rev.default", X, [0]),
    ("prims.view_of.default", X),
    ("prims.device_put.default", X, torch.device("cpu")),
    ("prims.cat.default", [X, F(2, 4)], 0),
    ("prims.where.default", X.detach() > 0, X, F(3, 4)),
    ("prims.inductor_force_stride_order.default", X, (4, 1)),
    ("aten.cumsum.default", X, 0),
    ("aten.sum.default", X, {"dtype": torch.int64}),
    ("aten.add.Tensor", X, F(4), {"alpha": 2}),
    ("aten.sub.Tensor", X, F(4)),
    ("aten.rsub.Tensor", X, F(4)),
    ("aten.index_add.default", X, 0, ROWS, F(3, 4)),
    ("aten.index_reduce.default", X, 0, ROWS, F(3, 4), "mean"),
    ("aten.index_reduce.default", X, 0, ROWS, F(3, 4), "amax"),
    ("aten.scatter.src", X, 0, IDS[:1], F(1, 4)),
    ("aten.scatter.value", X, 0, IDS, 0.5),
    ("aten.scatter.reduce", X, 0, IDS, F(3, 4), {"reduce": "add"}),
    ("aten.scatter_add.default", X, 0, IDS, F(3, 4)),
    ("aten.scatter_reduce.two", X, 0, IDS, F(3, 4), "sum"),
    ("aten.scatter_reduce.two", X, 0, IDS, F(3, 4), "mean"),
    ("aten.scatter_reduce.two", X, 0, IDS, F(3, 4), "amax"),
    ("aten.segment_reduce.default", X, "mean", {"lengths": LENGTHS}),
    ("aten.segment_reduce.default", X, "max", {"lengths": LENGTHS}),
    ("prims.neg.default", X),
    ("prims.clone.default", X),
    ("prims.add.default", X, F(3, 4)),
    ("prims.sub.default", X, F(3, 4)),
    ("prims.sum.default", X, [0]),
    ("aten.mul.Tensor", X, F(4)),
    ("aten.div.Tensor", X, POSITIVE),
    ("aten.div.Tensor_mode", X, F(4), {"rounding_mode": "floor"}),
    ("aten.pow.Tensor_Scalar", X, 1),
    ("aten.pow.Tensor_Scalar", X, 2),
    ("aten.lerp.Tensor", X, F(3, 4), F(3, 4)),
    ("aten.addcmul.default", X, F(3, 4), F(3, 4)),
    ("aten.addcdiv.default", X, F(3, 4), F(3, 4).exp()),
    ("aten.mm.default", X, F(4, 2)),
    ("aten.bmm.default", F(2, 3, 4), F(2, 4, 2)),
    ("aten.mv.default", X, F(4)),
    ("aten.dot.default", F(4), F(4)),
    ("aten.vdot.default", F(4), F(4)),
    ("aten.addmm.default", F(2), X, F(4, 2)),
    ("aten.addmv.default", F(3), X, F(4)),
    ("aten.addr.default", X, F(3), F(4)),
    ("aten.baddbmm.default", F(2, 3, 2), F(2, 3, 4), F(2, 4, 2)),
    ("aten.addbmm.default", F(3, 2), F(2, 3, 4), F(2, 4, 2)),
    ("aten.convolution.default", F(2, 3, 5), F(4, 3, 2), F(4), [1], [0], [1], False, [0], 1),
    ("aten._embedding_bag.default", X, I(3, 5), OFFSETS, False, 0, False, F(5)),
    ("aten._embedding_bag_forward_only.default", X, I(3, 5), OFFSETS, False, 0, False, F(5)),
    ("aten._embedding_bag_forward_only.default", X, I(3, 5), OFFSETS, False, 1),
    ("prims.fma.default", X, F(3, 4), F(3, 4)),
    ("prims.mul.default", X, F(3, 4)),
    ("prims.div.default", X, F(3, 4).exp()),
    ("aten.slice_backward.default", X, [5, 4], 0, 0, 3, 1),
    ("aten.select_backward.default", F(4), [3, 4], 0, 1),
    ("aten.diagonal_backward.default", F(3), [3, 4], 0, 0, 1),
    ("aten.embedding_dense_backward.default", X, ROWS, 5, -1, True),
    ("aten.masked_scatter_backward.default", X, MASK.expand(3, 4), [12]),
    ("aten.unfold_backward.default", F(3, 3, 2), [3, 4], 1, 2, 1),
    ("aten.value_selecting_reduction_backward.default", F(4), 0, I(3, 4), [3, 4], False),
    ("aten.max_pool2d_with_indices_backward.default", F(1, 2, 2), F(1, 4, 4), [2, 2], [2, 2], [0, 0], [1, 1], False,
     torch.tensor([[[0, 3], [9, 15]]])),
    ("aten.nll_loss_backward.default", F(), X, I(4, 3), None, 1, -100, torch.tensor(3.0, dtype=torch.float64)),
    ("aten._segment_reduce_backward.default", F(2, 4), F(2, 4), X, "mean", {"lengths": LENGTHS}),
    ("aten.native_dropout_backward.default", X, MASK.expand(3, 4), 2.0),
    ("aten._embedding_bag_dense_backward.default", F(2, 4), I(3, 5), BAGS, torch.tensor([2, 3]), OFFSETS, 3, False, 0,
     F(5)),
    ("aten._embedding_bag_per_sample_weights_backward.default", F(2, 4), X, I(3, 5), OFFSETS, BAGS, 0),
    ("aten.threshold_backward.default", X, F(3, 4), 0),
    *[
        (f"aten.{op}_backward.default", X, F(3, 4))
        for op in ("gelu", "silu", "mish", "sigmoid", "tanh", "hardswish")
    ],
    ("aten.hardsigmoid_backward.default", X, 5 * F(3, 4)),
    ("aten.elu_backward.default", X, 1.0, 1.0, 1.0, False, F(3, 4)),
    ("aten.leaky_relu_backward.default", X, F(3, 4), 0.2, False),
    ("aten.softplus_backward.default", X, F(3, 4), 1.0, 20.0),
    ("aten.hardtanh_backward.default", X, F(3, 4), -0.5, 0.5),
    ("aten.glu_backward.default", F(3, 2), X, 1),
    ("aten.log_sigmoid_backward.default", X, F(3, 4), 10 + F(3, 4)),
    ("aten._softmax_backward_data.default", X, F(3, 4), 1, torch.float64),
    ("aten._log_softmax_backward_data.default", X, F(3, 4), 1, torch.float64),
    ("aten.smooth_l1_loss_backward.default", X, F(3, 4), F(3, 4), 0, 1.0),
    ("aten.huber_loss_backward.default", X, F(3, 4), F(3, 4), 0, 1.0),
    ("aten.binary_cross_entropy_backward.default", X, F(3, 4).sigmoid(), F(3, 4)),
    ("aten.mse_loss_backward.default", X, F(3, 4), F(3, 4), 1),
    ("aten.native_layer_norm_backward.default", X, F(3, 4), [4], F(3, 1), F(3, 1), F(4), F(4), ON),
    ("aten.native_group_norm_backward.default", F(2, 4, 3), F(2, 4, 3), F(2, 2), F(2, 2), F(4), 2, 4, 3, 2, ON),
    *[
        ("aten.native_batch_norm_backward.default", X, F(3, 4), F(4), F(4), POSITIVE, F(4), F(4), train, 0.1, ON)
        for train in (True, False)
    ],
    ("aten.convolution_backward.default", F(2, 4, 4), F(2, 3, 5), F(4, 3, 2), [4], [1], [0], [1], False, [0], 1, ON),
    ("aten._scaled_dot_product_flash_attention_for_cpu_backward.default", *ATTENTION, LOGSUMEXP, 0.0, False),
]  # fmt: skip
# Their result is not defined, so there is nothing to compare.
UNTRIED = {"aten.empty_like", "aten.new_empty", "aten.new_empty_strided"}


def cases():
    for name, *args in CASES:
        kwargs = args.pop() if isinstance(args[-1], dict) else {}
        yield pytest.param(name, tuple(args), kwargs, id=name)


def graph_of(op, flat, spec, result, chosen, output):
    """The graph of `t -> op(base + t * direction, ...)[output]`, and its `t`; only the `chosen` arguments move."""
    graph = fx.Graph()
    t = graph.placeholder("t")
    nodes = [graph.placeholder("base") if isinstance(value, torch.Tensor) else value for value in flat]
    for i in chosen:
        shift = graph.call_function(torch.ops.aten.mul.Tensor, (t, graph.placeholder("direction")))
        nodes[i] = graph.call_function(torch.ops.aten.add.Tensor, (nodes[i], shift))
        shift.meta["val"] = nodes[i].meta["val"] = flat[i]
    args, kwargs = tree_unflatten(nodes, spec)
    node = graph.call_function(op, args, kwargs)
    node.meta["val"] = result
    graph.output(graph.call_function(operator.getitem, (node, output)) if isinstance(result, (list, tuple)) else node)
    return graph, t


def outputs_of(result):
    return list(result) if isinstance(result, (list, tuple)) else [result]


def like(value, generator):
    shape = value.shape
    return (
        torch.complex(F(*shape, generator=generator), F(*shape, generator=generator))
        if value.is_complex()
        else F(*shape, generator=generator)
    )


def as_reals(value):
    value = torch.as_tensor(value)
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value.double()


def curvatures(op, flat, spec, chosen, seed):
    """For each output `|f(1) - 2 f(0) + f(-1)|` as `t` moves the `chosen` arguments, relative to the values."""
    # Far enough to cross the kinks of functions that are linear in pieces.
    directions = {i: 3 * like(flat[i], torch.Generator().manual_seed(seed + i)) for i in chosen}
    runs = []
    for t in (-1.0, 0.0, 1.0):
        moved = [value + t * directions[i] if i in directions else value for i, value in enumerate(flat)]
        args, kwargs = tree_unflatten(moved, spec)
        runs.append([as_reals(0 if out is None else out) for out in outputs_of(op(*args, **kwargs))])
    bends = []
    for low, middle, high in zip(*runs, strict=True):
        scale = max(1e-3, *(value.abs().max().item() for value in (low, middle, high)))
        bends.append((low - 2 * middle + high).nan_to_num(nan=torch.inf).abs().max().item() / scale)
    return bends


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of calls on a dozen elements: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "args", "kwargs"), list(cases()))
def test_a_rule_is_exact(name, args, kwargs):
    op = getattr(packet(name), name.split(".")[2])
    flat, spec = tree_flatten((args, kwargs))
    result = op(*args, **kwargs)
    floats = [
        i for i, v in enumerate(flat) if isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex())
    ]
    for chosen in [*itertools.combinations(floats, 1), *itertools.combinations(floats, 2)]:
        bends = zip(*(curvatures(op, flat, spec, chosen, seed) for seed in range(6)), strict=True)
        for output, bend in enumerate(map(max, bends)):
            graph, t = graph_of(op, flat, spec, result, chosen, output)
            found = bias(graph, [t])[t]
            assert found.biased == (bend > 1e-10), (chosen, output, bend)
            assert found.op == (name if found.biased else "")


def test_every_rule_is_tried():
    assert {name.rsplit(".", 1)[0] for name, *_ in CASES} | UNTRIED >= set(RULES)


def test_every_rule_names_arguments_of_its_op():
    for name, rules in RULES.items():
        op = packet(name)
        names = {argument.name for overload in op.overloads() for argument in getattr(op, overload)._schema.arguments}
        for rule in rules:
            used = set(rule.when).union(*(output.named | output.ignored for output in rule.outputs))
            assert used <= {"input" if argument == "self" else argument for argument in names}, name
