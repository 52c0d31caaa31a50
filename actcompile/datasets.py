"""Node classification data: real graphs through PyG's and OGB's own loaders, and generated graphs of any shape.

    task = load("pubmed")                                   # a real graph, or DataUnavailable
    task = generated(169_343, 1_166_243, 128, 40, seed=0)   # ogbn-arxiv's shape, learnable

A local copy of the raw files is looked for in the argument `root`, then in the folder named by the environment variable
ACTCOMPILE_DATA, then in `shared/data` next to the repository; where there is none the loader downloads. PyG writes its
processed files beside the raw ones, so local raw files are first copied to the user's cache folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcompile._generated import community_graph, random_splits, split_per_class


class DataUnavailable(RuntimeError):
    """A data set is neither on this machine nor can it be downloaded, or the package that loads it is missing."""


@dataclass(frozen=True)
class NodeTask:
    """One graph whose nodes are to be classified.

    x: [nodes, features] float32; edge_index: [2, edges] int64, row 0 the sources; y: [nodes] int64, -1 where unknown;
    masks: [nodes] bool, or [nodes, splits] where the data set ships several splits; metric: "accuracy" or "roc_auc".
    """

    name: str
    x: Tensor
    edge_index: Tensor
    y: Tensor
    train_mask: Tensor
    val_mask: Tensor
    test_mask: Tensor
    classes: int
    metric: str
    source: str

    @property
    def nodes(self) -> int:
        return self.x.shape[0]

    @property
    def edges(self) -> int:
        return self.edge_index.shape[1]

    @property
    def features(self) -> int:
        return self.x.shape[1]

    def split(self, index: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The training, validation and test masks, [nodes] bool each; a task with S splits uses number index % S."""
        masks = (self.train_mask, self.val_mask, self.test_mask)
        if masks[0].dim() == 1:
            return masks
        return tuple(m[:, index % m.shape[1]] for m in masks)  # type: ignore[return-value]

    def to_data(self) -> Any:
        """The same graph as a `torch_geometric.data.Data`."""
        data = _pyg("torch_geometric.data").Data
        return data(
            x=self.x,
            edge_index=self.edge_index,
            y=self.y,
            train_mask=self.train_mask,
            val_mask=self.val_mask,
            test_mask=self.test_mask,
        )


@dataclass(frozen=True)
class _Source:
    """Where a data set's files lie under a root, and how its loader is called with the folder to use."""

    folder: str  # what the loader is given, below the root
    files: str  # what must be there for an offline load, below `folder`
    load: Callable[[str], Any]
    splits: str = "shipped"  # or "per_class": drawn here
    metric: str = "accuracy"


def _pyg(module: str) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        package = module.split(".")[0]
        raise DataUnavailable(f"the package {package} is not installed: pip install actcompile[bench]") from error


def _dataset(name: str, *args: Any) -> Callable[[str], Any]:
    return lambda root: getattr(_pyg("torch_geometric.datasets"), name)(root, *args)


def _ogb_arxiv(root: str) -> Any:
    loader = _pyg("ogb.nodeproppred")
    attributes, storage = _pyg("torch_geometric.data.data"), _pyg("torch_geometric.data.storage")
    # ogb 1.3.6 reads its own processed file with torch.load's defaults, which since torch 2.6 refuse PyG's classes.
    known = [attributes.Data, attributes.DataEdgeAttr, attributes.DataTensorAttr, storage.GlobalStorage]
    with torch.serialization.safe_globals(known):
        dataset = loader.PygNodePropPredDataset("ogbn-arxiv", root)
        data, indices = dataset[0], dataset.get_idx_split()
    for part, key in (("train", "train"), ("val", "valid"), ("test", "test")):
        mask = torch.zeros(data.num_nodes, dtype=torch.bool)
        mask[indices[key]] = True
        data[f"{part}_mask"] = mask
    return [data]


_SOURCES = {
    "cora": _Source("Planetoid", "Cora/raw", _dataset("Planetoid", "Cora")),
    "pubmed": _Source("Planetoid", "PubMed/raw", _dataset("Planetoid", "PubMed")),
    "computers": _Source("Amazon", "Computers/raw", _dataset("Amazon", "Computers"), "per_class"),
    "cs": _Source("Coauthor", "CS/raw", _dataset("Coauthor", "CS"), "per_class"),
    "github": _Source("GitHub", "raw", _dataset("GitHub"), "per_class"),
    "cornell5": _Source("LINKXDataset", "cornell5/raw", _dataset("LINKXDataset", "cornell5"), "per_class"),
    "tolokers": _Source(
        "HeterophilousGraphDataset", "tolokers/raw", _dataset("HeterophilousGraphDataset", "tolokers"), metric="roc_auc"
    ),
    "minesweeper": _Source(
        "HeterophilousGraphDataset",
        "minesweeper/raw",
        _dataset("HeterophilousGraphDataset", "minesweeper"),
        metric="roc_auc",
    ),
    "flickr": _Source("Flickr", "raw", _dataset("Flickr")),
    "ogbn-arxiv": _Source("", "ogbn_arxiv/raw", _ogb_arxiv),
}


