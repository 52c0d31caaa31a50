"""Look at saved activations while a model trains: which tensors our plan would round, and what is in them.

The model runs through the pipeline up to the plan and nothing is rounded: outputs are exact, and gradients up to the
order in which floats are added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from actcompile.passes.codecs.codecs import Quantize
from actcompile.passes.codecs.standardise import columns_alike, standard
from actcompile.passes.graph import _torch
from actcompile.passes.graph.find import memory_order
from actcompile.passes.plan.plan import Choice, Plan
from actcompile.passes.plan.policy import Policy
from actcompile.passes.spare.dropout import dropout

from ..config import Config
from ..pipeline import cut, decide, fuse
from ..tracing.capture import whole_graphs
from ..tracing.trace import isolated

Look = Callable[[Choice, Tensor], None]


def observed(
    model: Callable[..., Any], look: Look, config: Config | None = None, *, dynamic: bool | None = None, **options: Any
) -> Callable[..., Any]:
    """`model` compiled with `look(choice, value)` called for every saved activation that would be quantised.

    Calling the result is calling the model: train it, or call it once. Nothing is looked at where nothing is saved,
    under `torch.no_grad()` for one.

    The graphs are those that `config.inner` would compile, so activations have the names that they have there; they run
    op by op, without a compiler, and with Inductor's graphs dropout draws other bits than it draws in eager mode.

    Args:
        model: any module or function that `torch.compile` can trace; it is not changed.
        look: called in every forward, in the order in which the values are computed. `choice.activation` tells the
            module, source line, op and uses; `choice.codec.format` is the format it would have. `value` is detached,
            contiguous, standardised if the codec says so, and in the order in which it would be cut into blocks; it
            must not be changed, nor kept for long, since it is no copy.
        config: what would be quantised, and how; `options` change single fields of it.
        dynamic: as in `torch.compile`.
    """
    return unrounded(model, Config.make(config, **options), lambda: _Looking(look), dynamic)


class Watcher:
    """What is done with one graph that runs op by op and rounds nothing; by itself nothing."""

    def planned(self, plan: Plan, policy: Policy) -> None:
        """Is told what would be rounded, before forward and backward are asked for."""

    def forward(self, graph: fx.GraphModule, inputs: list[Any]) -> Any:
        return _torch.boxed_nop(graph, inputs)

    def backward(self, graph: fx.GraphModule, inputs: list[Any]) -> Any:
        return _torch.boxed_nop(graph, inputs)


def unrounded(
    model: Callable[..., Any], config: Config, watcher: Callable[[], Watcher], dynamic: bool | None = None
) -> Callable[..., Any]:
    """`model` in the graphs that `config.inner` would compile, up to the plan: run op by op, each with its watcher."""

    @whole_graphs
    def compile_graph(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        watching = watcher()

        def partition(
            joint: fx.GraphModule, joint_inputs: Sequence[object], *, num_fwd_outputs: int, **keywords: Any
        ) -> tuple[fx.GraphModule, fx.GraphModule]:
            if config.fast_dropout:
                dropout(joint, num_fwd_outputs)
            fuse(joint, num_fwd_outputs, config, keywords)
            split = cut(joint, joint_inputs, num_fwd_outputs, **keywords)
            policy = config.policy()
            share = 0.0 if config.replay == "auto" else config.replay  # without, all is saved that may be
            watching.planned(decide(split, policy, config, share)[0], policy)
            split.finish()
            return split.forward, split.backward

        def after_joint_passes(joint: fx.GraphModule, joint_inputs: Sequence[object], **keywords: Any) -> Any:
            return _torch.inductor_partition(joint, joint_inputs, _Partitioner(partition), **keywords)

        compiler = _torch.aot_autograd(
            fw_compiler=watching.forward,
            bw_compiler=watching.backward,
            inference_compiler=_torch.boxed_nop,
            partition_fn=partition if config.inner == "aot_eager" else after_joint_passes,
            decompositions=_torch.select_decomp_table(),
            keep_inference_input_mutations=True,
        )
        return compiler(gm, inputs)

    return torch.compile(model, backend=compile_graph, dynamic=dynamic, **isolated())


class _Looking(Watcher):
    def __init__(self, look: Look) -> None:
        self.look = look

    def planned(self, plan: Plan, policy: Policy) -> None:
        self.watched = {_encoded(c).name: c for c in plan.choices if isinstance(c.codec, Quantize)}

    def forward(self, graph: fx.GraphModule, inputs: list[Any]) -> Any:
        return _torch.make_boxed_func(_Observer(graph, self.watched, self.look).run)


def _encoded(choice: Choice) -> fx.Node:
    """The forward node whose value is cut into blocks, or the activation where forward does not compute that."""
    found = standard(choice.activation.node) if choice.codec.standardised else None  # type: ignore[union-attr]
    return found.result if found and found.result.users else choice.activation.node


class _Partitioner(_torch.CustomPartitionerFn):
    """A function as what Inductor takes for a partitioner; nothing that it makes is cached."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        return self.function(gm, joint_inputs, **kwargs)

    def uuid(self) -> None:
        return None


class _Observer(fx.Interpreter):
    """Runs a forward graph and shows the values of the nodes that are watched, by name."""

    def __init__(self, forward: fx.GraphModule, watched: dict[str, Choice], look: Look) -> None:
        super().__init__(forward)
        self.watched, self.look = watched, look

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        choice = self.watched.get(n.name)
        if choice is not None:
            seen = value.detach()
            if choice.codec.standardised and n.name == choice.activation.node.name:  # type: ignore[union-attr]
                seen = columns_alike(seen)
            self.look(choice, seen.permute(memory_order(choice.activation.value)).contiguous())
        return value
