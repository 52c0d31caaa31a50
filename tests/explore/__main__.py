"""`python -m tests.explore --cases 10000 --seed 0`: draws cases from `seed` on, and writes what became of each.

Each line of the record (JSON) is a seed, the outcome, and for a wrong one the case as it was drawn and shrunk. Seeds
that the record has are not run again, so that a search can be interrupted. Workers are replaced after some hundred
cases, since compiled code is never quite freed; a worker that crashes or hangs leaves its seed as wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

CASES_OF_A_WORKER = 200
SECONDS_OF_A_CASE = 120  # of CPU time, shrinking included
SECONDS_OF_SILENCE = 3600  # after which a worker is taken for stuck, on a busy machine
SHRUNK_OF_A_KIND = 20
SHARE_OF_MEANS = 3  # the mean of many roundings is tested for one in so many


def main() -> int:
    given = _parser().parse_args()
    if given.worker:
        _work(given.worker, given.seed, given.cases, given.inner)
        return 0
    end = time.monotonic() + given.time
    seeds = [s for s in range(given.seed, given.seed + given.cases) if s not in _record(given.record)]
    while seeds and time.monotonic() < end:
        _start_worker(given.record, seeds[:CASES_OF_A_WORKER], given.inner, end)
        done = _record(given.record)
        seeds = [s for s in seeds if s not in done]
    outcomes = _record(given.record)
    for line in outcomes.values():
        if line["kind"] not in ("right", "skipped"):
            print(
                f"\n{line['kind']}: seed {line['seed']}: {line['detail']}\n  {line.get('shrunk') or line.get('case')}"
            )
    counts = Counter(line["kind"] for line in outcomes.values())
    print(f"\n{len(outcomes)} cases: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()))
    return int(any(kind not in ("right", "skipped") for kind in counts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="explore", description="Search for models that are compressed wrongly.")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="the first seed (default: the time)")
    parser.add_argument("--time", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--inner", choices=["aot_eager", "inductor"], default="aot_eager")
    parser.add_argument("--record", type=Path, default=Path("explored.jsonl"), help="lines are added to it")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser


def _record(path: Path) -> dict[int, dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["seed"]: line for line in map(json.loads, lines)}


def _start_worker(record: Path, seeds: list[int], inner: str, end: float) -> None:
    """Runs a stretch of seeds in a process of its own; what stopped it is the outcome of the seed that it was at."""
    first, last = seeds[0], seeds[-1]
    command = [sys.executable, "-m", "tests.explore", "--worker", str(record), "--inner", inner]
    command += ["--seed", str(first), "--cases", str(last - first + 1)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    known, since = len(_record(record)), time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        if len(_record(record)) != known:
            known, since = len(_record(record)), time.monotonic()
        if time.monotonic() > end:
            process.kill()
            process.wait()
            return
        if time.monotonic() - since > SECONDS_OF_SILENCE:
            process.kill()
            process.wait()
    if process.returncode:
        stopped = next((s for s in range(first, last + 1) if s not in _record(record)), None)
        if stopped is not None:
            kind = "hangs" if process.returncode == -signal.SIGKILL else "crashes"
            _write(record, {"seed": stopped, "kind": kind, "detail": f"exit status {process.returncode}"})


def _work(record: Path, first: int, count: int, inner: str) -> None:
    import torch

    from tests.explore.draw import draw
    from tests.explore.judge import judge, shrink

    torch.set_num_threads(1)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it tells of every graph break
    signal.signal(signal.SIGPROF, _too_long)
    done = _record(record)
    shrunk = Counter(line["kind"] for line in done.values() if "shrunk" in line)
    for seed in range(first, first + count):
        if seed in done:
            continue
        case, means = draw(seed, inner), seed % SHARE_OF_MEANS == 0
        line: dict = {"seed": seed, "kind": "hangs", "detail": f"more than {SECONDS_OF_A_CASE} s of CPU time"}
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS_OF_A_CASE)
        try:
            outcome = judge(case, means)
            line |= {"kind": outcome.kind, "detail": outcome.detail}
            if outcome.wrong and shrunk[outcome.kind] < SHRUNK_OF_A_KIND:
                line["shrunk"] = str(shrink(case, outcome.kind, means))
                shrunk[outcome.kind] += 1
        except TooLong:
            pass
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if line["kind"] not in ("right", "skipped"):
            line["case"] = str(case)
        _write(record, line | {"seconds": round(time.process_time() - started, 1)})


class TooLong(BaseException):
    """A case's time is over; no `except Exception` on the way takes this for an error of torch's."""


def _too_long(*_: object) -> None:
    raise TooLong


def _write(record: Path, line: dict) -> None:
    with record.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
