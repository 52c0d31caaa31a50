"""`check`: biases are seen where they are and only there, the activation to blame is named, nothing is touched."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import RGCNConv

import actcompile
from actcompile import check
from actcompile.__main__ import main
from actcompile.checking.draws import Task, Variant
from actcompile.checking.report import CheckReport
from actcompile.kernels.blocks.random_bits import draw_seed, rounding_seeded
from tests.helpers import SAVED, Mlp, gnn, graph, step

UNBIASED: dict[str, Any] = {"min_bytes": 0, "replay": 0, "bits": 2}


@pytest.fixture(autouse=True)
def _reset(one_thread: None) -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Squared(nn.Module):
    """A square, whose gradient needs its input twice over: 2 bits bias it; and a linear layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) ** 3)


def squared() -> tuple[nn.Module, Tensor]:
    return Squared(), torch.randn(2000, 16)


def by_name(report: CheckReport) -> dict[str, Any]:
    return {g.name: g for g in report.gradients}


def test_unbiased_rounding_is_fine_and_its_noise_is_measured() -> None:
    report = check(Mlp(), torch.randn(2000, 16), options=UNBIASED)
    found = by_name(report)
    assert report.ok and report.rounded == 1 and not report.suspects and report.remedy is None
    assert found["last.weight"].claim == "unbiased" and 0.01 < found["last.weight"].one_step < 1
    assert found["last.weight"].mean < found["last.weight"].one_step / 2
    for exact in ("first.weight", "first.bias", "last.bias"):
        assert found[exact].claim == "exact" and found[exact].one_step == 0 and found[exact].z == 0
    assert "fine: no bias is visible" in str(report) and "2 % " not in str(report).splitlines()[-1]


def test_a_bias_is_blamed_on_its_activation_and_mended() -> None:
    model, x = squared()
    report = check(model, x, options={**UNBIASED, "nonlinear_bits": 2})
    found = by_name(report)
    assert not report.ok
    assert found["first.weight"].wrong == "biased by more than 2%" and found["first.weight"].bias > 0.02
    assert "biased" in found["first.weight"].claim
    assert found["last.weight"].wrong == "" and found["last.weight"].claim == "unbiased"
    assert {s.module for s in report.suspects} == {"first"}
    assert report.remedy is not None and report.remedy.mended
    assert str(report.remedy) == 'rules={"first": actcompile.bits(8)}'
    assert report.remedy.bytes_after < report.bytes_before
    text = str(report)
    assert "WRONG: first.weight" in text and "to blame: first" in text and str(report.remedy) in text
    mended = eval(f"dict({report.remedy})", {"actcompile": actcompile})
    assert check(model, x, options={**UNBIASED, "nonlinear_bits": 2, **mended}).ok


