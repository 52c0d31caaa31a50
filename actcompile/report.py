"""What was done to each saved activation, as plain data: printed as a table, drawn, and kept as JSON."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import fx

from actcompile.passes.codecs import EXACT, UNBIASED, Keep, Recompute
from actcompile.passes.commute import Commuted
from actcompile.passes.find import SavedActivation
from actcompile.passes.plan import Choice, Plan, is_constant
from actcompile.passes.rebuild import Rebuilt
from actcompile.passes.replay import Replayed
from actcompile.passes.split import Split, root

from ._call import Handed, Situation

Spared = Commuted | Rebuilt | Replayed
"""An activation that backward does without, and why."""


@dataclass(frozen=True)
class Row:
    """One saved activation. Bytes are those of memory that saving it costs: none for inputs and parameters.

    Attributes:
        name: the node in the forward graph.
        module, source: submodule and user source line that made it.
        bytes_before, bytes_after: what torch saves without us, and what is saved now; at the sizes of the trace.
        biased: whether rounding it biases a gradient; None where it is not rounded.
        through: the backward op that biases.
        codec, reason: how it is kept, and why.
    """

    name: str
    module: str
    source: str
    op: str
    shape: tuple[str, ...]
    dtype: str
    uses: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    codec: str
    biased: bool | None
    through: str
    reason: str


@dataclass(frozen=True)
class GraphNode:
    """One node of a rewritten graph, for drawing. `inserted` marks what actcompile added."""

    name: str
    op: str
    shape: str
    inputs: tuple[str, ...]
    inserted: bool


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph: its saved activations, and both rewritten graphs as code and as nodes.

    training: whether the module was in training mode; in eval mode nothing is rounded, unless the config asks for it.
    taken, given: of inputs from before a graph break, and of outputs that go on behind one, those that torch saves, by
        position, and whether they are saved as they are now: graphs that get them later in the call pay nothing then.
    """

    rows: tuple[Row, ...]
    forward: str
    backward: str
    forward_nodes: tuple[GraphNode, ...]
    backward_nodes: tuple[GraphNode, ...]
    inner: str
    training: bool = True
    taken: tuple[tuple[int, bool], ...] = ()
    given: tuple[tuple[int, bool], ...] = ()

    def handed(self) -> tuple[dict[int, Handed], dict[int, Handed]]:
        """What became of `taken` and of `given`."""
        return {i: Handed(True, kept) for i, kept in self.taken}, {i: Handed(True, kept) for i, kept in self.given}

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "GraphReport":
        """The inverse of `dataclasses.asdict`, also after a round trip through JSON."""
        rows = tuple(Row(**{**r, "shape": tuple(r["shape"]), "uses": tuple(r["uses"])}) for r in data["rows"])
        nodes = {
            key: tuple(GraphNode(**{**n, "inputs": tuple(n["inputs"])}) for n in data[key])
            for key in ("forward_nodes", "backward_nodes")
        }
        handed = {key: tuple((position, kept) for position, kept in data[key]) for key in ("taken", "given")}
        return GraphReport(**{**data, "rows": rows, **nodes, **handed})


