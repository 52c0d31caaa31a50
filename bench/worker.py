"""A process that trains one variant, one command a line: `python -m bench.worker` reads and writes JSON.

Commands: {"start": workload, "variant": name, "warm_up": steps}, then any of "step", "saved", "peak", and
{"gradients": seeds, "path": file}. Every answer is one line; an exception becomes {"error": text}.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import traceback
from typing import Any

import torch

from bench.measure import Unmeasurable, peak_memory, saved_tensors, seconds
from bench.variants import VARIANTS
from bench.workload import Training, Workload


class Worker:
    """One method per command."""

    def __init__(self) -> None:
        self.training: Training | None = None

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        if "start" in command:
            return self.start(Workload(**command["start"]), command["variant"], command["warm_up"])
        if self.training is None:
            raise RuntimeError("the first command must be start")
        if "gradients" in command:
            return self.gradients(self.training, command["gradients"], command["path"])
        return getattr(self, command["do"])(self.training)

    def start(self, workload: Workload, name: str, warm_up: int) -> dict[str, Any]:
        torch.set_num_threads(workload.threads)
        chosen = VARIANTS[name]
        training = Training(workload, chosen.prepare, chosen.checkpointed)
        first = [seconds(training.step, workload.device) for _ in range(warm_up)]
        self.training = training
        return {"warm_up_seconds": first}

    def step(self, training: Training) -> dict[str, Any]:
        return {"seconds": seconds(training.step, training.workload.device)}

    def saved(self, training: Training) -> dict[str, Any]:
        found = saved_tensors(training.forward(), training.alive_anyway())
        tensors = [
            {"shape": list(t.shape), "dtype": str(t.dtype)[len("torch.") :], "bytes": t.untyped_storage().nbytes()}
            for t in found
        ]
        return {"bytes": sum(t["bytes"] for t in tensors), "tensors": tensors}

    def peak(self, training: Training) -> dict[str, Any]:
        try:
            rises = [peak_memory(training.step, training.workload.device) for _ in range(3)]
        except Unmeasurable as reason:
            return {"bytes": None, "reason": str(reason)}
        return {"bytes": statistics.median(rises)}

    def gradients(self, training: Training, seeds: list[int], path: str) -> dict[str, Any]:
        torch.save([training.gradients(seed) for seed in seeds], path)
        return {"path": path}


def main() -> None:
    # Answers go to the original stdout; whatever libraries print must not get between them.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            reply = worker.answer(json.loads(line))
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
