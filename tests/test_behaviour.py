"""What a model may do around a compressed step: all that `torch.compile` allows, with gradients that are right."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actcompile
from actcompile import Config, compress, explain
from tests.helpers import (
    EXACT,
    FAST,
    SAVED,
    Mlp,
    assert_close,
    assert_equal,
    gnn,
    graph,
    leaves,
    loss,
    step,
    uncompressed,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(function, **options):
    return torch.compile(function, backend=actcompile.backend, options=options)


class Calls:
    """The names of our ops that run inside the block."""

    def __enter__(self):
        self.profiler = torch.autograd.profiler.profile().__enter__()
        return self

    def __exit__(self, *error):
        self.profiler.__exit__(*error)
        self.ours = {
            e.name.removeprefix("actcompile::") for e in self.profiler.function_events if "actcompile" in e.name
        }


@pytest.mark.parametrize("name", ["sage", "max_min", "edge_mlp"])
def test_lossless_is_equal_to_the_bit(name):
    model, inputs = gnn(name, dropout=0.0), graph()
    reference = step(uncompressed(model), inputs, model.parameters())
    with Calls() as calls:
        ours = step(compress(model, **EXACT), inputs, model.parameters())
    assert_close(ours, reference, 1e-5)
    torch._dynamo.reset()
    assert_equal(step(compress(model, **EXACT, fuse=False), inputs, model.parameters()), reference)
    assert calls.ours >= {"pack_bits", "unpack_bits"} or name != "sage"
    assert not calls.ours & {"draw_seed", "quantize", "dequantize"}


_SAME = torch.Generator().manual_seed(0)  # the same in every process
X, W, V = (torch.randn(*shape, generator=_SAME) for shape in ((64, 16), (16, 32), (32, 4)))


def returned_and_saved(x, w, v):
    h = (x @ w).sin()
    return h, h.cos() @ v


def returned_view(x, w, v):
    h = (x @ w).sin()
    return h.t()[3:], h.cos() @ v


def returned_part(x, w, v):
    first, second = (x @ w).split(32)
    return first, second.sin() @ v


def duplicated_outputs(x, w, v):
    h = x @ w
    return h, h, h.sin() @ v, h


def mutated_input(x, w, v):
    h = (x * 2).sin() @ w
    x.mul_(3)
    return h.relu() @ v + x.sum()


def mutated_after_saving(x, w, v):
    h = x.add_(1) @ w
    return h.relu() * x.sum() @ v.sum(1, keepdim=True)


def parameters_only(w, v):
    return (w @ v * 0.1).sin()  # of angles of about 0.5, so that a step of 8 bits is a small one


def transposed(x, w, v):
    return (w.t() @ x.t()).sin().t() @ v


def shared_memory(x, w, v):
    h = (x @ w).relu()
    return h.view(32, 64).sin().t() @ h.view(32, 64)


def empty(x, w, v):
    return (x[:0] @ w).relu() @ v


def other_dtypes(x, w, v):
    return torch.view_as_real(torch.fft.fft((x @ w).double().sin())).cos().sum(-1).float() @ v


def channels_last(x, w, v):
    x = x.view(1, 64, 4, 4).to(memory_format=torch.channels_last)
    return F.conv2d(x, w.view(8, 64, 1, 1)).relu() * v.mean()


FUNCTIONS = [
    returned_and_saved, returned_view, returned_part, duplicated_outputs, mutated_input, mutated_after_saving,
    parameters_only, transposed, shared_memory, empty, other_dtypes, channels_last,
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_function(function):
    parameters = [W.clone().requires_grad_(), V.clone().requires_grad_()]

    def inputs():
        return parameters if function is parameters_only else [X.clone(), *parameters]

    given, eager = inputs(), inputs()
    reference = step(uncompressed(function), inputs(), parameters)
    torch._dynamo.reset()
    assert_equal(step(compiled(function, **EXACT), given, parameters), reference)
    step(function, eager, parameters)
    assert torch.equal(given[0], eager[0])  # a mutation arrives
    torch._dynamo.reset()
    number = len(reference) - len(parameters)
    with Calls() as calls:
        ours = step(compiled(function, **{**SAVED, "bits": 8, "nonlinear_bits": 8}), inputs(), parameters)
    assert_equal(ours[:number], reference[:number])  # outputs are never rounded
    assert_close(ours, reference, within=0.05)
    assert function in (parameters_only, empty, other_dtypes) or calls.ours


def test_what_is_returned_is_kept_and_said_so():
    report = explain(returned_and_saved, X, W.clone().requires_grad_(), V, config=Config(**FAST))
    kept = [r for r in report.graphs[0].rows if r.reason == "the model returns it, or a view of it"]
    assert kept and all(r.codec == "keep" and r.bytes_before == 0 for r in kept)


def test_no_grad_quantises_nothing_and_leaves_the_random_state():
    model, x = compress(Mlp(dropout=0.0), **FAST), torch.randn(64, 16)
    with torch.no_grad(), Calls() as calls:
        state = torch.get_rng_state()
        out = model(x)
        assert torch.equal(torch.get_rng_state(), state)
    assert not calls.ours and not out.requires_grad
    assert explain(model).graphs == ()


def test_what_is_rounded_in_eval_mode_changes_no_output():
    model, (x, edges) = compress(gnn(), **SAVED, when="always", fuse=False).eval(), graph()
    with torch.inference_mode(), Calls() as calls:
        out = model(x, edges)
    assert not calls.ours
    with Calls() as calls:
        again = model(x, edges)
    assert {"draw_seed", "quantize"} <= calls.ours
    torch.testing.assert_close(again, out)
    reference = step(uncompressed(copy.deepcopy(model)), (x, edges), model.parameters())[0]
    assert torch.equal(again, reference)


def test_train_and_eval_switch():
    model, inputs = compress(gnn(dropout=0.9), **FAST), graph()
    assert not torch.equal(model(*inputs), model(*inputs))
    model.eval()
    assert not model.training and not model.convs[0].training
    assert torch.equal(model(*inputs), model(*inputs))
    model.train()
    assert not torch.equal(model(*inputs), model(*inputs))


def test_batch_norm_keeps_its_statistics():
    model, inputs = gnn(dropout=0.0), graph()
    eager = copy.deepcopy(model)
    compress(model, **FAST)(*inputs)
    eager(*inputs)
    for ours, reference in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("options", [{**FAST, "bits": 8}, EXACT], ids=["rounded", "exact"])
def test_autocast(options):
    model, x = Mlp(dropout=0.0), torch.randn(64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        reference = step(uncompressed(model), [x], model.parameters())
        report = explain(model, x, config=Config(**options))
        ours = step(compress(model, **options), [x], model.parameters())
    assert_equal(ours[:1], reference[:1])
    if options is EXACT:
        assert_equal(ours, reference)
    else:
        rounded = [r for g in report.graphs for r in g.rows if r.codec.startswith("quantize")]
        assert rounded and all(r.dtype == "bfloat16" and "64" in r.shape for r in rounded)  # never a weight's copy
        assert_close(ours, reference, within=0.05)


def test_a_second_backward_through_the_same_graph_gives_the_same():
    model, inputs = compress(gnn(), **FAST), graph()
    total = loss(model(*inputs))
    first = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(total, list(model.parameters()))
    assert_equal(list(second), list(first))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, list(model.parameters()))


def test_double_backward_is_a_clear_error():
    model, x = compress(Mlp(), **FAST), torch.randn(64, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_one_seed_one_gradient():
    model, inputs = compress(gnn(), **FAST), graph()
    first, same, other = (step(model, inputs, model.parameters(), seed) for seed in (1, 1, 2))
    assert_equal(same, first)
    assert not torch.equal(first[1], other[1])


def test_hooks_run():
    model, x, seen = Mlp(), torch.randn(64, 16), []
    model.register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.first.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model.register_full_backward_hook(lambda module, before, after: seen.append("backward"))
    model.last.weight.register_hook(lambda gradient: seen.append("gradient"))
    compress(model, **FAST)
    loss(model(x)).backward()
    assert sorted(map(str, seen)) == sorted(["before", "(64, 32)", "backward", "gradient"])


def test_an_optimiser_and_checkpointing_train():
    model, (x, edges) = compress(gnn(checkpointed=True), **FAST), graph()
    target, optimiser = torch.randint(0, 4, (64,)), torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        total = F.cross_entropy(model(x, edges), target)
        total.backward()
        optimiser.step()
        losses.append(total.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_nested_outputs_and_keyword_inputs():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(16, 32)

        def forward(self, x, *, scale):
            h = self.lin(x).relu()
            return {"h": h * scale, "both": (h.sin(), None, 3)}

    model, x = Nested(), torch.randn(64, 16)
    eager = model(x, scale=2.0)
    ours = compress(model, **FAST)(x, scale=2.0)
    assert ours["both"][1:] == (None, 3)
    for a, b in zip(leaves(ours), leaves(eager), strict=True):
        torch.testing.assert_close(a, b)
