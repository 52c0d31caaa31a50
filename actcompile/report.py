"""What was done to each saved activation, as plain data: printed as a table, drawn, and kept as JSON."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import fx

from actcompile.passes.codecs.codecs import EXACT, UNBIASED, Keep, Recompute
from actcompile.passes.edges.edges import Fused, inputs_grouped
from actcompile.passes.edges.lists import lists
from actcompile.passes.graph import _torch
from actcompile.passes.graph.find import SavedActivation, maker, module_path, own_nbytes, source_line
from actcompile.passes.graph.split import Split, is_size, is_tensor, root
from actcompile.passes.plan.plan import Choice, Plan, is_constant
from actcompile.passes.spare.commute import Commuted
from actcompile.passes.spare.dropout import Redrawn, is_of_dropout, is_seed
from actcompile.passes.spare.rebuild import Rebuilt
from actcompile.passes.spare.replay import Replayed
from actcompile.passes.spare.views import Viewed

from ._call import Handed, Situation
from .config import Config

Spared = Commuted | Rebuilt | Redrawn | Replayed | Viewed
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
        averaged_over: the bias is the rounding's variance over so many elements, 1 for element by element; 0: none.
        reaches: positions of those of the graph's inputs whose gradients are computed from it.
        formula_before, formula_after: these bytes in terms of the shapes' symbols, where they depend on such.
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
    averaged_over: int = 0
    reaches: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """What names the activation: the module's path and the node's name, such as `convs.0/add`."""
        return f"{self.module}/{self.name}"

    formula_before: str = ""
    formula_after: str = ""

    def at(self, sizes: Mapping[str, int]) -> "Row":
        """The same row with the bytes that it has at these sizes."""
        before = _at(self.formula_before, self.bytes_before, sizes)
        after = _at(self.formula_after, self.bytes_after, sizes)
        return replace(self, bytes_before=before, bytes_after=after)


@dataclass(frozen=True)
class EdgeRow:
    """A tensor with a row for each edge that is in memory during a step.

    Attributes:
        name: the node of the graph that makes it, forward's or backward's.
        backward: whether backward makes it.
        nbytes: its bytes, at the sizes of the trace.
        held: bytes that are held of it from forward to backward; none where it is not saved.
        codec: how it is held; empty where it is not.
        reason: why it is made.
        formula, formula_held: these bytes in terms of the shapes' symbols, where they depend on such.
    """

    name: str
    module: str
    source: str
    op: str
    shape: tuple[str, ...]
    dtype: str
    backward: bool
    nbytes: int
    held: int
    codec: str
    reason: str
    formula: str = ""
    formula_held: str = ""

    def at(self, sizes: Mapping[str, int]) -> "EdgeRow":
        """The same row with the bytes that it has at these sizes."""
        nbytes, held = _at(self.formula, self.nbytes, sizes), _at(self.formula_held, self.held, sizes)
        return replace(self, nbytes=nbytes, held=held)


def _at(formula: str, otherwise: int, sizes: Mapping[str, int]) -> int:
    value = _torch.evaluate(formula, sizes) if formula else None
    return otherwise if value is None else value


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

    Attributes:
        training: whether the module was in training mode; in eval mode nothing is rounded, unless the config asks.
        taken, given: of inputs from before a graph break, and of outputs that go on behind one, those that torch saves,
            by position, and whether they are saved as they are now: graphs that get them later pay nothing then.
        sizes: what the symbols in shapes stand for where bytes are counted.
        bounds: those of them that depend on data, which no run has shown yet: they are at most so large.
        handed_on: the sizes that forward hands to backward, in order.
        edges: the tensors with a row for each edge that are in memory during a step, forward's first.
        fused: how many regions of message passing, of both directions, run as one op each.
        grouped: positions of the inputs whose edges are grouped by node for that, which is remembered across steps.
        remembered: bytes of these groupings after the last run.
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
    sizes: dict[str, int] = field(default_factory=dict)
    bounds: tuple[str, ...] = ()
    handed_on: tuple[str, ...] = ()
    edges: tuple[EdgeRow, ...] = ()
    fused: int = 0
    grouped: tuple[int, ...] = ()
    remembered: int = 0

    def at(self, sizes: Mapping[str, int]) -> "GraphReport":
        """The same report with the bytes at other sizes, those of a run; what is not among them stays as it was."""
        known = {name: size for name, size in sizes.items() if name in self.sizes}
        if not known:
            return self
        merged = {**self.sizes, **known}
        return replace(
            self,
            rows=tuple(row.at(merged) for row in self.rows),
            edges=tuple(row.at(merged) for row in self.edges),
            sizes=merged,
            bounds=tuple(name for name in self.bounds if name not in known),
        )

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
        tuples = ("shape", "uses", "reaches")
        rows = tuple(Row(**{**r, **{key: tuple(r[key]) for key in tuples}}) for r in data["rows"])
        nodes = {
            key: tuple(GraphNode(**{**n, "inputs": tuple(n["inputs"])}) for n in data[key])
            for key in ("forward_nodes", "backward_nodes")
        }
        edges = tuple(EdgeRow(**{**e, "shape": tuple(e["shape"])}) for e in data["edges"])
        names = {key: tuple(data[key]) for key in ("bounds", "handed_on", "grouped")}
        handed = {key: tuple((position, kept) for position, kept in data[key]) for key in ("taken", "given")}
        return GraphReport(**{**data, "rows": rows, "edges": edges, **nodes, **names, **handed})


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
    saved_fused: Iterable[SavedActivation],
    fused: Iterable[Fused],
    spared: Iterable[Spared],
    reached: Mapping[fx.Node, tuple[int, ...]],
    config: Config,
    situation: Situation,
) -> GraphReport:
    """Takes down what the passes did, from the rewritten graphs.

    Args:
        saved_before: what torch's own partition saved, before any pass of ours.
        saved_fused: what it saved after message passing was fused; the same where none was.
        fused: the regions of message passing, fused or not.
        spared: what is not saved any more, since backward does without it.
        reached: what `reach` returned before the rewrite.
        situation: which part of a call the graph is.
    """
    counted = {node.name for position in situation.counted if (node := split.crossing.get(position))}
    saved_before = [replace(a, nbytes=0) if root(a.node).name in counted else a for a in saved_before]
    by_torch = {root(a.node).name for a in saved_before}
    known = {a.node.name for a in saved_fused}
    saved = {root(n) for n, _ in split.pairs}
    without = {s.activation.node.name: s for s in spared}
    before = {a.node.name: a for a in saved_before}
    pieces = {n.name for s in without.values() if isinstance(s, Viewed) for n in s.instead}
    rows = []
    for choice in plan.choices:
        a = choice.activation
        was = before.pop(a.node.name, None)
        added = "" if was or a.refusal or a.node.name in pieces else _why_added(a, a.node.name in known)
        if root(a.node).name in counted and choice.nbytes:
            added = "an earlier graph saves it, too"
        rows.append(_row(choice, was, added, reached.get(a.placeholder, ())))
    rows += [_dropped(a, without.get(a.node.name), a.node.name in known) for a in before.values()]
    symbols = split.symbols(saved_before)
    return GraphReport(
        rows=tuple(sorted(rows, key=lambda r: -r.bytes_before)),
        forward=split.forward.print_readable(print_output=False, include_stride=False),
        backward=split.backward.print_readable(print_output=False, include_stride=False),
        forward_nodes=_nodes(split.forward.graph, _ours),
        backward_nodes=_nodes(split.backward.graph, _ours),
        inner=config.inner,
        training=situation.training,
        taken=tuple((position, n in saved) for position, n in split.crossing.items() if n.name in by_torch),
        given=tuple((position, n in saved) for position, n in split.given.items() if n.name in by_torch),
        sizes={name: _torch.size_hint(size) for name, size in symbols.items()},
        bounds=tuple(name for name, size in symbols.items() if _torch.is_unbacked(size)),
        handed_on=tuple(str(_torch.expression(n.meta["val"])) for n, _ in split.pairs if is_size(n)),
        edges=_edge_rows(split, plan, fused, config),
        fused=sum(not region.reason for region in fused),
        grouped=tuple(p for n in inputs_grouped(split) if (p := _torch.input_position(n)) is not None),
    )


def _edge_rows(split: Split, plan: Plan, fused: Iterable[Fused], config: Config) -> tuple[EdgeRow, ...]:
    unfused = {region.end: region.reason for region in fused if region.reason}
    off = "" if config.fuse else "fuse=False"
    rows = []
    for tensor in lists(split, plan, unfused, off, config.inner == "inductor"):
        value = tensor.node.meta["val"]
        formulas = [_formula_after(choice) for choice in tensor.held]
        rows.append(
            EdgeRow(
                **{**_facts(tensor.node), "op": tensor.op},
                backward=tensor.backward,
                nbytes=own_nbytes(value),
                held=sum(choice.nbytes for choice in tensor.held),
                codec=", ".join(dict.fromkeys(str(choice.codec) for choice in tensor.held)),
                reason=tensor.reason,
                formula=_torch.formula(math.prod(value.shape) * value.dtype.itemsize),
                formula_held=_sum(formulas, [choice.nbytes for choice in tensor.held]),
            )
        )
    return tuple(rows)


def _sum(formulas: Sequence[str], numbers: Sequence[int]) -> str:
    """A formula of a sum, of whose summands some are numbers; none where all are."""
    texts = (text or str(number) for text, number in zip(formulas, numbers, strict=True))
    return " + ".join(texts) if any(formulas) else ""


def _row(choice: Choice, before: SavedActivation | None, added: str, reaches: tuple[int, ...]) -> Row:
    a = choice.activation
    rounded = choice.dependence if not isinstance(choice.codec, EXACT) else None
    return Row(
        **_facts(a.node),
        uses=a.uses,
        bytes_before=before.nbytes if before else 0,
        bytes_after=choice.nbytes,
        formula_before=_formula(before) if before else "",
        formula_after=_formula_after(choice),
        codec=str(choice.codec),
        biased=rounded.biased or not isinstance(choice.codec, UNBIASED) if rounded else None,
        through=(rounded.op or ("" if isinstance(choice.codec, UNBIASED) else "the codec")) if rounded else "",
        averaged_over=rounded.averaged_over if rounded else 0,
        reason=f"{choice.reason}; {added}" if added else choice.reason,
        reaches=reaches,
    )


def _why_added(a: SavedActivation, fused: bool) -> str:
    """Why an activation is saved that torch alone would compute again."""
    if fused:
        return "read by fused message passing"
    if a.value.is_floating_point():
        return "saved beside what it is made of, so that no rounded element meets itself"
    if is_seed(a.node):
        return "seeds of dropout, of which backward makes its masks anew"
    return "taken in forward, so that no rounded value decides it"


def _dropped(a: SavedActivation, spared: Spared | None, known: bool) -> Row:
    if a.refusal is not None:
        codec, reason = str(Keep()), a.refusal
    elif spared is not None:
        codec = {Commuted: "drop", Viewed: "view"}.get(type(spared), str(Recompute()))
        reason = spared.reason
    elif is_constant(a.node):
        codec, reason = "drop", "a constant: backward does without it"
    elif not known:
        codec, reason = (
            "fused",
            "message passing is fused: backward computes it again by edge, or reads other values",
        )
    else:
        codec, reason = "drop", "backward asked only for a mask, which is saved instead"
    return Row(
        **_facts(a.node),
        uses=a.uses,
        bytes_before=a.nbytes,
        bytes_after=0,
        codec=codec,
        biased=None,
        through="",
        reason=reason,
        formula_before=_formula(a),
    )


def _formula(a: SavedActivation) -> str:
    """The bytes of an activation that is kept, in symbols: those of the memory that it is a view of, or its share."""
    base = root(a.node)
    value = base.meta["val"] if is_tensor(base) else a.value
    whole = math.prod(value.shape) * value.dtype.itemsize
    if not a.nbytes or not (text := _torch.formula(whole)):
        return ""
    return text if a.nbytes == _torch.size_hint(whole) else f"({text})*{a.nbytes}//{_torch.size_hint(whole)}"


def _formula_after(choice: Choice) -> str:
    """The bytes of what is saved for an activation, in symbols; statistics by column do not depend on any."""
    a = choice.activation
    if isinstance(choice.codec, Keep):
        return _formula(a)
    encoded = choice.codec.nbytes(a.sizes, a.value.dtype)
    text = _torch.formula(encoded)
    return f"{text} + {choice.nbytes - _torch.size_hint(encoded)}" if text else ""


def _facts(node: fx.Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "module": module_path(node),
        "source": source_line(node),
        "op": maker(node),
        "shape": tuple(str(s) for s in node.meta["val"].shape),
        "dtype": str(node.meta["val"].dtype).removeprefix("torch."),
    }


MESSAGE_PASSING = ("actcompile.aggregate", "actcompile.edges", "actcompile.group_edges")
CASTS = ("actcompile.mask_to_bytes", "actcompile.bytes_to_mask")


def _ours(node: fx.Node) -> bool:
    """Whether a node is of our making, and neither a cast nor the model's own dropout or message passing."""
    name = str(node.target)
    return name.startswith("actcompile.") and not name.startswith(MESSAGE_PASSING + CASTS) and not is_of_dropout(node)


def _nodes(graph: fx.Graph, inserted: Callable[[fx.Node], bool]) -> tuple[GraphNode, ...]:
    made = []
    for node in graph.nodes:
        value = node.meta.get("val")
        shape = "x".join(str(s) for s in value.shape) if hasattr(value, "shape") else ""
        inputs = tuple(n.name for n in node.all_input_nodes)
        op = str(node.target) if node.op == "call_function" else node.op
        made.append(GraphNode(node.name, op, shape, inputs, inserted(node)))
    return tuple(made)
