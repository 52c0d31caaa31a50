"""Real graphs, several seeds, compressed and uncompressed: does the test metric change?"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from bench.registry import Options, case
from bench.results import progress, show
from bench.trials import Record, Trial, runs, select

VARIANTS = ("inductor", "default", "4-bit")
UNCOMPRESSED = VARIANTS[0]
TRIALS = (
    Trial("pubmed", encoder=True, epochs=80, weight_decay=5e-4),
    Trial("computers", encoder=True, epochs=40),
    Trial("cs", encoder=True, epochs=40, weight_decay=5e-4),
    Trial("tolokers", hidden=64, dropout=0.2, encoder=True, epochs=50),
)


@case("accuracy", "PubMed, Amazon Computers, Coauthor CS, tolokers: test metric, compressed and not, over seeds")
def run(options: Options) -> dict[str, Any]:
    seeds = range(options.seeds or (2 if options.quick else 5))
    trials = select([Trial("cora", hidden=16, layers=2, encoder=True, epochs=5)] if options.quick else TRIALS, options)
    names = [UNCOMPRESSED, *options.pick(VARIANTS[1:])]
    record = Record(options.out / "accuracy.jsonl")
    results: dict[str, dict[str, Any]] = {}
    with progress(options.console) as bar:
        task = bar.add_task("", total=len(trials) * len(names) * len(seeds))
        for trial in trials:
            scores = {}
            for name in names:
                bar.update(task, description=f"{trial.data}, {name}")
                made = runs(trial, name, seeds, record, lambda: bar.advance(task))
                scores[name] = [r["score"] for r in made]
            results[trial.data] = {name: _summary(scores[name], scores[UNCOMPRESSED]) for name in names}
    rows = []
    for data, summaries in results.items():
        for name, s in summaries.items():
            first = data if name == UNCOMPRESSED else ""
            rows.append([first, name, f"{100 * s['mean']:.2f}", f"{100 * s['standard_error']:.2f}", s["verdict"]])
    header = ["data", "variant", "test metric, %", "standard error", "verdict"]
    show(options.console, f"mean over {len(seeds)} seeds; tolokers in ROC-AUC", header, rows)
    return {"settings": {"trials": [asdict(t) for t in trials], "seeds": len(seeds)}, "data": results}


def _summary(scores: list[float], reference: list[float]) -> dict[str, Any]:
    """Mean, standard error of the mean, and the verdict against the uncompressed scores.

    "within": the means differ by no more than the uncompressed seeds' standard error. Seeds start from the same
    parameters and split in every mode, so the standard error of the paired differences is given beside it.
    """
    count = len(scores)
    pairs = [a - b for a, b in zip(scores, reference, strict=True)]
    difference = statistics.mean(pairs)
    own, allowed, paired = (statistics.stdev(v) / count**0.5 for v in (scores, reference, pairs))
    within = abs(difference) <= allowed
    verdict = "within" if within else f"{100 * difference:+.2f} ± {100 * paired:.2f}"
    return {
        "mean": statistics.mean(scores),
        "standard_error": own,
        "difference": difference,
        "paired_standard_error": paired,
        "within": within,
        "verdict": "" if scores is reference else verdict,
        "scores": scores,
    }
