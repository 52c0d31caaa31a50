"""Modules import each other in one direction: no circle, not even one that a late import or a type check would hide."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import actcompile

ROOT = Path(actcompile.__file__).parent


def modules() -> dict[str, Path]:
    files = [*ROOT.rglob("*.py"), *(f for room in ("passes", "kernels") for f in (ROOT / room).rglob("*.py"))]
    return {".".join(f.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imported(name: str, file: Path) -> set[str]:
    """What a module imports, anywhere in it."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            found |= {".".join(base), *(".".join([*base, alias.name]) for alias in node.names)}
    return found


def test_imports_have_no_circle() -> None:
    known = modules()
    assert "actcompile.passes.graph.find" in known and "actcompile.report.data" in known
    graph = {name: (imported(name, file) & known.keys()) - {name, "actcompile"} for name, file in known.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("actcompile.report.data") < order.index("actcompile.report.table")
