"""The published claims of EXACT and i-EXACT, each with the number that was measured here and a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.accounting import PUBLISHED, modelled

Summaries = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""By graph and variant, what `cases.paper.summary` returns."""

REPRODUCED, NOT, UNTESTABLE = "reproduced", "not reproduced", "not testable here"
LOST = 0.005  # of the metric: EXACT's abstract promises 0.2 to 0.5 % less
Verdict = dict[str, Any]


def verdicts(found: Summaries, paired: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """One entry for each claim: the claim, the verdict, the number."""
    return [_memory(found), _memory_of_exact(), _speed(paired), _accuracy(found), _levels(found)]


def _verdict(claim: str, verdict: str, number: str) -> Verdict:
    return {"claim": claim, "verdict": verdict, "number": number}


def _memory(found: Summaries) -> Verdict:
    claim = "i-EXACT: over 15 % less activation memory than EXACT"
    model = modelled()
    published = 1 - model[64] / model[1]
    measured = [
        1 - v["iexact-64"]["saved_bytes"] / v["exact"]["saved_bytes"]
        for v in found.values()
        if {"exact", "iexact-64"} <= set(v)
    ]
    number = f"{100 * published:.1f} % by the byte model of the published network (published: {_published():.1f} %)"
    if measured:
        number += f"; {100 * min(measured):.1f} to {100 * max(measured):.1f} % saved bytes on the graphs run here"
    good = published > 0.15 and all(m > 0.15 for m in measured)
    return _verdict(claim, REPRODUCED if good else NOT, number)


def _published() -> float:
    return 100 * (1 - PUBLISHED[64] / PUBLISHED[1])


def _memory_of_exact() -> Verdict:
    model = modelled()
    ratio = model["FP32"] / model[1]
    text = f"{ratio:.1f} times less for the arxiv network, by the byte model; 32 is said of other networks"
    return _verdict("EXACT: up to 32 times less activation memory", UNTESTABLE, text)


def _speed(paired: Mapping[str, Mapping[str, Any]]) -> Verdict:
    claim = "i-EXACT: about 5 % faster than EXACT"
    ratios = {name: paired[name]["ratio"] for name in ("iexact-8", "iexact-64") if name in paired}
    if not ratios:
        return _verdict(claim, UNTESTABLE, "no steps were timed in this run")
    parts = [f"{name} takes {100 * (r - 1):+.1f} % time" for name, r in ratios.items()]
    good = min(ratios.values()) <= 0.97
    return _verdict(claim, REPRODUCED if good else NOT, f"{', '.join(parts)} against EXACT, on this CPU")


def _accuracy(found: Summaries) -> Verdict:
    claim = "EXACT, i-EXACT: accuracy within 0.5 percentage points of full precision"
    if not found:
        return _verdict(claim, UNTESTABLE, "no graph was run")
    parts, worst = [], 0.0
    for data, v in found.items():
        published = [n for n in v if n == "exact" or n.startswith("iexact")]
        if "inductor" not in v or not published:
            continue
        losses = {n: v["inductor"]["mean"] - v[n]["mean"] for n in published}
        name = max(losses, key=lambda n: losses[n])
        mean = sum(losses.values()) / len(losses)
        worst = max(worst, mean)
        parts.append(f"{data} {-100 * mean:+.2f} on average, {name} {-100 * losses[name]:+.2f}")
    return _verdict(claim, REPRODUCED if worst <= LOST else NOT, "percentage points: " + "; ".join(parts))


def _levels(found: Summaries) -> Verdict:
    claim = "i-EXACT: variance-minimising levels do not hurt accuracy, and compound with larger blocks"
    parts, good = [], True
    for data, v in found.items():
        pairs = [(v[n], v[f"{n}-vm"]) for n in v if n.startswith(("iexact", "exact")) and f"{n}-vm" in v]
        if pairs:
            gain = sum(b["mean"] - a["mean"] for a, b in pairs) / len(pairs)
            good = good and gain >= -LOST
            parts.append(f"{data} {100 * gain:+.2f}")
    if not parts:
        return _verdict(claim, UNTESTABLE, "no pairs were run")
    text = f"mean change of the metric by the levels, percentage points: {'; '.join(parts)} (variances: `gradients`)"
    return _verdict(claim, REPRODUCED if good else NOT, text)
