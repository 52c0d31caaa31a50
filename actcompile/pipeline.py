"""The whole pipeline, top to bottom: from a joint graph to the rewritten forward and backward graphs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Any

from torch import fx

from actcompile.passes.codecs.standardise import offer
from actcompile.passes.edges.along import along
from actcompile.passes.edges.by_node import by_node
from actcompile.passes.edges.composed import composed
from actcompile.passes.edges.edges import Fused, edges
from actcompile.passes.edges.embeddings import embeddings
from actcompile.passes.edges.scaled import scaled
from actcompile.passes.edges.summed import summed
from actcompile.passes.edges.towers import joined, towers
from actcompile.passes.graph import _torch
from actcompile.passes.graph.bias import Dependence, bias
from actcompile.passes.graph.find import SavedActivation, find
from actcompile.passes.graph.origin import module_path
from actcompile.passes.graph.reach import reach
from actcompile.passes.graph.sizes import sizes
from actcompile.passes.graph.split import Split, is_input, root
from actcompile.passes.plan.fit import Fitted, Impossible
from actcompile.passes.plan.memory import lifetimes, live_bytes
from actcompile.passes.plan.pins import parameters_of, pinned
from actcompile.passes.plan.plan import Choice, Plan, plan
from actcompile.passes.plan.policy import Policy
from actcompile.passes.spare.apart import apart
from actcompile.passes.spare.commute import commute
from actcompile.passes.spare.dropout import dropout, redraw
from actcompile.passes.spare.masks import masks
from actcompile.passes.spare.narrow import narrow
from actcompile.passes.spare.reals import reals
from actcompile.passes.spare.rebuild import rebuild
from actcompile.passes.spare.renormalise import renormalise
from actcompile.passes.spare.replay import Replayed, replay
from actcompile.passes.spare.views import views
from actcompile.passes.write.accumulate import accumulate
from actcompile.passes.write.arrange import arrange
from actcompile.passes.write.late import late
from actcompile.passes.write.merge import merge
from actcompile.passes.write.own import own
from actcompile.passes.write.rewrite import rewrite
from actcompile.passes.write.scale import scale
from actcompile.passes.write.tile import tile
from actcompile.passes.write.verify import verify

from .bounds import fit
from .config import COARSE, FINE, Config
from .report import cache as _report_cache
from .report import log as _log
from .report.data import GraphReport
from .report.record import Spared, memory, outlook, record
from .report.saved_plan import SavedPlan
from .tracing.call import Situation

REPLAY = 0.4  # of the forward's work, that backward may do again from a model's inputs
WORTH = 0.98  # of a step's peak: where it falls below without that, it is not done
ROOM = 1 / 8  # of a step's peak, that more bits may take
_reports: ContextVar[list[GraphReport] | None] = ContextVar("actcompile_reports", default=None)


def partition(
    joint: fx.GraphModule,
    inputs: Sequence[object],
    *,
    config: Config,
    situation: Situation = Situation(),  # noqa: B008  frozen
    num_fwd_outputs: int,
    only: frozenset[str] | None = None,
    **options: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Partitions a joint graph as torch does, then rewrites both graphs so that saved activations are kept encoded.

    Args:
        joint, inputs, num_fwd_outputs, options: as torch's `min_cut_rematerialization_partition` takes them.
        config: how activations are kept.
        only: where given, the keys of the activations that may be rounded; all others are exact.
        situation: which part of a call the graph is.
    """
    if config.fast_dropout:
        dropout(joint, num_fwd_outputs)
    plain = _copied(joint)
    fused = fuse(joint, num_fwd_outputs, config, options)

    def again(graph: fx.GraphModule = joint) -> Split:
        return cut(_copied(graph), inputs, num_fwd_outputs, situation, **options)

    by_torch = again(plain)
    saved_by_torch, memory_by_torch = find(by_torch), memory(by_torch, config)
    fitted: Fitted | None = None
    ways: Mapping[str, Choice] = {}
    precision, exact = "", config.policy(situation.training).exact is not None
    if config.pinned is not None and not exact:
        made, ways = pin(again, config, config.pinned, situation.training, saved_by_torch)
    else:
        made, precision = settle(again, config, situation.training, saved_by_torch)
    if (config.bounded or config.measured) and not exact:
        fitted = fit(made.split, made.plan, made.policy, config, memory_by_torch.peak)
        ways = fitted.ways
    if ways or only is not None:
        made = make(again(), made.policy, config, made.share, saved_by_torch, ways, only)

    report = record(
        made.split, made.plan, saved_by_torch, made.saved, fused, made.spared, made.reached, memory_by_torch, config,
        situation,
    )  # fmt: skip
    report = replace(report, precision=precision, outlook=outlook(fitted) if fitted is not None else None)
    _report_cache.attach(joint, asdict(report))
    _announce(report)
    return made.split.forward, made.split.backward


