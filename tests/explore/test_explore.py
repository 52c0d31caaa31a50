"""The search itself: a case is a function of its seed, right is called right, a planted fault is found and shrunk."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import actcompile
from actcompile.passes.codecs import encode as encoding
from actcompile.passes.codecs.codecs import Codec, PackBits
from actcompile.passes.graph.split import Split, call
from tests.explore.blocks import COMBINED, LEAVES
from tests.explore.draw import Block, Case, Model, batch, draw
from tests.explore.judge import _with_zeros, judge, run, shrink
from tests.explore.messages import BINARY, EDGES, PRODUCTS, REDUCE, UNARY, Expression, Message
from tests.explore.messages import LEAVES as LEAVES_OF_MESSAGES

ROOT = Path(__file__).resolve().parents[2]
PLAIN = Case(
    seed=0,
    blocks=(Block("linear", 1), Block("tanh", 2)),
    nodes=64,
    edges=200,
    graph="random",
    head="nodes",
    loss="squares",
    training=True,
    frozen=False,
    input_gradient=False,
    way="compress",
    dynamic=False,
    changing=False,
    options={"inner": "aot_eager", "min_bytes": 0},
)
LOSSLESS = replace(PLAIN, options={**PLAIN.options, "bits": None, "nonlinear_bits": None})


def test_a_case_is_a_function_of_its_seed() -> None:
    for seed in range(300):
        assert draw(seed) == draw(seed)
    case = next(c for c in map(draw, range(100)) if c.nodes > 10 and c.edges > 10)
    first, second = Model(case), Model(case)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(batch(case), batch(case), strict=True))
    assert batch(case, 1)[0].shape != batch(case)[0].shape


def test_every_block_and_every_graph_is_drawn() -> None:
    text = "\n".join(str(draw(seed)) for seed in range(3000))
    assert all(name in text for name in (*LEAVES, *COMBINED, "'hub'", "'no edges'", "'one node'", "'function'"))
    assert all(f"over {name}," in text for name in EDGES) and all(f"{name}[" in text for name in REDUCE)
    assert all(name in text for name in (*LEAVES_OF_MESSAGES, *UNARY, *BINARY, *PRODUCTS, "'float64'", "'bfloat16'"))


def test_every_message_runs_in_eager_and_is_shrunk() -> None:
    for name in REDUCE:
        pair = Expression("mul", (Expression("source"), Expression("edge")))
        message = Message(Expression("sin", (pair,)), "edges", name, 2)
        case = replace(PLAIN, blocks=(Block("message", 5, message=message),), dtype="float64")
        found = run(case, Model(case), batch(case))
        assert found.outputs[0].isfinite().all() and found.gradients["encoder.weight"].dtype is torch.float64, name
        assert replace(message, expression=pair) in list(message.smaller())


def test_every_block_runs_in_eager_and_has_gradients() -> None:
    for name in LEAVES:
        case = replace(PLAIN, blocks=(Block(name, 5),))
        found = run(case, Model(case), batch(case))
        assert found.outputs[0].isfinite().all() and "encoder.weight" in found.gradients, name


@pytest.mark.parametrize("case", [PLAIN, LOSSLESS], ids=["rounded", "lossless"])
def test_what_is_right_is_called_right(case: Case) -> None:
    assert judge(case, means=case.rounds).kind == "right"


def test_what_plain_compile_cannot_do_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("eager, too")

    monkeypatch.setitem(LEAVES, "sin", lambda: type("Broken", (torch.nn.Module,), {"forward": broken})())
    outcome = judge(replace(PLAIN, blocks=(Block("sin", 1),)))
    assert outcome.kind == "skipped" and "eager, too" in outcome.detail


def test_a_wrong_gradient_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks come back negated."""

    def wrong(split: Split, codec: Codec, *others: Any) -> Any:
        encoded, decode = encoding.encode(split, codec, *others)
        if not isinstance(codec, PackBits):
            return encoded, decode
        flip = torch.ops.aten.logical_not.default
        return encoded, lambda parts, sizes: call(split.backward.graph, flip, decode(parts, sizes))

    monkeypatch.setattr("actcompile.passes.write.rewrite.encode", wrong)
    inside = Block("sum", 0, (Block("relu", 2), Block("linear", 3)))
    case = replace(LOSSLESS, head="both", blocks=(Block("tanh", 1), inside))
    outcome = judge(case)
    assert outcome.kind == "gradients" and "is off by" in outcome.detail
    assert str(shrink(case, outcome.kind, means=False)).startswith("relu\n")


def test_a_gradient_of_zero_is_none_at_all_but_one_that_matters_is_missed() -> None:
    """Behind a graph break, what is not used has a gradient of zero, and none in eager."""
    found = run(PLAIN, Model(PLAIN), batch(PLAIN))
    more = replace(found, gradients={**found.gradients, "unused": torch.zeros(3)})
    assert (
        _with_zeros(found, more).gradients.keys() == more.gradients.keys() == _with_zeros(more, found).gradients.keys()
    )
    less = replace(found, gradients={n: g for n, g in found.gradients.items() if n != "head.bias"})
    assert _with_zeros(less, found).gradients.keys() == less.gradients.keys()


def test_a_wrong_report_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actcompile.Report, "saved_bytes_after", property(lambda self: 10**6))
    assert judge(PLAIN).kind == "bytes"


def test_the_record_is_kept_and_resumed(tmp_path: Path) -> None:
    record = tmp_path / "explored.jsonl"
    record.write_text(json.dumps({"seed": 12, "kind": "right", "detail": ""}) + "\n")
    command = [sys.executable, "-m", "tests.explore", "--seed", "11", "--cases", "2", "--record", str(record)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["seed"] for line in lines] == [12, 11]
    assert "2 cases: " in ran.stdout
