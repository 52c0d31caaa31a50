"""Takes down what the passes did to a graph, as a `GraphReport`."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import fx

from actcompile.passes.codecs.codecs import EXACT, UNBIASED, Keep, Recompute
from actcompile.passes.edges.edges import Fused, inputs_grouped
from actcompile.passes.edges.lists import Counted, lists, maker_of
from actcompile.passes.graph import _torch
from actcompile.passes.graph.find import SavedActivation, maker, own_nbytes
from actcompile.passes.graph.origin import module_path, source_line
from actcompile.passes.graph.split import Split, is_size, is_tensor, root
from actcompile.passes.plan.fit import Fitted
from actcompile.passes.plan.memory import lifetimes
from actcompile.passes.plan.pins import parameters_of, way_of
from actcompile.passes.plan.plan import Choice, Plan, is_constant
from actcompile.passes.spare.commute import Commuted
from actcompile.passes.spare.dropout import Redrawn, is_of_dropout, is_seed
from actcompile.passes.spare.rebuild import Rebuilt
from actcompile.passes.spare.renormalise import Renormalised
from actcompile.passes.spare.replay import Replayed
from actcompile.passes.spare.views import Viewed

from ..config import Config
from ..tracing.call import Situation
from .data import EdgeRow, GraphNode, GraphReport, Memory, MemoryRow, Outlook, Row

Spared = Commuted | Rebuilt | Redrawn | Renormalised | Replayed | Viewed
"""An activation that backward does without, and why."""


def record(
    split: Split,
    plan: Plan,
    saved_before: Iterable[SavedActivation],
    saved_fused: Iterable[SavedActivation],
    fused: Iterable[Fused],
    spared: Iterable[Spared],
    reached: Mapping[fx.Node, tuple[int, ...]],
    memory_before: Memory,
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
        memory_before: what `memory` returned of torch's own partition.
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
    axes = Counted(split)
    encoded = {node for node, _ in split.pairs} - {choice.activation.node for choice in plan.choices}
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
        bounds=tuple(n for n, size in symbols.items() if _torch.is_unbacked(size) and not _torch.is_guess(size)),
        guesses=tuple(n for n, size in symbols.items() if _torch.is_guess(size)),
        handed_on=tuple(str(_torch.expression(n.meta["val"])) for n, _ in split.pairs if is_size(n)),
        edges=_edge_rows(split, axes, plan, fused, config, encoded),
        fused=sum(not region.reason for region in fused),
        grouped=tuple(p for n in inputs_grouped(split) if (p := _torch.input_position(n)) is not None),
        memory_before=memory_before,
        memory_after=_memory(split, axes, config, encoded),
        settings=config.settings,
        parameters=parameters_of(split),
    )


def outlook(fitted: Fitted) -> Outlook:
    """Takes down what the planner predicts."""
    greedy = None if fitted.greedy is None else astuple(fitted.greedy)
    front = tuple(map(astuple, fitted.front))
    return Outlook(fitted.point.error, fitted.point.seconds, fitted.measured, greedy, fitted.gap, front)


def memory(split: Split, config: Config) -> Memory:
    """What is alive when in a step of both graphs as they are, with nothing encoded yet."""
    return _memory(split, Counted(split), config, ())


def _memory(split: Split, counted: Counted, config: Config, encoded: Collection[fx.Node]) -> Memory:
    rows = []
    for m in lifetimes(split, config.inner == "inductor"):
        value = m.node.meta["val"]
        kinds = {
            "encoded": m.node in encoded,
            "edges": counted.in_edges(m.node),
            "nodes": counted.in_nodes(m.node),
            "other": True,
        }
        rows.append(
            MemoryRow(
                m.name,
                m.module,
                m.shape,
                str(value.dtype).removeprefix("torch."),
                next(kind for kind, fits in kinds.items() if fits),
                m.nbytes,
                m.first,
                m.last,
                m.backward_first is not None,
                _nbytes(value),
            )
        )
    return Memory(tuple(rows), len(split.forward.graph.nodes), len(split.backward.graph.nodes))


def _edge_rows(
    split: Split, counted: Counted, plan: Plan, fused: Iterable[Fused], config: Config, encoded: Collection[fx.Node]
) -> tuple[EdgeRow, ...]:
    held: dict[fx.Node, list[Choice]] = defaultdict(list)
    for choice in plan.choices:
        if choice.nbytes:
            held[root(choice.activation.node)].append(choice)
    memories = [m.node for m in lifetimes(split, config.inner == "inductor") if m.node not in encoded]
    made = [node for node in memories if node.op != "placeholder" or node in held]  # else it is given: a tangent
    unfused = {region.end: region.reason for region in fused if region.reason}
    rows = []
    for node, reason in lists(split, counted, made, unfused, "" if config.fuse else "fuse=False").items():
        rows.append(
            EdgeRow(
                **{**_facts(node), "op": maker_of(node)},
                backward=node.graph is split.backward.graph,
                nbytes=own_nbytes(node.meta["val"]),
                held=sum(choice.nbytes for choice in held[node]),
                codec=", ".join(dict.fromkeys(str(choice.codec) for choice in held[node])),
                reason=reason,
                formula=_nbytes(node.meta["val"]),
                formula_held=_sum([(_formula_after(choice), choice.nbytes) for choice in held[node]]),
            )
        )
    return tuple(rows)


def _nbytes(value: torch.Tensor) -> str:
    """The formula of a tensor's bytes."""
    return _torch.formula(math.prod(value.shape) * value.dtype.itemsize)


def _sum(parts: Sequence[tuple[str, int]]) -> str:
    """A formula of a sum, whose parts have one, or are numbers; none where all are."""
    return " + ".join(text or str(number) for text, number in parts) if any(text for text, _ in parts) else ""


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
        key=a.key,
        way=way_of(choice.codec) if not isinstance(choice.by_rules, EXACT) else (),
    )


def _why_added(a: SavedActivation, fused: bool) -> str:
    """Why an activation is saved that torch alone would compute again."""
    if fused:
        return "read by fused message passing"
    if a.value.is_floating_point():
        return "saved beside what it is made of, so that no rounded element meets itself"
    if is_seed(a.node):
        return "seeds of dropout, of which backward makes its masks anew"
    return "taken in forward, where no value is rounded"


def _dropped(a: SavedActivation, spared: Spared | None, known: bool) -> Row:
    if a.refusal is not None:
        codec, reason = str(Keep()), a.refusal
    elif spared is not None:
        codec = {Commuted: "drop", Viewed: "view"}.get(type(spared), str(Recompute()))
        reason = spared.reason
    elif is_constant(a.node):
        codec, reason = "drop", "a constant: backward does without it"
    elif not known:
        codec, reason = "fused", "message passing is fused: backward does without it"
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
        key=a.key,
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


MESSAGE_PASSING = ("actcompile.aggregate", "actcompile.degree", "actcompile.edges", "actcompile.group_edges")
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