def settle(
    again: Callable[[], Split], config: Config, training: bool, saved_by_torch: Sequence[SavedActivation]
) -> tuple["Made", str]:
    """The graphs as the rules have them, and what a step's peak decides of the rules.

    That is whether a first layer is done again (`replay="auto"`), and how many bits floats take (`bits="auto"`): the
    peak falls little where less is saved than backward computes with, so that many bits cost little there.

    Args:
        again: makes both graphs anew, as torch cuts them.

    Returns:
        the graphs as written, and in words what decided the bits; empty where nothing was to decide.
    """

    def smaller(policy: Policy, coarser: Policy | None = None) -> Made:
        share, *less = shares(config)
        made = make(again(), policy, config, share, saved_by_torch, coarser=coarser)
        if less and any(isinstance(s, Replayed) for s in made.spared):
            other = make(again(), policy, config, less[0], saved_by_torch, coarser=coarser)
            if other.peak(config) < WORTH * made.peak(config):
                return other
        return made

    coarse, fine = (config.policy(training, bits) for bits in (COARSE, FINE))
    if fine == coarse or config.bounded:
        return smaller(coarse), ""
    made = smaller(fine, coarse)
    if not made.finer:
        return made, ""
    peak = made.peak(config) - made.finer
    takes = f"{made.finer / 1e6:,.2f} MB, {made.finer / max(peak, 1):.1%} of a step's peak"
    if made.finer <= ROOM * peak:
        return made, f"floats have {FINE} bits, which take {takes}, more than {COARSE} would"
    return smaller(coarse), f"floats have {COARSE} bits: {FINE} would take {takes}, more"


def shares(config: Config) -> tuple[float, ...]:
    """The shares of the forward's work among which a step's peak decides how much backward may do again."""
    return (REPLAY, 0.0) if config.replay == "auto" else (config.replay,)


def pin(
    again: Callable[[], Split],
    config: Config,
    saved: SavedPlan,
    training: bool,
    saved_by_torch: Sequence[SavedActivation],
) -> tuple["Made", Mapping[str, Choice]]:
    """The graphs as written by the rules, and the ways of a saved plan: under those rules, of what a step's peak
    decided where the plan was made, that have the plan's activations.

    Raises:
        Impossible: none have.
    """
    refused = []
    policies = dict.fromkeys(config.policy(training, bits) for bits in (COARSE, FINE))
    for policy, share in product(policies, shares(config)):
        made = make(again(), policy, config, share, saved_by_torch)
        keys, shapes = set(made.split.keys.known.values()), parameters_of(made.split)
        try:
            return made, pinned(saved.graphs, made.plan, keys, shapes, training, policy)
        except Impossible as reason:
            refused.append(reason)
    raise refused[0]


@dataclass(frozen=True)
class Made:
    """Graphs that are written, the plan they were written by, and what the report says of them.

    Attributes:
        policy, share: what the plan was made by, as `make` takes them.
        saved: what was saved of the fused graph before anything was decided.
        finer: bytes that the plan saves more than it would under a coarser policy.
    """

    policy: Policy
    share: float
    split: Split
    saved: Sequence[SavedActivation]
    plan: Plan
    spared: list[Spared]
    reached: Mapping[fx.Node, tuple[int, ...]]
    finer: int = 0

    def peak(self, config: Config) -> int:
        """The peak of a step in bytes, as it is predicted."""
        nodes = len(self.split.forward.graph.nodes) + len(self.split.backward.graph.nodes)
        return max(live_bytes(lifetimes(self.split, config.inner == "inductor"), nodes), default=0)


def make(
    split: Split,
    policy: Policy,
    config: Config,
    share: float,
    saved_by_torch: Sequence[SavedActivation],
    ways: Mapping[str, Choice] = MappingProxyType({}),
    only: frozenset[str] | None = None,
    coarser: Policy | None = None,
) -> Made:
    """Decides how each saved activation is kept, and writes both graphs so.

    Args:
        share: of the forward's work, that backward may do again.
        ways: what is kept otherwise than the rules say, by the activation's key.
        only: as in `partition`.
        coarser: a policy to compare with: what the plan takes more for its own is noted.
    """
    saved = find(split)
    chosen, spared = decide(split, policy, config, share)
    finer = chosen.bytes_after - chosen.under(coarser).bytes_after if coarser is not None else 0
    if ways:
        chosen = chosen.taking(ways, policy.min_bytes)
    if only is not None:
        chosen = chosen.rounding_only(only)
    reached = reach(split)
    write(split, chosen, saved_by_torch)
    return Made(policy, share, split, saved, chosen, spared, reached, finer)


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    graph.output_node().meta.update(module.graph.output_node().meta)
    return fx.GraphModule(module, graph)


