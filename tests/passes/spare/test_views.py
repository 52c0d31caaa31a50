"""Saved views of one tensor: encoded one by one, or the tensor once; nothing else of it is held, no gradient lost."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo import config as dynamo_config
from torch_geometric.nn import PNAConv

import actcompile
from actcompile.passes.codecs.codecs import Copy, Keep, Quantize
from actcompile.passes.graph.find import find, memory_order
from actcompile.passes.graph.split import root
from actcompile.passes.plan.plan import plan
from actcompile.passes.spare.views import views
from actcompile.passes.write.rewrite import rewrite
from tests.helpers import EXACT, FAST, SAVED, assert_close, assert_equal, count, graph, step, uncompressed

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")


class Cut(nn.Module):
    """A linear layer's result is cut into pieces, and a function makes the output of them."""

    def __init__(self, width, use):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.use = nn.Linear(16, width), use
        self.last = nn.ParameterList(torch.randn(size, 4) for size in (8, 16, 32))

    def forward(self, x):
        a, b, c = (self.last[i] for i in range(3))  # 2.11 cannot trace `*self.last`
        return self.use(self.first(x), a, b, c)


def halves(h, a, b, c):
    left, right = h.chunk(2, -1)
    return left @ b + right.cos() @ b


def query_and_key(h, a, b, c):
    q, k = h.view(-1, 2, 16).unbind(1)
    return (q * k) @ b


def heads(h, a, b, c):
    one, two, three, four = h.view(-1, 4, 8).unbind(1)
    return (one * two + three * four) @ a


def overlapping(h, a, b, c):
    return h[:, :16] @ b + h[:, 12:28] @ b + h @ c


def gated(h, a, b, c):
    return F.glu(h) @ b


def every_other(h, a, b, c):
    return h[:, ::2] @ b


def first_rows(h, a, b, c):
    return h[:8] @ c


def windows(h, a, b, c):
    return (h.unfold(1, 8, 4) @ a).sum(1)


def transposed(h, a, b, c):
    return h.t()[8:24].cos().t() @ b


def whole_and_piece(h, a, b, c):
    return h @ c + h[:, 16:] @ b


def expanded(h, a, b, c):
    return (h[:, None].expand(-1, 3, -1) @ c).sum(1)


USES = [
    halves,
    query_and_key,
    heads,
    overlapping,
    gated,
    every_other,
    first_rows,
    windows,
    transposed,
    whole_and_piece,
    expanded,
]


def passed(function, *inputs, min_bytes=0, dynamic=None, **options):
    """The split after `views` and `rewrite`, the plan, and what is not saved any more."""
    made = []

    def transform(split):
        gone = views(split, find(split), lambda node: None, min_bytes)
        chosen = plan(find(split), {}, actcompile.Config(**FAST, **options).policy())
        rewrite(split, chosen)
        made.extend((split, chosen, gone))

    uncompressed(function, transform, dynamic=dynamic)(*inputs)
    return made


def really_held(function, *inputs):
    """Bytes of distinct storages that the output's `grad_fn` keeps, without those of inputs and parameters."""
    output = function(*inputs)
    saved = [*output.grad_fn.saved_tensors, *getattr(output.grad_fn, "_tensors_no_vc_check", ())]
    alive = {t.untyped_storage().data_ptr() for t in (output, *inputs, *function.parameters(), *function.buffers())}
    storages = {s.data_ptr(): s.nbytes() for t in saved if (s := t.untyped_storage()).data_ptr() not in alive}
    return sum(storages.values())


def model_of(use):
    return Cut(32, use)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("use", USES, ids=lambda f: f.__name__)
