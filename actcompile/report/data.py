"""What was done to each saved activation, and what is in memory of edges, as plain data.

It knows nothing of how it is shown: `table`, `svg` and `html` read it. Nothing in it refers to the model.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any

from actcompile.passes.graph import _torch
from actcompile.passes.plan.pins import Way

from ..tracing.call import Handed

Settings = tuple[tuple[str, Any], ...]  # fields of a config, as plain data


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
        key: what names it in every process and at all sizes, such as `convs.0/add:1`.
        way: its codec as plain data, where it may be rounded; for a saved plan.
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
    key: str = ""
    way: Way = ()
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


def tupled(value: Any) -> Any:
    """Lists, also inside of lists, as tuples: what JSON makes of tuples, undone."""
    return tuple(map(tupled, value)) if isinstance(value, list | tuple) else value


def _at(formula: str, otherwise: int, sizes: Mapping[str, int]) -> int:
    value = _torch.evaluate(formula, sizes) if formula else None
    return otherwise if value is None else value


@dataclass(frozen=True)
class MemoryRow:
    """The memory of one value of a step.

    Attributes:
        kind: one of `KINDS`: "edges" or "nodes", for what has a row for each of them, "encoded", or "other".
        nbytes: at the sizes of the trace; `formula` has it in terms of the shapes' symbols, where it depends on such.
        first, last: positions of the step between which it is alive, both included.
        held: whether it is saved for backward.
    """

    name: str
    module: str
    shape: tuple[str, ...]
    dtype: str
    kind: str
    nbytes: int
    first: int
    last: int
    held: bool
    formula: str = ""

    def at(self, sizes: Mapping[str, int]) -> "MemoryRow":
        """The same row with the bytes that it has at these sizes."""
        return replace(self, nbytes=_at(self.formula, self.nbytes, sizes))


KINDS = ("edges", "nodes", "encoded", "other")


@dataclass(frozen=True)
class Memory:
    """What is alive when, over a step's forward and backward; inputs, parameters and buffers left out.

    Attributes:
        forward, backward: the numbers of positions, one for each node of the graphs.
    """

    rows: tuple[MemoryRow, ...] = ()
    forward: int = 0
    backward: int = 0

    def live(self, *kinds: str) -> tuple[int, ...]:
        """Live bytes at every position: of these kinds, of all by default."""
        changes = [0] * (self.forward + self.backward + 1)
        for row in self.rows:
            if row.kind in (kinds or KINDS):
                changes[row.first] += row.nbytes
                changes[row.last + 1] -= row.nbytes
        return tuple(accumulate(changes[:-1]))

    @property
    def peak(self) -> int:
        return max(self.live(), default=0)

    def at_peak(self) -> list[MemoryRow]:
        """What is alive at the peak, the first of several, largest first."""
        live = self.live()
        at = live.index(max(live)) if live else 0
        return sorted((r for r in self.rows if r.first <= at <= r.last), key=lambda r: -r.nbytes)

    def at(self, sizes: Mapping[str, int]) -> "Memory":
        return replace(self, rows=tuple(row.at(sizes) for row in self.rows))

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Memory":
        return Memory(**{**data, "rows": tuple(MemoryRow(**{**r, "shape": tuple(r["shape"])}) for r in data["rows"])})


@dataclass(frozen=True)
class GraphNode:
    """One node of a rewritten graph, for drawing. `inserted` marks what actcompile added."""

    name: str
    op: str
    shape: str
    inputs: tuple[str, ...]
    inserted: bool


@dataclass(frozen=True)
class Outlook:
    """What the planner predicts; the peak of a point is in bytes, its time that of encoding and decoding in seconds.

    Attributes:
        error: relative error that rounding adds to the gradients of a step.
        seconds: that encoding and decoding take.
        measured: whether the noise of all that is rounded was measured, rather than guessed.
        greedy: (peak, error, seconds) of the plan that a greedy choice finds; None where it finds none.
        gap: how far, relatively, the plan may be from the best.
        front: (peak, error, seconds) of plans of least error within falling peaks.
    """

    error: float
    seconds: float
    measured: bool
    greedy: tuple[float, ...] | None
    gap: float
    front: tuple[tuple[float, ...], ...]

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Outlook":
        greedy = data["greedy"] and tuple(data["greedy"])
        return Outlook(**{**data, "greedy": greedy, "front": tuple(map(tuple, data["front"]))})


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph: its saved activations, and both rewritten graphs as code and as nodes.

    Attributes:
        training: whether the module was in training mode; in eval mode nothing is rounded, unless the config asks.
        taken, given: of inputs from before a graph break, and of outputs that go on behind one, those that torch saves,
            by position, and whether they are saved as they are now: graphs that get them later pay nothing then.
        sizes: what the symbols in shapes stand for where bytes are counted.
        bounds: those of them that depend on data, which no run has shown yet: they are at most so large.
        guesses: those among them that have no bound.
        handed_on: the sizes that forward hands to backward, in order.
        edges: the tensors with a row for each edge that are in memory during a step, forward's first.
        fused: how many regions of message passing, of both directions, run as one op each.
        grouped: positions of the inputs whose edges are grouped by node for that, which is remembered across steps.
        remembered: bytes of these groupings now, after a run; reports of the same graph are equal whatever it is.
        memory_before, memory_after: what is alive when in a step, as torch alone has it, and now.
        precision: what decided how many bits floats have, where that was left open.
        outlook: what the planner predicts, where bounds were given or noise was measured.
        settings: those fields of the config that a saved plan has; `parameters`: as in `PinnedGraph`.
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
    guesses: tuple[str, ...] = ()
    handed_on: tuple[str, ...] = ()
    edges: tuple[EdgeRow, ...] = ()
    fused: int = 0
    grouped: tuple[int, ...] = ()
    remembered: int = field(default=0, compare=False)
    memory_before: Memory = Memory()
    memory_after: Memory = Memory()
    precision: str = ""
    outlook: Outlook | None = None
    settings: Settings = ()
    parameters: tuple[str, ...] = ()

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
            memory_before=self.memory_before.at(merged),
            memory_after=self.memory_after.at(merged),
            sizes=merged,
            bounds=tuple(name for name in self.bounds if name not in known),
            guesses=tuple(name for name in self.guesses if name not in known),
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
        rows = tuple(
            Row(**{**r, **{key: tuple(r[key]) for key in tuples}, "way": tupled(r.get("way", ()))})
            for r in data["rows"]
        )
        nodes = {
            key: tuple(GraphNode(**{**n, "inputs": tuple(n["inputs"])}) for n in data[key])
            for key in ("forward_nodes", "backward_nodes")
        }
        edges = tuple(EdgeRow(**{**e, "shape": tuple(e["shape"])}) for e in data["edges"])
        memory = {key: Memory.from_dict(data[key]) for key in ("memory_before", "memory_after")}
        names = {key: tuple(data[key]) for key in ("bounds", "guesses", "handed_on", "grouped")}
        handed = {key: tuple((position, kept) for position, kept in data[key]) for key in ("taken", "given")}
        outlook = data["outlook"] and Outlook.from_dict(data["outlook"])
        made = {"rows": rows, "edges": edges, "outlook": outlook, "settings": tupled(data.get("settings", ()))}
        made["parameters"] = tuple(data.get("parameters", ()))
        return GraphReport(**{**data, **made, **memory, **nodes, **names, **handed})


@dataclass(frozen=True)
class ReportData:
    """One `GraphReport` for each graph that Dynamo cut from the model, and notes on the whole."""

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
