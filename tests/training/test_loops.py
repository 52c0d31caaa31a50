"""Training loops as people write them, with a compressed model in the place of the plain one.

Lossless, what training gives is that of the same loop around the same graph without us, to the bit; rounded to 8 bits,
it is close.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn import GAE, HeteroConv, SAGEConv, to_hetero
from torch_geometric.utils import negative_sampling

from actcompile import compress, explain
from tests.helpers import EXACT, SAVED, assert_close, assert_equal, gnn, graph, uncompressed

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")
ROUNDED = {**SAVED, "bits": 8, "nonlinear_bits": 8}


def compare(model, train, within=0.05):
    """`train(model, call)` trains the model through `call` and returns tensors; rounded ones are close `within`."""
    runs = {}
    for kind in ("plain", "lossless", "rounded"):
        torch._dynamo.reset()
        own = copy.deepcopy(model)
        options = {"lossless": EXACT | {"fuse": False}, "rounded": ROUNDED}.get(kind)
        call = uncompressed(own) if options is None else compress(own, **options)
        torch.manual_seed(1)
        runs[kind] = [t.detach().clone() for t in train(own, call)]
        if kind != "plain":
            report = explain(own)
            assert 0 < report.saved_bytes_after < report.saved_bytes_before
    assert_equal(runs["lossless"], runs["plain"])
    assert_close(runs["rounded"], runs["plain"], within)
    assert any(not torch.equal(a, b) for a, b in zip(runs["rounded"], runs["plain"], strict=True))


def plain_gnn():
    """Without dropout, whose masks rounding would change, and without norms, before which biases have no gradient."""
    return gnn(dropout=0.0, norm=False)


def change(model, before):
    """What training added to every parameter."""
    return [p - q for p, q in zip(model.parameters(), before, strict=True)]


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def test_grad_scaler_with_accumulation():
    parts = [graph(), graph(nodes=48, edges=200), graph()]

    def train(model, call):
        scaler, before = torch.amp.GradScaler("cpu", init_scale=2.0**20), parameters(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            for x, edges in parts:
                scaler.scale(call(x, edges).square().mean() / len(parts)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 2.0**20
        return change(model, before)

    compare(plain_gnn(), train)


def test_what_overflows_reaches_the_grad_scaler():
    model, (x, edges) = compress(gnn(dropout=0.0), **ROUNDED), graph()
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**20), torch.optim.SGD(model.parameters(), 0.1)
    before = parameters(model)
    x[3] = float("inf")
    scaler.scale(model(x, edges).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**19
    assert_equal(parameters(model), before)


def test_an_average_of_the_weights():
    x, edges = graph()

    def train(model, call):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        optimizer, before = torch.optim.SGD(model.parameters(), 0.1), parameters(model)
        for _ in range(3):
            optimizer.zero_grad()
            call(x, edges).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
        with torch.no_grad():
            assert average.eval()(x, edges).isfinite().all()
        return change(average.module, before)

    compare(plain_gnn(), train)


def test_lbfgs():
    (x, edges), target = graph(), torch.randint(0, 4, (64,))

    def train(model, call):
        optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)
        losses = []

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(call(x, edges), target)
            loss.backward()
            losses.append(loss)
            return loss

        for _ in range(2):
            optimizer.step(closure)
        assert losses[-1] < losses[0]
        return losses

    compare(plain_gnn(), train)


@pytest.mark.parametrize("where", ["inside", "outside", "both"])
def test_checkpointing(where):
    x, edges = graph()

    def train(model, call):
        for _ in range(2):
            out = call(x, edges) if where == "inside" else checkpoint(call, x, edges, use_reentrant=False)
            out.square().mean().backward()
        return [p.grad for p in model.parameters()]

    compare(gnn(dropout=0.0, norm=False, checkpointed=where != "outside"), train)


@pytest.mark.parametrize("options", [EXACT, ROUNDED], ids=["lossless", "rounded"])
def test_a_checkpoint_around_it_draws_the_same_masks_and_rounding_again(options):
    model, (x, edges) = compress(gnn(), **options), graph()

    def gradients(call):
        torch.manual_seed(2)
        call(x, edges).square().mean().backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return found

    ours = gradients(lambda *inputs: checkpoint(model, *inputs, use_reentrant=False))
    assert_equal(ours, gradients(model))


EDGES = [("paper", "cites", "paper"), ("author", "writes", "paper"), ("paper", "by", "author")]


def hetero_graph():
    x = {"paper": torch.randn(64, 16), "author": torch.randn(40, 16)}
    return x, {
        e: torch.stack([torch.randint(len(x[e[0]]), (200,)), torch.randint(len(x[e[2]]), (200,))]) for e in EDGES
    }


class Homogeneous(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = SAGEConv((-1, -1), 32), SAGEConv((-1, -1), 4)

    def forward(self, x, edge_index):
        return self.last(self.first(x, edge_index).relu(), edge_index)


class Heterogeneous(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            HeteroConv({edge: SAGEConv((i, i), o) for edge in EDGES}, aggr="mean") for i, o in ((16, 32), (32, 4))
        )

    def forward(self, x, edges):
        x = {kind: h.relu() for kind, h in self.convs[0](x, edges).items()}
        return self.convs[1](x, edges)


@pytest.mark.parametrize("kind", ["to_hetero", "HeteroConv"])
def test_graphs_with_several_kinds_of_nodes(kind):
    x, edges = hetero_graph()
    model = to_hetero(Homogeneous(), (list(x), EDGES)) if kind == "to_hetero" else Heterogeneous()
    with torch.no_grad():
        model(x, edges)  # lazy layers find their sizes

    def train(model, call):
        for _ in range(2):
            sum(out.square().mean() for out in call(x, edges).values()).backward()
        return [p.grad for p in model.parameters()]

    compare(model, train)


class LinkPredictor(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([SAGEConv(16, 32), SAGEConv(32, 16)])

    def forward(self, x, edge_index, pairs):
        z = self.convs[1](self.convs[0](x, edge_index).relu(), edge_index)
        return (z[pairs[0]] * z[pairs[1]]).sum(-1)


def test_link_prediction_with_new_negatives_in_every_step():
    x, edges = graph()
    negatives = [negative_sampling(edges, 64, num_neg_samples=number) for number in (200, 240, 170)]

    def train(model, call):
        for wrong in negatives:
            out = call(x, edges, torch.cat([edges, wrong], 1))
            target = (torch.arange(len(out)) < edges.shape[1]).float()
            F.binary_cross_entropy_with_logits(out, target).backward()
        return [p.grad for p in model.parameters()]

    compare(LinkPredictor(), train)


def test_an_encoder_inside_an_autoencoder():
    x, edges = graph()
    wrong = negative_sampling(edges, 64)

    def train(encoder, call):
        model = GAE(encoder)
        for _ in range(2):
            model.recon_loss(call(x, edges), edges, wrong).backward()
        return [p.grad for p in encoder.parameters()]

    compare(plain_gnn(), train)
