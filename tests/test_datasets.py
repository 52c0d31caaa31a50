"""Generated graphs have the shape and the communities asked for; real ones load without writing to their root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actcompile import datasets
from actcompile._generated import split_per_class


def _real(name: str) -> datasets.NodeTask:
    try:
        return datasets.load(name, download=False)
    except datasets.DataUnavailable as reason:
        pytest.skip(str(reason))


@settings(max_examples=40, deadline=None)
@given(nodes=st.integers(2, 60), fill=st.floats(0, 1), classes=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_generated_graph_has_exactly_the_shape_asked_for(nodes: int, fill: float, classes: int, seed: int) -> None:
    classes, edges = min(classes, nodes), int(fill * nodes * (nodes - 1))
    task = datasets.generated(nodes, edges, 3, classes, seed)
    source, target = task.edge_index
    assert (task.nodes, task.edges, task.features, task.classes) == (nodes, edges, 3, classes)
    assert not (source == target).any()
    assert torch.unique(source * nodes + target).numel() == edges
    assert bool((source.diff() >= 0).all())
    assert set(task.y.tolist()) == set(range(classes))
    assert bool((task.train_mask.int() + task.val_mask.int() + task.test_mask.int() == 1).all())


def test_generated_graph_depends_on_the_seed_alone() -> None:
    first, again, other = (datasets.generated(300, 1500, 4, 3, seed) for seed in (1, 1, 2))
    assert torch.equal(first.edge_index, again.edge_index) and torch.equal(first.x, again.x)
    assert not torch.equal(first.edge_index, other.edge_index)


def test_generated_graph_is_homophilous_and_skewed() -> None:
    task = datasets.generated(20_000, 140_000, 8, 20, seed=0)
    same = (task.y[task.edge_index[0]] == task.y[task.edge_index[1]]).float().mean()
    degrees = torch.bincount(task.edge_index[1], minlength=task.nodes)
    assert 0.6 < same < 0.75
    assert degrees.max() > 50 * degrees.float().mean()


def test_neighbours_tell_more_than_features_alone() -> None:
    task = datasets.generated(4_000, 40_000, 32, 8, seed=0)
    centres = torch.stack([task.x[task.train_mask & (task.y == c)].mean(0) for c in range(8)])
    summed = task.x.index_add(0, task.edge_index[1], task.x[task.edge_index[0]])
    count = 1 + torch.bincount(task.edge_index[1], minlength=task.nodes)

    def accuracy(x: torch.Tensor) -> float:
        chosen = torch.cdist(x, centres).argmin(1)
        return float((chosen == task.y)[task.test_mask].float().mean())

    alone, together = accuracy(task.x), accuracy(summed / count[:, None])
    assert alone > 2 / 8
    assert together > alone + 0.1


@pytest.mark.parametrize(("nodes", "edges", "classes", "word"), [(5, 21, 2, "edges"), (5, 3, 6, "classes")])
def test_impossible_shapes_are_refused(nodes: int, edges: int, classes: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        datasets.generated(nodes, edges, 2, classes)


def test_split_takes_so_many_of_each_class_and_no_unknown_label() -> None:
    y = torch.arange(400) % 4 - 1
    train, val, test = split_per_class(y, train=20, val=30, seed=3)
    for label in range(3):
        assert [int((m & (y == label)).sum()) for m in (train, val, test)] == [20, 30, 50]
    assert not (train | val | test)[y < 0].any()
    assert torch.equal(train, split_per_class(y, 20, 30, seed=3)[0])
    assert not torch.equal(train, split_per_class(y, 20, 30, seed=4)[0])


@pytest.mark.parametrize(
    ("name", "nodes", "edges", "features", "classes", "metric"),
    [
        ("pubmed", 19_717, 88_648, 500, 3, "accuracy"),
        ("computers", 13_752, 491_722, 767, 10, "accuracy"),
        ("tolokers", 11_758, 1_038_000, 10, 2, "roc_auc"),
    ],
)
def test_real_graphs(name: str, nodes: int, edges: int, features: int, classes: int, metric: str) -> None:
    task = _real(name)
    assert (task.nodes, task.edges, task.features, task.classes, task.metric) == (
        nodes,
        edges,
        features,
        classes,
        metric,
    )
    for index in (0, 11):
        train, val, test = task.split(index)
        assert train.shape == (nodes,) and train.any()
        assert not ((train & val) | (train & test) | (val & test)).any()


def test_splits_differ_where_the_data_set_ships_several() -> None:
    task = _real("tolokers")
    assert not torch.equal(task.split(0)[0], task.split(1)[0])
    assert torch.equal(task.split(0)[0], task.split(10)[0])


@pytest.fixture
def cora_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root that holds Cora's raw files alone, and an empty cache."""
    _real("cora")
    raw = datasets.cache_folder() / "data" / "Planetoid" / "Cora" / "raw"
    root = tmp_path / "root"
    shutil.copytree(raw, root / "Planetoid" / "Cora" / "raw")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ACTCOMPILE_DATA", raising=False)
    return root


def test_loading_writes_nothing_to_the_root(cora_root: Path) -> None:
    before = sorted(p.relative_to(cora_root) for p in cora_root.rglob("*"))
    task = datasets.load("cora", root=cora_root)
    assert task.nodes == 2_708 and task.source == "local copy"
    assert sorted(p.relative_to(cora_root) for p in cora_root.rglob("*")) == before
    assert (datasets.cache_folder() / "data" / "Planetoid" / "Cora" / "processed").is_dir()


def test_root_from_the_environment_and_from_the_cache(cora_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTCOMPILE_DATA", str(cora_root))
    first = datasets.load("cora", download=False)
    assert torch.equal(first.x, datasets.load("cora", root=cora_root).x)


def test_other_raw_files_replace_the_cached_ones(cora_root: Path) -> None:
    datasets.load("cora", root=cora_root)
    cached = datasets.cache_folder() / "data" / "Planetoid" / "Cora" / "raw" / "ind.cora.test.index"
    cached.write_text("damaged")
    assert datasets.load("cora", root=cora_root).nodes == 2_708
    assert cached.read_text() != "damaged"


def test_missing_data_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ACTCOMPILE_DATA", raising=False)
    with pytest.raises(datasets.DataUnavailable, match=r"Flickr.raw.*ACTCOMPILE_DATA"):
        datasets.load("flickr", download=False)
    with pytest.raises(ValueError, match="pubmed"):
        datasets.load("pubmedd")


def test_missing_package_names_the_extra(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch_geometric'] = sys.modules['torch_geometric.datasets'] = None\n"
        "from actcompile import datasets\n"
        "try: datasets.load('flickr')\n"
        "except datasets.DataUnavailable as error: print(error)\n"
        "print(datasets.generated(10, 20, 2, 2).edges)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert "pip install actcompile[bench]" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "20"
