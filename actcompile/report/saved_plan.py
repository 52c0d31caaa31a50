"""`SavedPlan`: how every activation of a model is kept, as a file that can be loaded, compared and taken again."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from actcompile.passes.plan.pins import Pin, PinnedGraph, codec_of

from .data import Settings, tupled
from .text import clean, human, simple_box, to_text

FORMAT, VERSION = "actcompile plan", 1


@dataclass(frozen=True)
class SavedPlan:
    """How the activations of a model are kept that may be rounded, as `explain(...).plan()` tells it.

        actcompile.explain(model, x, edge_index).plan().save("plan.json")
        model = actcompile.compress(model, plan="plan.json")

    Attributes:
        settings: the fields of `Config` that decide which activations there are and may be rounded, by name.
        graphs: the activations of each graph.
    """

    settings: Settings
    graphs: tuple[PinnedGraph, ...]

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, the same text for the same plan."""
        graphs = [{**asdict(g), "pins": [{**asdict(p), "way": dict(p.way)} for p in g.pins]} for g in self.graphs]
        data = {"format": FORMAT, "version": VERSION, "settings": dict(self.settings), "graphs": graphs}
        Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> "SavedPlan":
        """The plan in a file.

        Raises:
            OSError: there is no such file.
            ValueError: it is no plan, of another version, or has a wrong field; the message names the place.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no saved plan: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path} is no saved plan: explain(model, *inputs).plan().save(path) writes one")
        if data.get("version") != VERSION:
            raise ValueError(
                f"{path} is a plan of version {data.get('version')!r}, and this actcompile reads version {VERSION}: "
                "make a new plan, or take the actcompile that wrote it"
            )
        try:
            graphs = tuple(_graph(g, f"graphs[{i}]") for i, g in enumerate(_of(list, data, "graphs", "plan")))
            return SavedPlan(tupled(list(_of(dict, data, "settings", "plan").items())), graphs)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def nbytes(self) -> int:
        """Bytes of all that it names, at the sizes for which it was made."""
        return sum(pin.nbytes for graph in self.graphs for pin in graph.pins)

    def difference(self, other: "SavedPlan") -> "Difference":
        """What another plan keeps otherwise; prints as a table."""
        mine, others = dict(self._places()), dict(other._places())
        rows = tuple(
            (number, key, mine.get((number, key)), others.get((number, key)))
            for number, key in sorted({*mine, *others})
            if _way(mine.get((number, key))) != _way(others.get((number, key)))
        )
        settings, theirs = dict(self.settings), dict(other.settings)
        changed = tuple(
            (name, settings.get(name), theirs.get(name))
            for name in sorted({*settings, *theirs})
            if settings.get(name) != theirs.get(name)
        )
        return Difference(rows, changed, (self.nbytes, other.nbytes))

    def _places(self) -> Iterator[tuple[tuple[int, str], Pin]]:
        for number, graph in enumerate(self.graphs):
            for pin in graph.pins:
                yield (number, pin.key), pin


@dataclass(frozen=True)
class Difference:
    """What two plans keep otherwise.

    Attributes:
        rows: the graph's number, the activation's key, and how either plan keeps it; None where one does not have it.
        settings: name, and value in either plan.
        nbytes: of all that either plan names.
    """

    rows: tuple[tuple[int, str, Pin | None, Pin | None], ...]
    settings: tuple[tuple[str, Any, Any], ...]
    nbytes: tuple[int, int]

    def __bool__(self) -> bool:
        return bool(self.rows or self.settings)

    def __str__(self) -> str:
        return to_text(self.__rich__())

    def __rich__(self) -> RenderableType:
        table = Table(box=simple_box(), padding=(0, 1, 0, 0))
        for title in ("graph", "activation", "here", "bytes", "there", "bytes"):
            table.add_column(title, overflow="fold", justify="right" if title in ("graph", "bytes") else "left")
        for number, key, *pins in self.rows:
            cells = [c for p in pins for c in ((str(codec_of(p.way)), human(p.nbytes)) if p else ("-", "-"))]
            table.add_row(str(number), *map(Text, (clean(key), *map(clean, cells))))
        lines = [Text(f"{name}: {here!r} here, {there!r} there") for name, here, there in self.settings]
        mine, others = map(human, self.nbytes)
        count = f"{len(self.rows)} activation{'s' if len(self.rows) != 1 else ''} kept otherwise"
        return Group(*([table] if self.rows else []), *lines, Text(f"{count}; {mine} here, {others} there"))


def _way(pin: Pin | None) -> Any:
    return pin and pin.way


def _graph(data: Any, where: str) -> PinnedGraph:
    pins = tuple(_pin(p, f"{where}.pins[{i}]") for i, p in enumerate(_of(list, data, "pins", where)))
    keys = [pin.key for pin in pins]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"{where} has {min(twice)} twice")
    parameters = tuple(_of(list, data, "parameters", where))
    if not all(isinstance(shape, str) for shape in parameters):
        raise ValueError(f"{where}: parameters must be texts such as '64x32', got {parameters!r}")
    return PinnedGraph(_of(bool, data, "training", where), parameters, pins)


def _pin(data: Any, where: str) -> Pin:
    kinds = {f.name: dict if f.name == "way" else f.type for f in fields(Pin)}
    values = {name: _of(kind, data, name, where) for name, kind in kinds.items()}
    pin = Pin(**{**values, "way": tuple(values["way"].items())})
    try:
        codec_of(pin.way)
    except ValueError as error:
        raise ValueError(f"{where}, {pin.key}: {error}") from None
    return pin


def _of(kind: Any, data: Any, name: str, where: str) -> Any:
    """A field of some JSON object, of the type that it must have."""
    value = data.get(name) if isinstance(data, dict) else None
    if type(value) is not kind:
        raise ValueError(f"{where}: {name} must be of type {kind.__name__}, got {value!r}")
    return value
