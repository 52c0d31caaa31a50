"""A plan that was made before, taken again: what may be rounded is kept in the way that the plan has for it.

Activations are known by their keys, in graphs whose parameters have the same shapes. A graph finds all of its own in
the plan, or is refused in words. What may be rounded, and in how many bits at least, is proved on the graph at hand and
never read from the plan; what is kept without loss depends on sizes, and is no part of it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from actcompile.kernels import BlockFormat

from ..codecs.codecs import EXACT, Cast, Codec, Keep, LowRank, Prune, Quantize, SampleRows
from ..graph.split import Split
from .fit import Impossible
from .plan import Choice, Plan, bits_of
from .policy import Policy

Way = tuple[tuple[str, str | int | bool], ...]
CODECS = {
    "keep": Keep,
    "quantize": Quantize,
    "cast": Cast,
    "prune": Prune,
    "low_rank": LowRank,
    "sample_rows": SampleRows,
}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
}
MOST = 8  # objections in a message
REMEDY = (
    "It was made for another model, or where torch cuts the graph elsewhere: other sizes, another inner, dynamic or "
    "torch. Make a new one: explain(model, *inputs, dynamic=...).plan(), or, with all graphs that they needed, "
    "explain(model).plan() after some steps"
)


@dataclass(frozen=True)
class Pin:
    """How one activation is kept.

    Attributes:
        key: `SavedActivation.key`.
        dtype, dims: the activation's dtype, such as "float32", and its number of dimensions.
        way: the codec, as `way_of` has it.
        averaged_over: the bias that rounding brings is its variance over so many elements, where the plan was made.
        nbytes: that it took there; for people.
    """

    key: str
    dtype: str
    dims: int
    way: Way
    averaged_over: int
    nbytes: int


@dataclass(frozen=True)
class PinnedGraph:
    """The activations of one graph; `parameters` as `parameters_of` has them, `training` as in `GraphReport`."""

    training: bool
    parameters: tuple[str, ...]
    pins: tuple[Pin, ...]

    @property
    def keys(self) -> set[str]:
        return {pin.key for pin in self.pins}


def way_of(codec: Codec) -> Way:
    """A codec's name and fields as plain data; what is exact is "keep"."""
    name = next((name for name, kind in CODECS.items() if isinstance(codec, kind)), "keep")
    if name == "keep":
        return (("codec", name),)
    data = asdict(codec)
    flat = {**data.pop("format", {}), **data}
    plain = {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in flat.items()}
    return (("codec", name), *plain.items())


def codec_of(way: Way) -> Codec:
    """The inverse of `way_of`.

    Raises:
        ValueError: there is no such codec, or a field is missing, unknown or wrong; the message names it.
    """
    given = dict(way)
    kind = CODECS.get(given.pop("codec", None))  # type: ignore[arg-type]
    if kind is None:
        raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {dict(way).get('codec')!r}")
    codec: Codec = _read(kind, given)
    if given:
        raise ValueError(f"{next(iter(given))!r} is no field of {dict(way)['codec']}")
    return codec


