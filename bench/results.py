"""Result files: JSON with the machine and the versions in it, and tables of the same numbers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

PACKAGES = ("torch", "triton", "torch-geometric", "numpy")


def environment() -> dict[str, Any]:
    """The machine, the versions and the settings that a timing depends on."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "allocator": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("MALLOC_", "LD_PRELOAD"))},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(out: Path, name: str, content: dict[str, Any]) -> Path:
    """Writes <out>/<name>.json, with the environment added; a reader never sees half a file."""
    out.mkdir(parents=True, exist_ok=True)
    path, scratch = out / f"{name}.json", out / f".{name}.json.part"
    scratch.write_text(json.dumps({"case": name, "environment": environment(), **content}, indent=1) + "\n")
    scratch.replace(path)
    return path


def earlier(out: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The results of an earlier run on this machine with the same versions and settings, else nothing."""
    path = out / f"{name}.json"
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    same = content.get("environment") == environment() and content.get("settings") == json.loads(json.dumps(settings))
    return content if same else {}


def megabytes(count: int | None) -> str:
    """Bytes as MB of 10**6 bytes, for tables."""
    return "n/a" if count is None else f"{count / 1e6:,.1f}"


def show(console: Console, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table: the first column to the left, numbers to the right."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def progress(console: Console) -> Progress:
    """A progress bar that names what runs now, counts, and estimates the rest."""
    name, bar, count = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(name, bar, count, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