def test_a_wrong_claim_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that calls everything unbiased."""
    monkeypatch.setattr("actcompile.checking.check.claim", lambda rows: ("unbiased" if rows else "exact", False))
    model, x = squared()
    report = check(model, x, options={**UNBIASED, "nonlinear_bits": 2})
    assert by_name(report)["first.weight"].wrong == "biased, and the plan claims that it is not"
    assert "the plan claims that it is not" in str(report)


def test_only_one_of_two_is_to_blame() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(16, 64), Squared(), nn.Linear(72, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat([self.a(x).relu(), self.b(x)], 1))

    report = check(Two(), torch.randn(2000, 16), options={**UNBIASED, "nonlinear_bits": 2})
    assert {s.module for s in report.suspects} == {"b.first"} and all(s.together == 1 for s in report.suspects)


@pytest.mark.parametrize("compressed", [False, True])
def test_nothing_of_the_users_is_touched(compressed: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 4))
    inputs = [torch.randn(64, 16)]
    if compressed:
        actcompile.compress(model, **SAVED)
        model(*inputs).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    reports = actcompile.explain(model).graphs
    first = check(model, *inputs, options=SAVED, seeds=8)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) == (g is None) and (g is None or torch.equal(p.grad, g))
    assert model.training and actcompile.explain(model).graphs == reports
    if compressed:
        with torch.compiler.set_stance("fail_on_recompile"):
            model(*inputs)
    assert check(model, *inputs, options=SAVED, seeds=8) == first


@pytest.mark.parametrize("fast", [True, False])
def test_dropout_draws_the_same_however_much_is_rounded(fast: bool) -> None:
    from actcompile.config import Config

    task, config = Task(Mlp(dropout=0.5), (torch.randn(64, 16),), {}, None), Config(**SAVED, fast_dropout=fast)
    with Variant(task, config, plain=True) as plain, Variant(task, config) as rounded:
        outputs = [plain.step(0)[0], rounded.step(1)[0], rounded.step(2)[0]]
        gradients = [rounded.step(seed)[1] for seed in (1, 1, 2)]
    assert all(torch.equal(o[0], outputs[0][0]) for o in outputs)
    assert all(torch.equal(a, gradients[1][n]) for n, a in gradients[0].items())
    assert not all(torch.equal(a, gradients[2][n]) for n, a in gradients[0].items())


def test_seeds_of_rounding_leave_the_default_generator_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with rounding_seeded(3):
        one, two = draw_seed(2, torch.device("cpu")), draw_seed(2, torch.device("cpu"))
    with rounding_seeded(3):
        again = draw_seed(2, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(one, again) and not torch.equal(one, two)
    draw_seed(2, torch.device("cpu"))
    assert not torch.equal(torch.get_rng_state(), state)


def test_inputs_with_gradients_keywords_losses_and_scalar_outputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor, scale: Tensor, y: Tensor | None = None) -> Any:
            out = self.last((self.first(x) * scale).sin())
            return {"out": out} if y is None else F.mse_loss(out, y)

    x, scale = torch.randn(500, 16, requires_grad=True), torch.rand(500, 1, requires_grad=True)
    model = Net()
    report = check(model, x, scale=scale, loss=lambda o: o["out"].square().mean(), options=UNBIASED, seeds=8)
    assert {"input 0", "input scale", "first.weight"} <= set(by_name(report)) and report.loss == "as given"
    assert x.grad is None and scale.grad is None
    report = check(model, x.detach(), scale.detach(), torch.randn(500, 8), options=UNBIASED, seeds=8)
    assert report.loss == "the output itself" and "input 0" not in by_name(report)


def test_across_graph_breaks_claims_cover_what_comes_back() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv = nn.Linear(16, 32), RGCNConv(32, 32, 3)

        def forward(self, x: Tensor, edges: Tensor, kinds: Tensor) -> Tensor:
            return self.conv(self.first(x) ** 3, edges, kinds).sin()

    x, edges = graph(500, 2000)
    report = check(Net(), x, edges, torch.randint(0, 3, (2000,)), options=UNBIASED, seeds=8)
    assert report.graphs > 1
    assert not any("claims that it is not" in g.wrong for g in report.gradients)


def test_what_is_not_rounded_is_said() -> None:
    report = check(Mlp(), torch.randn(8, 16), seeds=8)
    assert report.ok and report.rounded == 0 and any("min_bytes" in note for note in report.notes)
    report = check(Mlp().eval(), torch.randn(2000, 16), seeds=8, options=UNBIASED)
    assert report.ok and report.rounded == 0 and any("eval mode" in note for note in report.notes)
    assert check(Mlp().eval(), torch.randn(2000, 16), seeds=8, options={**UNBIASED, "when": "always"}).rounded == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": lambda x: x}, TypeError, "model must be a torch.nn.Module, got function: wrap"),
        ({"inputs": ()}, ValueError, "check.model. needs a batch"),
        ({"inputs": (torch.empty(4, 16, device="meta"),)}, ValueError, "must hold data"),
        ({"seeds": 2}, ValueError, "seeds must be an integer of at least 8, got 2"),
        ({"loss": 3}, TypeError, "loss must be a function"),
        ({"loss": lambda o: o}, TypeError, "loss.outputs. must return one number as a tensor, got a tensor of shape"),
        ({"loss": lambda o: o.detach().sum()}, ValueError, "does not depend on a tensor that requires a gradient"),
        ({"options": {"bit": 3}}, TypeError, "unknown option 'bit'"),
        ({"options": {"rules": {"nowhere": actcompile.keep()}}}, ValueError, "matches no module"),
        ({"model": Mlp().requires_grad_(False)}, ValueError, "there is none to check"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"model": Mlp(), "inputs": (torch.randn(8, 16),), **arguments}
    model, inputs = given.pop("model"), given.pop("inputs")
    with pytest.raises(error, match=message):
        check(model, *inputs, **given)


def test_a_model_with_a_memory_of_its_own_is_an_error() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.generator = nn.Linear(16, 4), torch.Generator().manual_seed(0)

        @torch.compiler.disable
        def noise(self, x: Tensor) -> Tensor:
            self.state = getattr(self, "state", 0) + 1
            return x + self.state

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.noise(x))

    with pytest.raises((ValueError, TypeError), match="same seed|copied"):
        check(Counting(), torch.randn(64, 16))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net_to_check.py"
    path.write_text(
        "import torch\nfrom tests.checking.test_check import Squared\n"
        "def make():\n    torch.manual_seed(0)\n"
        "    return Squared(), torch.randn(2000, 16), lambda out: out.square().mean()\n"
        "def without():\n    return Squared()\n"
    )
    options = ["--min-bytes", "0", "--replay", "0", "--seeds", "20"]
    assert main(["check", f"{path}:make", "--nonlinear-bits", "2", *options, "--json", str(tmp_path / "c.json")]) == 1
    shown = capsys.readouterr().out
    assert "WRONG" in shown and "actcompile.bits(8)" in shown and "loss: as given" in shown
    assert json.loads((tmp_path / "c.json").read_text())["ok"] is False
    assert main(["check", f"{path}:make", "--bits", "none", "--nonlinear-bits", "none", *options]) == 0
    assert main(["check", f"{path}:without", *options]) == 1
    assert "return (model, inputs) or (model, inputs, loss)" in capsys.readouterr().err


@pytest.mark.slow
def test_with_inductor() -> None:
    report = check(gnn("sage", dropout=0.5), *graph(), seeds=8, options={**SAVED, "inner": "inductor"})
    assert report.ok and report.rounded and report.inner == "inductor"
    assert all(g.arithmetic < 1e-4 for g in report.gradients if g.share > 1e-3)


def test_gradients_are_those_of_a_plain_step() -> None:
    """Without dropout, the reference that everything is compared with is what eager gives."""
    model, inputs = gnn("sage", dropout=0.0), graph()
    report = check(model, *inputs, loss=lambda o: (o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum(),
                   options=SAVED, seeds=8)  # fmt: skip
    eager = step(model, inputs, model.parameters())[1:]
    for (name, _), g in zip(model.named_parameters(), eager, strict=True):
        if by_name(report)[name].share > 1e-3:
            assert by_name(report)[name].size == pytest.approx(float(g.norm()), rel=1e-3)
