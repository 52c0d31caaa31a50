"""torch's compile caches, in processes of their own: a graph comes back for its own config only, with its report.

With Inductor, so each process that misses the cache takes a while.
"""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import actcompile
from actcompile import Config, bits, keep
from actcompile.backend import Partitioner
from actcompile.report import cache
from actcompile.tracing.call import Situation

SCRIPT = """
import json, sys
import torch
import actcompile
from torch._dynamo.utils import counters

torch.manual_seed(0)
backend = sys.modules["actcompile.backend"]
options, calls, partition = json.loads(sys.argv[1]), [], backend.partition
training = (options or {}).pop("training", True)


def counted(*args, **options):
    calls.append(1)
    return partition(*args, **options)


backend.partition = counted
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
if options is None:
    run = torch.compile(model)
else:
    run = actcompile.compress(model, **{"min_bytes": 0, **options})
x = torch.randn(256, 64)
model.train(training)
torch.manual_seed(1)
run(x).square().sum().backward()
report = actcompile.explain(model)
print(json.dumps({
    "partitioned": len(calls),
    "hits": counters["aot_autograd"]["autograd_cache_hit"],
    "codecs": sorted(row.codec for graph in report.graphs for row in graph.rows if row.bytes_after),
    "bytes": report.saved_bytes_after,
    "code": report.code(),
    "gradient": model[2].weight.grad.flatten()[:8].tolist(),
}))
"""


ANALYSED = int(torch.__version__ < "2.13")  # older caches keep no report: it is made anew, and nothing is compiled


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """Runs one step in a new process, whose caches are this module's own."""
    folder = tmp_path_factory.mktemp("caches")

    def run(options):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(options)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.slow
def test_a_warm_cache_gives_a_config_its_own_graph_and_report(process):
    plain = process(None)
    assert plain["codecs"] == [] and plain["partitioned"] == 0
    first = process({"bits": 2})
    assert first["hits"] == 0 and first["partitioned"] == 1  # not the uncompressed graph of before
    assert any(c.startswith("quantize(2 bits") for c in first["codecs"]) and "pack_bits" in first["codecs"]
    other = process({"bits": None, "nonlinear_bits": None})
    assert other["hits"] == 0 and other["partitioned"] == 1
    assert not any(c.startswith("quantize") for c in other["codecs"])
    assert other["gradient"] == pytest.approx(plain["gradient"], rel=1e-4)
    assert first["gradient"] != other["gradient"]

    again = process({"bits": 2})
    assert again["hits"] == 1 and again["partitioned"] == ANALYSED
    assert {**again, "hits": 0, "partitioned": 1} == first  # the report too, and the gradient of the same seed
    assert process(None)["gradient"] == plain["gradient"]


@pytest.mark.slow
def test_a_warm_cache_gives_a_mode_its_own_graph(process):
    trained, evaluated = process({"bits": 8}), process({"bits": 8, "training": False})
    assert evaluated["hits"] == 0 and evaluated["partitioned"] == 1
    assert any(c.startswith("quantize") for c in trained["codecs"])
    assert not any(c.startswith("quantize") for c in evaluated["codecs"])
    assert trained["gradient"] != evaluated["gradient"]
    for training, first in ((True, trained), (False, evaluated)):
        again = process({"bits": 8, "training": training})
        assert again["hits"] == 1
        assert {**again, "hits": 0, "partitioned": 1} == first


@pytest.mark.slow
def test_a_warm_cache_gives_a_plan_its_own_graph_and_report(process, tmp_path):
    free, paths = process({"bits": 4}), [str(tmp_path / name) for name in ("four.json", "two.json")]
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    for number, path in zip((4, 2), paths, strict=True):
        options = {"min_bytes": 0, "bits": number}
        actcompile.explain(model, torch.randn(256, 64), options=options).plan().save(path)
    first, second = (process({"plan": path}) for path in paths)
    assert first["hits"] == second["hits"] == 0 and first["bytes"] == free["bytes"] > second["bytes"]
    assert first["gradient"] == free["gradient"] != second["gradient"]
    again = process({"plan": paths[0]})
    assert again["hits"] == 1 and {**again, "hits": 0, "partitioned": 1} == first


CONFIGS = [Config(), Config(bits=4), Config(rules={"a": keep()}), Config(rules={"a": bits(8)}), Config(min_bytes=0)]


def key(partitioner: Partitioner) -> bytes:
    """The object as Inductor pickles it into its caches' keys: without a memory of what it has seen."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream)
    pickler.fast = True
    pickler.dump(partitioner)
    return stream.getvalue()


def test_whether_a_cache_has_lost_a_report():
    def loaded(**entry):
        return SimpleNamespace(serialize=lambda: SimpleNamespace(**entry))

    assert cache.lost(loaded(compiled_bw=object()))  # as of torch 2.11
    assert not cache.lost(loaded(compiled_bw=object(), min_cut_info_str="{}"))
    assert not cache.lost(loaded(compiled_bw=None))  # for inference
    assert not cache.lost(lambda: None)  # compiled just now


def test_the_partitioner_is_its_config_when_pickled():
    for config in CONFIGS:
        made = Partitioner(config)
        copied = pickle.loads(pickle.dumps(made))
        assert copied.config == config
        assert copied.uuid() == made.uuid()
        assert key(copied) == key(made) == key(Partitioner(config))


def test_the_mode_is_part_of_the_identity():
    trained, evaluated = (Partitioner(Config(), Situation(training=training)) for training in (True, False))
    assert trained.uuid() != evaluated.uuid() and key(trained) != key(evaluated)
    assert not pickle.loads(pickle.dumps(evaluated)).situation.training


def test_no_two_configs_share_an_identity():
    assert len({Partitioner(config).uuid() for config in CONFIGS}) == len(CONFIGS)
    assert len({key(Partitioner(config)) for config in CONFIGS}) == len(CONFIGS)
    assert Partitioner(Config()).uuid() is not None


IDENTITIES = """
from pathlib import Path
import actcompile
from actcompile.backend import Partitioner, source_hash

for changed in (None, "passes/plan/plan.py", "kernels/blocks/levels.py", "config.py"):
    if changed:
        with (Path(actcompile.__file__).parent / changed).open("a") as file:
            file.write("\\n# changed\\n")
    source_hash.cache_clear()
    print(Partitioner(actcompile.Config()).uuid())
"""


def test_the_identity_covers_the_source(tmp_path):
    """A changed pass must not find graphs that the old one made."""
    package = Path(actcompile.__file__).parent
    shutil.copytree(package, tmp_path / "actcompile", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", IDENTITIES],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    seen = done.stdout.splitlines()
    assert seen[0] == str(Partitioner(Config()).uuid())
    assert len(set(seen)) == 4
