"""A process that trains one variant, one command a line: `python -m bench.worker` reads and writes JSON.

Commands: {"start": workload, "kind": its class, "variant": name, "warm_up": steps a batch}, then any of
{"do": "step" | "saved" | "reported" | "predicted" | "peak" | "tensors" | "bound" | "profile"}, and
{"gradients": seeds, "path": file}. Every answer is one line; an exception becomes {"error": text}.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import traceback
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import actcompile
from bench.bound import bound
from bench.measure import Unmeasurable, peak_memory, peak_of_tensors, saved_tensors, seconds
from bench.variants import VARIANTS
from bench.workload import Described, Training, Workload
from bench.zoo import Brought

KINDS: dict[str, type[Described]] = {kind.__name__: kind for kind in (Workload, Brought)}


class Worker:
    """One method per command."""

    def __init__(self) -> None:
        self.training: Training | None = None

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        if "start" in command:
            workload = KINDS[command["kind"]](**command["start"])
            return self.start(workload, command["variant"], command["warm_up"])
        if self.training is None:
            raise RuntimeError("the first command must be start")
        if "gradients" in command:
            return self.gradients(self.training, command["gradients"], command["path"])
        return getattr(self, command["do"])(self.training)

    def start(self, workload: Described, name: str, warm_up: int) -> dict[str, Any]:
        torch.set_num_threads(workload.threads)
        chosen = VARIANTS[name]
        if chosen.compiled:
            _load_compiler(workload.device)
        training = workload.training(chosen.prepare, chosen.checkpointed)
        batches = range(len(training.batches))
        # A round is one step on every batch: the first one compiles all that sizes that change ask for.
        rounds = [sum(seconds(training.step, training.device) for _ in batches) for _ in range(warm_up)]
        if training.device.startswith("cuda"):
            torch.cuda.empty_cache()  # other processes use the same device
        self.training = training
        return {"warm_up_seconds": rounds}

    def step(self, training: Training) -> dict[str, Any]:
        return {"seconds": seconds(training.step, training.device)}

    def reported(self, training: Training) -> dict[str, Any]:
        """What `explain` says is saved for the first batch."""
        one = len(training.batches) == 1  # with several, what was compiled is for sizes that no batch need have
        inputs = () if one else training.batches[0].inputs
        return {"bytes": actcompile.explain(training.run, *inputs).saved_bytes_after}

    def predicted(self, training: Training) -> dict[str, Any]:
        """What is predicted of a step on the first batch, in bytes."""
        found = actcompile.estimate(training.model, *training.batches[0].inputs)
        return {key: getattr(found, key) for key in ("saved_before", "saved_after", "peak_before", "peak_after")}

    def saved(self, training: Training) -> dict[str, Any]:
        found = saved_tensors(training.forward(), training.alive_anyway())
        tensors = [
            {"shape": list(t.shape), "dtype": str(t.dtype)[len("torch.") :], "bytes": t.untyped_storage().nbytes()}
            for t in found
        ]
        return {"bytes": sum(t["bytes"] for t in tensors), "tensors": tensors}

    def peak(self, training: Training) -> dict[str, Any]:
        try:
            rises = [peak_memory(lambda: training.step(0), training.device) for _ in range(3)]
        except Unmeasurable as reason:
            return {"bytes": None, "reason": str(reason)}
        return {"bytes": statistics.median(rises)}

    def tensors(self, training: Training) -> dict[str, Any]:
        """The same, of torch's tensors alone."""
        step = functools.partial(training.step, 0)
        on_device = training.device.startswith("cuda")
        return {"bytes": peak_memory(step, training.device) if on_device else peak_of_tensors(step)}

    def bound(self, training: Training) -> dict[str, Any]:
        """The least that a step on the first batch can take, of a variant that runs op by op."""
        return bound(lambda: training.step(0))

    def profile(self, training: Training) -> dict[str, Any]:
        """For how long a step on the first batch keeps the device busy, and the dozen kernels that take longest."""
        on = ProfilerActivity.CUDA if training.device.startswith("cuda") else ProfilerActivity.CPU
        with profile(activities=[on]) as found:
            training.step(0)
        spent = [(e, 1e-3 * (e.self_device_time_total or e.self_cpu_time_total)) for e in found.key_averages()]
        longest = sorted(spent, key=lambda pair: -pair[1])[:12]
        kernels = [{"name": e.key[:120], "calls": e.count, "ms": ms} for e, ms in longest]
        return {"busy_ms": sum(ms for _, ms in spent), "kernels": kernels}

    def gradients(self, training: Training, seeds: list[int], path: str) -> dict[str, Any]:
        torch.save([training.gradients(seed) for seed in seeds], path)
        return {"path": path}


def _load_compiler(device: str) -> None:
    """Compiles next to nothing, so that loading Inductor and precompiling its headers count for no variant."""
    torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    torch._dynamo.reset()


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
