"""Fused models whose message passing runs as on CUDA, by Triton kernels in the interpreter: the gradients of eager.

`tests/kernels/edges/test_edges_in_the_interpreter.py` runs this file in a process of its own.
"""

import pytest
import torch

from actcompile.kernels.edges.program import parse
from tests.kernels.edges.on_triton import on_triton  # noqa: F401  for every test here
from tests.passes.edges.test_edges import (  # noqa: F401  what holds on the CPU holds on CUDA
    called,
    graphs,
    test_16_bit_models,
    test_batches_of_any_size_are_compiled_for_once,
    test_batches_of_graphs,
    test_bipartite_graphs,
    test_edges_that_change_in_place_are_grouped_anew,
    test_from_target_to_source,
    test_gradients_are_those_of_eager,
    test_gradients_on_any_graph,
    test_in_bfloat16_gradients_are_finite_and_near,
    test_in_float32,
    test_indices_of_either_width,
    test_no_sources_at_all,
    test_ties_share_their_gradient_as_in_torch,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def did_run(request, on_triton, graphs):  # noqa: F811
    yield
    programs = [parse(node.args[0]) for node in called(graphs, torch.ops.actcompile.edges.default)]
    if not called(graphs, torch.ops.actcompile.aggregate.default) and all(program.inner for program in programs):
        return  # products inside of regions run on the CPU only
    drawn = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    left = drawn.get("name") == "two SAGE" or torch.float16 in drawn.values()
    left = left or drawn.get("index") is torch.int32  # some are skipped
    assert on_triton or left
