"""What this machine has of what actcompile can use: `python -m actcompile env`."""

import getpass
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from actcompile.passes.graph import _torch

from . import __version__
from .backend import check_compilers
from .datasets import cache_folder

PACKAGES = ("numpy", "scipy", "rich", "triton", "torch-geometric", "ogb")


@dataclass(frozen=True)
class Part:
    """Something a user may want to do, and what it lacks here; empty where it works."""

    name: str
    lacks: str


def versions() -> dict[str, str]:
    """Each package's version; "not installed" where it is not."""
    found = {"actcompile": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware() -> dict[str, str]:
    """The processors and compilers that torch would use here."""
    return {
        "platform": platform.platform(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "C++ compiler": _compiler(),
        "CUDA": _cuda(),
    }


def folders() -> dict[str, str]:
    """Where data sets and compiled code are kept. Both may be deleted; they are made again when needed."""
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not compiled:  # Inductor's documented default
        compiled = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    return {"data sets": str(cache_folder() / "data"), "compiled code (Inductor)": compiled}


def parts() -> list[Part]:
    """What works on this machine, and what to install for the rest."""
    return [
        Part('inner="aot_eager" (any device, no compiler)', ""),
        Part('inner="inductor" on the CPU', _lacking(lambda: check_compilers([torch.empty(0)]))),
        Part('inner="inductor" on CUDA', _lacks_cuda()),
        Part("python -m actcompile demo", _lacks("torch_geometric", "pip install 'actcompile[demo]'")),
        Part("the data set ogbn-arxiv", _lacks("ogb", "pip install 'actcompile[bench]'")),
    ]


def renderable() -> Group:
    """All of it, for a terminal."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, facts in (("versions", versions()), ("machine", hardware()), ("folders", folders())):
        table.add_row(Text(title, style="bold"))
        for name, value in facts.items():
            table.add_row(Text(f"  {name}"), Text(value))
    table.add_row(Text("what works here", style="bold"))
    for part in parts():
        table.add_row(Text(f"  {part.name}"), Text(part.lacks or "yes", style="yellow" if part.lacks else "green"))
    return Group(table)


def _compiler() -> str:
    try:
        name = _torch.get_cpp_compiler()
    except _torch.InvalidCxxCompiler:
        return "none found"
    said = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return f"{shutil.which(name) or name}: {said[0]}" if said else name


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device" if torch.version.cuda else "none: this torch is built without CUDA"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}"


def _lacks_cuda() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device, and a torch built for CUDA"
    return _lacking(lambda: check_compilers([torch.empty(0, device="cuda")]))


def _lacks(module: str, advice: str) -> str:
    return "" if importlib.util.find_spec(module) else f"needs {module}: {advice}"


def _lacking(check: Callable[[], None]) -> str:
    try:
        check()
    except RuntimeError as error:
        return str(error)
    return ""
