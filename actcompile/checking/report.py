"""What `check` returns: its data, and how it is shown."""

import json
from typing import Any

from .data import CheckData
from .table import render, renderable


class CheckReport(CheckData):
    """What `actcompile.check` returns; `print(report)` shows a table."""

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Any:
        return renderable(self)