def names() -> list[str]:
    """The real data sets that `load` knows."""
    return list(_SOURCES)


def cache_folder() -> Path:
    """Where raw files are copied or downloaded to: `$XDG_CACHE_HOME/actcompile`, by default `~/.cache/actcompile`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "actcompile"


def load(name: str, root: str | os.PathLike[str] | None = None, seed: int = 0, download: bool = True) -> NodeTask:
    """Loads a real graph by name (see `names`).

    Where the data set ships no split, 20 nodes per class are for training, 30 for validation and the rest for testing,
    drawn with `seed` (Shchur et al., "Pitfalls of Graph Neural Network Evaluation", 2018).

    Raises ValueError for an unknown name and DataUnavailable where neither a copy nor a download is to be had.
    """
    if name not in _SOURCES:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(_SOURCES)}")
    spec = _SOURCES[name]
    folder = cache_folder() / "data" / spec.folder
    found = _local_copy(spec, root)
    if found is not None:
        _copy_raw(found / spec.folder / spec.files, folder / spec.files)
    elif not download and not _has_files(folder / spec.files):
        raise DataUnavailable(_advice(name, spec))
    try:
        data = spec.load(str(folder))[0]
    except DataUnavailable:
        raise
    except Exception as error:
        if _has_files(folder / spec.files):
            raise
        # Every loader fails in its own way without a network: fsspec, aiohttp, urllib and ogb share no base class.
        raise DataUnavailable(f"{_advice(name, spec)} The download failed: {error}") from error
    y = data.y.reshape(-1).long()
    if spec.splits == "per_class":
        masks = split_per_class(y, train=20, val=30, seed=seed)
    else:
        masks = (data.train_mask, data.val_mask, data.test_mask)
    return NodeTask(
        name,
        data.x.float(),
        data.edge_index,
        y,
        *masks,
        classes=int(y.max()) + 1,
        metric=spec.metric,
        source="local copy" if found is not None else "download",
    )


def generated(
    nodes: int, edges: int, features: int, classes: int, seed: int = 0, homophily: float = 0.6, signal: float = 2.4
) -> NodeTask:
    """A graph with planted communities: as learnable and as skewed as a citation graph, of exactly the shape asked for.

    A degree-corrected stochastic block model (Karrer and Newman, 2011): each node has a power-law weight, a source is
    drawn by weight, its target by weight from its own class with probability `homophily`, else from all nodes. There
    are no loops and no double edges; edges are sorted by source. Features are the class's centre plus unit noise, the
    centres `signal` noise units from their midpoints' planes, so that features alone do not tell the class.
    Random 60/20/20 split. The same arguments give the same graph.

    Raises ValueError where `edges` do not fit, or there are more classes than nodes.
    """
    edge_index, x, y = community_graph(nodes, edges, features, classes, seed, homophily, signal)
    masks = random_splits(nodes, seed)
    return NodeTask("generated", x, edge_index, y, *masks, classes=classes, metric="accuracy", source="generated")


def _local_copy(spec: _Source, root: str | os.PathLike[str] | None) -> Path | None:
    beside_repository = Path(__file__).resolve().parents[2] / "shared" / "data"
    candidates = [root, os.environ.get("ACTCOMPILE_DATA"), beside_repository]
    for candidate in candidates:
        if candidate and _has_files(Path(candidate) / spec.folder / spec.files):
            return Path(candidate)
    return None


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _sizes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in folder.iterdir()} if folder.is_dir() else {}


def _copy_raw(source: Path, target: Path) -> None:
    """Copies raw files unless the same ones are there; a half-made copy is never visible under the target's name."""
    if _sizes(source) == _sizes(target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in (target, target.parent / "processed"):
        shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        for path in source.iterdir():
            # Contents only: a read-only source must not make a cache that cannot be replaced.
            shutil.copyfile(path, scratch / path.name)
        os.replace(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _advice(name: str, spec: _Source) -> str:
    where = Path(spec.folder) / spec.files
    return (
        f"the data set {name!r} is not on this machine: connect to the network and let it be downloaded to "
        f"{cache_folder()}, or put its raw files into <folder>/{where} and pass root=<folder> or set "
        f"ACTCOMPILE_DATA=<folder>. datasets.generated(...) makes a graph of any shape without either."
    )
