"""What views of reports have in common: bytes, reasons and tables as text."""

import io
import math
import shutil
import sys

from rich import box
from rich.console import Console, RenderableType

from .data import EdgeRow, Row

NARROWEST, WIDEST, ROOMY = 90, 200, 150  # columns of text; from ROOMY on source lines show their code


def to_text(what: RenderableType) -> str:
    """Something of rich's as plain text, as wide as the terminal."""
    out = io.StringIO()
    console = Console(file=out, width=width(), color_system=None, force_terminal=False, legacy_windows=False)
    console.print(what)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def width() -> int:
    """Columns of text: those of the terminal, within reason."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, NARROWEST), WIDEST)


def simple_box() -> box.Box:
    """A line below the head, in characters that the terminal has."""
    return box.SIMPLE_HEAD if (sys.stdout.encoding or "utf-8").lower().startswith("utf") else box.ASCII2


def share(number: float) -> str:
    """A share for people: `12 %`, `0.34 %`, `none` for zero."""
    return f"{100 * number:.3g} %" if number else "none"


def human(nbytes: int) -> str:
    """Bytes for people, three digits and more: `512 B`, `8.19 KB`, `16.4 MB` (10**6 bytes), `1,388 MB`, `819 GB`."""
    if nbytes < 1000:
        return f"{nbytes} B"
    units = (("KB", 1e3, 999_500), ("MB", 1e6, 10**11), ("GB", 1e9, math.inf))
    unit, value = next((unit, nbytes / size) for unit, size, end in units if nbytes < end)
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f} {unit}"


def biased(row: Row) -> str:
    """`no`, `through aten.mul`, or `-` where nothing is rounded."""
    if row.biased is None:
        return "-"
    return f"through {'.'.join(clean(row.through).split('.')[:2])}" if row.biased else "no"


def shape_of(row: Row | EdgeRow) -> str:
    """`169343x256`, `(u0 + 53)x8`, or `scalar`."""
    return "x".join(f"({size})" if " " in size and len(row.shape) > 1 else size for size in row.shape) or "scalar"


def made_in(row: EdgeRow) -> str:
    return "backward" if row.backward else "forward"


def because(row: EdgeRow) -> str:
    """Why a tensor of edges is made, and how it is held."""
    return clean(f"{row.reason}; held: {row.codec}" if row.held else row.reason)


def count(things: list[Row], name: str) -> str:
    return f"{len(things)} {name}" + ("s" if len(things) != 1 else "")


def cut(text: str, length: int) -> str:
    """`text`, its end replaced by dots where it is longer than `length`."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def clean(text: str, keep: str = "") -> str:
    """Control characters, lone surrogates and line breaks become blanks: neither XML nor a terminal takes them."""
    return "".join(c if c.isprintable() or c in keep else " " for c in text)