def test_gradients_and_bytes(use, dynamic):
    model = model_of(use)
    parameters = list(model.parameters())
    plain = uncompressed(model, dynamic=dynamic)
    reference, before = step(plain, [X], parameters), really_held(plain, X)
    for options, within in (
        ({**EXACT, "replay": 0, "rebuild": False}, 0),
        ({**SAVED, "bits": 8, "nonlinear_bits": 8}, 0.05),
    ):
        torch._dynamo.reset()
        with dynamo_config.patch(assume_static_by_default=not dynamic):
            ours = actcompile.compress(model_of(use), **options)
            made = step(ours, [X], ours.parameters())
            held, report = really_held(ours, X), actcompile.explain(ours)
        assert_close(made, reference, within) if within else assert_equal(made, reference)
        assert report.saved_bytes_after == held
        assert held <= (0.5 * before if within else before)


@pytest.mark.parametrize(
    ("use", "saved"),
    [
        (halves, ["16 of 32", "16 of 32"]),
        (query_and_key, ["16 of 32", "16 of 32"]),
        (overlapping, ["32 of 32"]),
        (gated, ["16 of 32", "16 of 32"]),
        (every_other, ["16 of 32"]),
        (whole_and_piece, ["32 of 32"]),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_pieces_are_encoded_one_by_one_and_what_overlaps_once(use, saved):
    split, chosen, _ = passed(model_of(use), X)
    encoded = [
        c.activation
        for c in chosen.choices
        if isinstance(c.codec, Quantize) and root(c.activation.node).target is torch.ops.aten.addmm.default
    ]
    assert [f"{a.numel // 64} of {root(a.node).meta['val'].shape[1]}" for a in encoded] == saved
    assert count(split.backward, "dequantize") == sum(isinstance(c.codec, Quantize) for c in chosen.choices)


def test_small_pieces_stay_together_and_one_decoding_serves_them_all():
    split, chosen, gone = passed(model_of(heads), X, min_bytes=64 * 32 * 4)
    assert [a.activation.value.shape for a in gone] == [(64, 8)] * 4
    assert {v.reason for v in gone} == {"a view of addmm, which is saved once"}
    encoded = [c for c in chosen.choices if c.activation.value.shape == (64, 32) and isinstance(c.codec, Quantize)]
    assert len(encoded) == 1
    assert count(split.backward, "dequantize") == count(split.forward, "quantize")
    assert count(split.backward, "unbind") == 1


def test_a_kept_piece_is_copied_where_that_lets_go_of_the_rest():
    _, chosen, _ = passed(model_of(every_other), X, bits=None, nonlinear_bits=None)
    made = [(type(c.codec), c.activation.nbytes, c.nbytes) for c in chosen.choices if c.activation.nbytes]
    assert made == [(Copy, 64 * 32 * 4, 64 * 16 * 4)]
    _, chosen, _ = passed(model_of(halves), X, bits=None, nonlinear_bits=None)
    assert {type(c.codec) for c in chosen.choices} == {Keep}  # both halves are the whole


def test_rows_of_an_edge_list_made_inside_are_narrowed():
    def model(x, w, edges):
        edges = torch.cat([edges, edges.flip(0)], 1)
        h = (x @ w).sin()
        return h.index_select(0, edges[0]) * h.cos().index_select(0, edges[1])

    _, chosen, _ = passed(model, X, torch.randn(16, 8, requires_grad=True), graph()[1], dynamic=True)
    rows = [c for c in chosen.choices if c.activation.value.dtype is torch.int64 and c.activation.nbytes]
    assert [(str(c.codec), c.activation.nbytes, c.nbytes) for c in rows] == [("narrow(int32)", 512 * 8, 512 * 4)] * 2


def test_views_of_what_the_model_returns_are_left_alone():
    def model(x, w):
        h = (x @ w).sin()
        return h, h[:, ::2].exp().sum()

    _, chosen, gone = passed(model, X, torch.randn(16, 8, requires_grad=True))
    assert not gone
    assert all(c.nbytes == 0 for c in chosen.choices if root(c.activation.node).target is torch.ops.aten.sin.default)


def test_what_another_rule_holds_for_is_no_stand_in():
    gone = []
    names = {"getitem": 1, "getitem_1": 2}
    uncompressed(model_of(heads), lambda s: gone.extend(views(s, find(s), lambda n: names.get(n.name), 64 * 32 * 4)))(X)
    assert not gone


@pytest.mark.parametrize(
    "value", [torch.empty(6, 8)[:, ::2], torch.empty(6, 8).t()[1:5], torch.empty(2, 3, 8)[..., :5].permute(2, 0, 1)]
)
def test_memory_order_is_that_of_a_copy(value):
    order = memory_order(value)
    assert value.permute(order).clone().is_contiguous()
    assert value.clone().permute(order).is_contiguous()


def test_towers_hold_an_eighth():
    deg = torch.bincount(torch.bincount(graph()[1][1], minlength=64))
    conv = PNAConv(16, 16, ["mean", "max"], ["identity", "amplification"], deg, towers=2)
    x, edges = graph()
    before = really_held(uncompressed(conv), x, edges)
    torch._dynamo.reset()
    ours = actcompile.compress(conv, **SAVED)
    held = really_held(ours, x, edges)
    assert 8 * held < before and held == actcompile.explain(ours).saved_bytes_after


CUTS = ("chunk", "unbind", "slice", "stride", "select", "transpose", "view", "narrow", "unfold", "flatten")


def cut(h, how, where):
    """One step of a chain of views; tensors have at least two dimensions, the first that of rows."""
    width = h.shape[-1]
    if how == "chunk" and width % 2 == 0:
        return h.chunk(2, -1)[where % 2]
    if how == "unbind" and h.dim() > 2:
        return h.unbind(1)[where % h.shape[1]]
    if how == "slice" and width > 3:
        return h[..., where % 3 : width - 1]
    if how == "stride" and width > 2:
        return h[..., where % 2 :: 2]
    if how == "select" and h.dim() > 2:
        return h[:, where % h.shape[1]]
    if how == "transpose" and h.dim() > 2:
        return h.transpose(1, 2)
    if how == "view" and h.dim() == 2 and width % 4 == 0 and h.stride(1) == 1:
        return h.view(h.shape[0], 4, width // 4)
    if how == "narrow" and width > 2:
        return torch.narrow(h, -1, where % 2, 2)
    if how == "unfold" and h.dim() == 2 and width > 4:
        return h.unfold(1, 4, 1 + where % 3)
    return h


chains = st.lists(st.tuples(st.sampled_from(CUTS), st.integers(0, 5)), max_size=4)


@settings(max_examples=settings.default.max_examples // 12)  # each compiles three graphs
@given(pieces=st.lists(chains, min_size=1, max_size=3), join=st.sampled_from(("sum", "product")), dynamic=st.booleans())
def test_any_chains_of_views(pieces, join, dynamic):
    """Lossless gradients to the bit, rounded ones near, and the report's bytes are those that are held."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(16, 16)

        def forward(self, x):
            h = self.first(x).sin()
            total = 0.0 if join == "sum" else 1.0
            for number, chain in enumerate(pieces):
                piece = h
                for how, where in chain:
                    piece = cut(piece, how, where)
                piece = piece.reshape(x.shape[0], -1)
                piece = (piece * piece.cos() if number % 2 else piece * (1.5 + number)).mean(1)
                total = total + piece if join == "sum" else total * piece
            return total * 3.0

    torch._dynamo.reset()
    exact = Model()
    reference = step(uncompressed(exact, dynamic=dynamic or None), [X], exact.parameters())
    for options, within in (
        ({**EXACT, "replay": 0, "rebuild": False}, 0),
        ({**SAVED, "bits": 8, "nonlinear_bits": 8}, 0.1),
    ):
        torch._dynamo.reset()
        with dynamo_config.patch(assume_static_by_default=not dynamic):
            ours = actcompile.compress(Model(), **options)
            made = step(ours, [X], ours.parameters())
            assert really_held(ours, X) == actcompile.explain(ours).saved_bytes_after
        assert_close(made, reference, within) if within else assert_equal(made, reference)
