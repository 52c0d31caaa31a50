"""What `bias` claims of saved activations where backward is fused: against the mean gradient when one is rounded."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from actcompile.passes.edges.edges import edges
from actcompile.passes.graph.bias import bias
from actcompile.passes.graph.split import Split
from actcompile.passes.spare.masks import masks
from tests.helpers import quickly
from tests.passes.edges.layers import build, graph
from tests.passes.graph.test_bias import floats
from tests.passes.graph.test_bias_claims import off

EDGES_OP = torch.ops.actcompile.edges.default


def backward_of(model, inputs):
    """The backward graph module of a model whose message passing is fused, and the arguments of one call of it."""
    caught = {}

    def forward(parameters, buffers, *inputs):
        return torch.func.functional_call(model, (parameters, buffers), inputs)

    def partition(joint, joint_inputs, *, num_fwd_outputs, **options):
        edges(joint.graph, num_fwd_outputs, ())
        both = min_cut_rematerialization_partition(joint, joint_inputs, num_fwd_outputs=num_fwd_outputs, **options)
        split = Split(*both, num_fwd_outputs)
        masks(split)
        split.finish()
        return both

    def catch(module, _):
        def run(arguments):
            caught["module"], caught["arguments"] = module, list(arguments)
            return module(*arguments)

        run._boxed_call = True
        return run

    compiled = aot_function(
        forward,
        fw_compiler=lambda module, _: make_boxed_func(module.forward),
        bw_compiler=catch,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    y = compiled(dict(model.named_parameters()), dict(model.named_buffers()), *inputs)
    y.backward(torch.randn_like(y))
    return caught["module"], caught["arguments"]


NAMES = ("GAT without self-loops", "GATv2", "Transformer edges", "two max", "own gate", "own relu", "distances")
NAMES += ("GCN weighted", "own norm")
ALIKE = ("GAT 2 heads", "GATv2 edges", "Transformer", "own gelu", "ResGated", "by hand", "two SAGE")


@pytest.mark.parametrize("name", quickly(NAMES + ALIKE, ALIKE))
def test_a_bias_is_no_larger_than_claimed(name):
    """With noise as large as the values, a bias "over n" is a few n-ths of the gradient, and "none" is none."""
    model, takes = build(name)
    module, arguments = backward_of(model, graph(nodes=60, edges=300, takes=takes))
    assert module.graph.find_nodes(op="call_function", target=EDGES_OP) or name == "two SAGE"
    sources = [n for n in floats(module) if not n.name.startswith("tangents")]
    claims = bias(module.graph, sources)
    for source, found in claims.items():
        if found.averaged_over == 1:
            continue  # anything may be
        bent, noise = off(module, arguments, source, 0)
        limit = 10 / found.averaged_over if found.biased else 1e-10
        assert bent < limit + 4 * noise * found.biased, (source, found.op, found.averaged_over, bent, noise)


def test_claims_are_the_same_as_unfused_where_an_element_meets_itself():
    """A sigmoid of a message is not linear, whether it is computed in one op or in ten."""
    model, takes = build("own gate")
    module, arguments = backward_of(model, graph(nodes=60, edges=300, takes=takes))
    sources = [n for n in floats(module) if n.meta["val"].dim() == 2 and not n.name.startswith("tangents")]
    claims = bias(module.graph, sources)
    worst = [s for s, found in claims.items() if found.averaged_over == 1]
    assert worst and max(off(module, arguments, s, 0)[0] for s in worst) > 0.02
