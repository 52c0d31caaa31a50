"""The byte model against the published numbers, against a count of tensors, and against our own report."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import actcompile
from bench import accounting, models
from bench.accounting import MB, PUBLISHED, Setting
from bench.cases.accounting import plan


@pytest.mark.parametrize("key", PUBLISHED)
def test_every_published_number_is_reproduced(key: str | int) -> None:
    assert accounting.modelled()[key] == pytest.approx(PUBLISHED[key], abs=0.05)


@pytest.mark.parametrize("key", PUBLISHED)
def test_what_is_missing_is_small_and_never_too_much(key: str | int) -> None:
    missing = PUBLISHED[key] - accounting.modelled()[key]
    assert -0.005 <= missing <= 0.025  # published to 0.01


def test_per_node_bytes_of_exact() -> None:
    """88 bytes of payload, 32 of metadata, 64 of masks."""
    fewer, more = (accounting.compressed_bytes(Setting(nodes=n)) for n in (1000, 2000))
    assert more - fewer == 1000 * (88 + 32 + 64)


@given(rows=st.integers(1, 5000), width=st.integers(1, 300), per_block=st.integers(1, 100))
def test_quantized_bytes_count_real_tensors(rows: int, width: int, per_block: int) -> None:
    x = torch.zeros(rows, width)
    fitting = per_block
    while fitting > 1 and fitting * width > 1024:
        fitting -= 1
    blocks = [b for b in x.split(fitting) if len(b) == fitting]
    left = x[len(blocks) * fitting :]
    codes = torch.zeros(-(-sum(b.numel() for b in blocks) // 4), dtype=torch.uint8)
    metadata = torch.zeros(len(blocks), 2, dtype=torch.bfloat16)
    expected = sum(t.nbytes for t in (codes, metadata, left))
    assert accounting.quantized_bytes(rows, width, per_block, bits=2) == expected


def test_full_precision_is_what_eager_saves_for_one_layer_more() -> None:
    """A layer more adds its conv inputs, BatchNorm's input, ReLU's output and dropout's mask to every node."""
    small, large = (accounting.full_precision_bytes(Setting(nodes=1000, layers=n)) for n in (3, 4))
    assert large - small == 1000 * 128 * (2 * 4 + 4 + 4 + 1)


def test_our_plans_for_the_published_network() -> None:
    setting = Setting()
    default, four = (plan(setting, {"replay": 0.4, "bits": bits}) for bits in (2, 4))
    assert default["saved_bytes"] < four["saved_bytes"] < default["saved_bytes_before"] / 40
    assert default["their_megabytes"] <= accounting.PUBLISHED[64] / 2  # half of i-EXACT's best
    assert default["their_megabytes"] * MB == default["saved_bytes"] + 8 * setting.training_nodes
    assert plan(setting, {"replay": 0.4, "bits": 2}, edges=2_315_598) == default  # nothing has a row per edge


def test_their_convention_adds_labels_only() -> None:
    model = models.build("sage", 16, 4, hidden=32, layers=2)
    x, edges = torch.empty(100, 16, device="meta"), torch.empty(2, 300, dtype=torch.long, device="meta")
    report = actcompile.explain(model, x, edges, options={"inner": "aot_eager"})
    assert accounting.in_their_convention(report, 0) == report.saved_bytes_after / MB
    assert accounting.in_their_convention(report, MB) == report.saved_bytes_after / MB + 8