def fuse(joint: fx.GraphModule, num_fwd_outputs: int, config: Config, options: Mapping[str, Any]) -> list[Fused]:
    """Fuses the message passing of a joint graph, in place; `options` are those of `partition`. Returns the regions."""
    sizes(joint.graph)
    if not config.fuse:
        return []
    embeddings(joint.graph)
    towers(joint.graph)
    by_node(joint.graph)
    joined(joint.graph)
    scaled(joint.graph)
    composed(joint.graph)
    along(joint.graph)
    summed(joint.graph)
    return edges(joint.graph, num_fwd_outputs, names_of_parameters(joint, options))


def cut(
    joint: fx.GraphModule,
    inputs: Sequence[object],
    num_fwd_outputs: int,
    situation: Situation = Situation(),  # noqa: B008
    **options: Any,
) -> Split:
    """Partitions a joint graph as torch does."""
    forward, backward = _torch.min_cut_rematerialization_partition(
        joint, inputs, num_fwd_outputs=num_fwd_outputs, **options
    )
    parameters = names_of_parameters(joint, options)
    return Split(forward, backward, num_fwd_outputs, parameters, situation.crossing, situation.handed_on)


def names_of_parameters(joint: fx.GraphModule, options: Mapping[str, Any]) -> list[str]:
    """The names of the inputs that live from step to step: parameters and buffers."""
    names = [n.name for n in joint.graph.find_nodes(op="placeholder")]
    return [names[i] for i in options.get("static_lifetime_input_indices") or ()]


def decide(split: Split, policy: Policy, config: Config, share: float) -> tuple[Plan, list[Spared]]:
    """Chooses how each saved activation is kept; nothing of the gradients is lost yet.

    Changes what is saved: masks that act together become one, and what backward can do without is not saved; the latter
    is returned, too.
    """

    def kind(node: fx.Node) -> Policy:
        return policy.for_module(module_path(node))

    def wanted() -> list[SavedActivation]:
        return [a for a in find(split) if a.refusal is None and kind(a.node).wants(a)]

    def dependences() -> dict[fx.Node, Dependence]:
        floats = [a for a in find(split) if a.refusal is None and a.value.is_floating_point()]
        return bias(split.backward.graph, [a.placeholder for a in floats])

    spared: list[Spared] = [*views(split, find(split), lambda n: policy.for_module(module_path(n)), policy.min_bytes)]
    spared += reals(split, [a for a in find(split) if a.refusal is None and policy.for_module(a.module).compresses(a)])
    masks(split, kept=[a.placeholder for a in find(split) if not policy.for_module(a.module).lossless])
    if config.rebuild:
        spared += commute(split, [a for a in wanted() if kind(a.node).bits is not None], kind)
        spared += rebuild(split, wanted(), dependences(), kind)
    if share:
        spared += replay(split, wanted(), share)
    if config.rebuild:
        narrow(split)
    spared += redraw(split, [a for a in find(split) if a.refusal is None and kind(a.node).compresses(a)])
    saved_apart = apart(split, [a for a in wanted() if kind(a.node).method is None], kind)
    spared = [s for s in spared if s.activation.node not in saved_apart]
    if config.rebuild:
        spared += renormalise(split, [a for a in wanted() if kind(a.node).bits is not None], dependences())
    offer(split, [a for a in wanted() if kind(a.node).standardise])
    return plan(find(split), dependences(), policy), spared


def write(split: Split, plan: Plan, saved_by_torch: Sequence[SavedActivation]) -> None:
    """Rewrites both graphs as a plan says, and has them hold little at once."""
    outputs, gradients = list(split.user_outputs), _number_of_outputs(split.backward)
    rewrite(split, plan)
    split.hand_on(split.symbols(saved_by_torch).values())
    split.finish()
    verify(split, plan, outputs, gradients)
    tile(split.backward.graph)
    late(split)
    inputs = {n for n in split.forward.graph.find_nodes(op="placeholder") if is_input(n)}
    inputs |= {placeholder for node, placeholder in split.pairs if root(node) in inputs}
    for module, results in ((split.forward, len(outputs)), (split.backward, gradients)):
        scale(module.graph)
        merge(module.graph, inputs)
        own(module.graph, results)
        accumulate(module.graph)
        arrange(module.graph)
        module.recompile()


def _number_of_outputs(graph_module: fx.GraphModule) -> int:
    returned = graph_module.graph.output_node().args[0]
    return len(returned) if isinstance(returned, (list, tuple)) else 1


def _announce(report: GraphReport) -> None:
    reports = _reports.get()
    if reports is not None:
        reports.append(report)
    _log.graph(report)


@contextmanager
def recording() -> Iterator[list[GraphReport]]:
    """Collects the reports of the graphs that are partitioned inside the block."""
    reports: list[GraphReport] = []
    token = _reports.set(reports)
    try:
        yield reports
    finally:
        _reports.reset(token)