@dataclass(frozen=True)
class Report:
    """What `actcompile.explain` returns: one `GraphReport` per graph that Dynamo cut from the model.

    `print(report)` shows a table, in a notebook it shows as HTML. Nothing in it refers to the model.
    """

    graphs: tuple[GraphReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def saved_bytes_before(self) -> int:
        """Bytes that `torch.compile` alone saves for backward, inputs and parameters left out."""
        return sum(graph.bytes_before for graph in self.graphs)

    @property
    def saved_bytes_after(self) -> int:
        """Bytes that are saved for backward now."""
        return sum(graph.bytes_after for graph in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        return {"graphs": [asdict(graph) for graph in self.graphs], "notes": list(self.notes)}

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, written to `path` too where one is given."""
        return _write(json.dumps(self.to_dict(), indent=1), path)

    @staticmethod
    def from_json(text: str) -> "Report":
        data = json.loads(text)
        return Report(tuple(GraphReport.from_dict(g) for g in data["graphs"]), tuple(data["notes"]))

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one self-contained HTML page: table, drawing of both graphs (SVG), and their code."""
        from ._drawing import html_page

        return _write(html_page(self), path)

    def to_svg(self, path: str | Path | None = None) -> str:
        """Both rewritten graphs as an SVG drawing in which inserted ops stand out."""
        from ._drawing import svg_drawing

        return _write(svg_drawing(self), path)

    def code(self) -> str:
        """Both rewritten graphs of every compiled graph, as readable Python."""
        parts = []
        for number, graph in enumerate(self.graphs):
            parts += [f"# graph {number}, forward", graph.forward, f"# graph {number}, backward", graph.backward]
        return "\n".join(parts)

    def __str__(self) -> str:
        from ._table import render

        return render(self)

    def __rich__(self) -> Any:
        from ._table import renderable

        return renderable(self)

    def _repr_html_(self) -> str:
        return self.to_html()


def _write(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def record(
    split: Split,
    plan: Plan,
    saved_before: Iterable[SavedActivation],
    spared: Iterable[Spared],
    inner: str,
    situation: Situation,
) -> GraphReport:
    """Takes down what the passes did, from the rewritten graphs.

    Args:
        saved_before: what torch's own partition saved, before any pass of ours.
        spared: what is not saved any more, since backward does without it.
        situation: which part of a call the graph is.
    """
    counted = {split.crossing.get(position) for position in situation.counted}
    saved_before = [replace(a, nbytes=0) if root(a.node) in counted else a for a in saved_before]
    was = {root(a.node) for a in saved_before}
    saved = {root(n) for n, _ in split.pairs}
    without = {s.activation.node.name: s for s in spared}
    before = {a.node.name: a for a in saved_before}
    rows = [_row(c, before.pop(c.activation.node.name, None)) for c in plan.choices]
    rows += [_dropped(a, without.get(a.node.name)) for a in before.values()]
    return GraphReport(
        rows=tuple(sorted(rows, key=lambda r: -r.bytes_before)),
        forward=split.forward.print_readable(print_output=False, include_stride=False),
        backward=split.backward.print_readable(print_output=False, include_stride=False),
        forward_nodes=_nodes(split.forward.graph, _ours),
        backward_nodes=_nodes(split.backward.graph, _ours),
        inner=inner,
        training=situation.training,
        taken=tuple((position, n in saved) for position, n in split.crossing.items() if n in was),
        given=tuple((position, n in saved) for position, n in split.given.items() if n in was),
    )


def _row(choice: Choice, before: SavedActivation | None) -> Row:
    a = choice.activation
    rounded = choice.dependence if not isinstance(choice.codec, EXACT) else None
    return Row(
        **_facts(a),
        bytes_before=before.nbytes if before else 0,
        bytes_after=choice.nbytes,
        codec=str(choice.codec),
        biased=rounded.biased or not isinstance(choice.codec, UNBIASED) if rounded else None,
        through=(rounded.op or ("" if isinstance(choice.codec, UNBIASED) else "the codec")) if rounded else "",
        reason=_reason(choice, before),
    )


def _reason(choice: Choice, before: SavedActivation | None) -> str:
    if before is None:
        return f"{choice.reason}; taken in forward, so that no rounded value decides it"
    return choice.reason + "; an earlier graph saves it, too" * (choice.nbytes > 0 and before.nbytes == 0)


def _dropped(a: SavedActivation, spared: Spared | None) -> Row:
    if a.refusal is not None:
        codec, reason = str(Keep()), a.refusal
    elif spared is not None:
        codec, reason = "drop" if isinstance(spared, Commuted) else str(Recompute()), spared.reason
    elif is_constant(a.node):
        codec, reason = "drop", "a constant: backward does without it"
    else:
        codec, reason = "drop", "backward asked only for a mask, which is saved instead"
    return Row(**_facts(a), bytes_before=a.nbytes, bytes_after=0, codec=codec, biased=None, through="", reason=reason)


def _facts(a: SavedActivation) -> dict[str, Any]:
    return {
        "name": a.node.name,
        "module": a.module,
        "source": a.source,
        "op": a.op,
        "shape": tuple(str(s) for s in a.value.shape),
        "dtype": str(a.value.dtype).removeprefix("torch."),
        "uses": a.uses,
    }


def _ours(node: fx.Node) -> bool:
    return str(node.target).startswith("actcompile.")


def _nodes(graph: fx.Graph, inserted: Callable[[fx.Node], bool]) -> tuple[GraphNode, ...]:
    made = []
    for node in graph.nodes:
        value = node.meta.get("val")
        shape = "x".join(str(s) for s in value.shape) if hasattr(value, "shape") else ""
        inputs = tuple(n.name for n in node.all_input_nodes)
        op = str(node.target) if node.op == "call_function" else node.op
        made.append(GraphNode(node.name, op, shape, inputs, inserted(node)))
    return tuple(made)