def _read(kind: Any, given: dict[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for field in fields(kind):
        if field.type is BlockFormat:
            values[field.name] = _read(BlockFormat, given)
            continue
        if field.name not in given:
            raise ValueError(f"{field.name!r} is missing")
        value = given.pop(field.name)
        if field.type is torch.dtype and value in DTYPES:
            value = DTYPES[value]
        if not isinstance(value, field.type) or isinstance(value, bool) is not (field.type is bool):  # type: ignore[arg-type]
            raise ValueError(f"{field.name!r} must be of type {field.type.__name__}, got {value!r}")  # type: ignore[union-attr]
        values[field.name] = value
    return kind(**values)


def parameters_of(split: Split) -> tuple[str, ...]:
    """The shapes of a graph's parameters and buffers, in order, such as "64x32"."""
    inputs = [n for n in split.forward.graph.find_nodes(op="placeholder") if n in split.parameters]
    return tuple("x".join(map(str, n.meta["val"].shape)) or "scalar" for n in inputs)


def pinned(
    graphs: Sequence[PinnedGraph],
    plan: Plan,
    made: Collection[str],
    parameters: tuple[str, ...],
    training: bool,
    policy: Policy,
) -> dict[str, Choice]:
    """The ways of a saved plan, by the activation's key, for `Plan.taking`.

    Args:
        plan: the rules' plan of the graph.
        made: the keys of all that forward makes; at some sizes not all of it is saved that is at others.
        parameters: those of the graph.

    Raises:
        Impossible: the graph is none of the plan's, or the plan asks for what would bias gradients.
    """
    rounded: dict[str, Choice] = {}
    kept: dict[str, Choice] = {}
    for choice in plan.choices:
        (kept if isinstance(choice.by_rules, EXACT) else rounded)[choice.activation.key] = choice
    graphs = [g for g in graphs if g.training == training]
    if not rounded:  # nothing to decide, unless the plan rounds what must be kept
        graphs = [g for g in graphs if g.parameters == parameters and not g.keys.isdisjoint(kept)]
        if not graphs:
            return {}
    graphs.sort(key=lambda g: len(g.keys ^ set(rounded)))
    for graph in graphs:
        if not _objections(graph, rounded, kept, made, parameters, policy):
            return {pin.key: _taken(pin, rounded[pin.key], policy) for pin in graph.pins if pin.key in rounded}
    found = [f"the plan has no graph of a model in {'training' if training else 'eval'} mode"]
    if graphs:
        found = _objections(graphs[0], rounded, kept, made, parameters, policy)
    more = [f"and {len(found) - MOST} more"] if len(found) > MOST else []
    raise Impossible(f"plan: {'; '.join(found[:MOST] + more)}. {REMEDY}")


def _objections(
    graph: PinnedGraph,
    rounded: Mapping[str, Choice],
    kept: Mapping[str, Choice],
    made: Collection[str],
    parameters: tuple[str, ...],
    policy: Policy,
) -> list[str]:
    """Why a graph is not the one that a plan knows; none where it is."""
    found = [f"the model saves {key}, which the plan does not have" for key in rounded if key not in graph.keys]
    if graph.parameters != parameters:
        pairs = zip(graph.parameters, parameters, strict=False)
        differ = next((f"one of {there} where the model has {here}" for there, here in pairs if there != here), None)
        numbers = f"{len(graph.parameters)} of them where the model has {len(parameters)}"
        found.append(f"the plan's parameters are others: {differ or numbers}")
    for pin in graph.pins:
        choice = rounded.get(pin.key) or kept.get(pin.key)
        if choice is None:
            if rounded and pin.key not in made:
                found.append(f"the plan has {pin.key}, which the model does not have")
            continue
        a = choice.activation
        dtype = str(a.value.dtype).removeprefix("torch.")
        if (pin.dtype, pin.dims) != (dtype, a.value.dim()):
            what = f"is {dtype} of {a.value.dim()} dimensions in the model and {pin.dtype} of {pin.dims} in the plan"
            found.append(f"{pin.key} {what}")
        elif pin.key in kept and not isinstance(codec := codec_of(pin.way), Keep):
            small = a.nbytes < policy.for_module(a.module).min_bytes or codec.nbytes(a.shape, a.value.dtype) >= a.nbytes
            if a.refusal is not None or not small:
                found.append(f"the plan rounds {pin.key}, which must be kept exact: {choice.reason}")
    return found


def _taken(pin: Pin, choice: Choice, policy: Policy) -> Choice:
    """The rules' choice with a pin's codec, if that rounds no more than the graph allows.

    Fewer elements to average over than where the plan was made, as in a smaller batch, may ask for more bits.
    """
    a, rules, dependence, codec = choice.activation, choice.by_rules, choice.dependence, codec_of(pin.way)
    reason = f"{choice.reason}; as pinned"
    if isinstance(codec, Keep):
        return replace(choice, codec=codec, reason=reason)
    allowed = codec == rules
    if isinstance(codec, Quantize) and isinstance(rules, Quantize):
        policy = policy.for_module(a.module)
        biased = dependence is not None and dependence.biased
        least = (bits_of(dependence, a.value, policy) or 8) if dependence is not None and biased else 1
        allowed = codec.format.bits >= least and codec.columns == rules.columns
        if not rules.standardised:  # there may be too few rows for it
            codec = replace(codec, standardised=False)
        if codec.format.bits < least and dependence is not None and 1 < dependence.averaged_over < pin.averaged_over:
            return replace(choice, reason=f"{choice.reason}: more than the {codec.format.bits} bits that are pinned")
    if not allowed:
        raise Impossible(f"plan: {pin.key} must not be {codec}; it may be {rules}, or finer: {choice.reason}")
    return replace(choice, codec=codec, reason=reason)
