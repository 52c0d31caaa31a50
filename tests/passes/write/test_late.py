"""What backward can make at any time stands just before what uses it."""

from actcompile import compress, explain
from tests.helpers import SAVED, gnn, graph, step


def test_decoded_activations_stand_before_their_use():
    model = gnn("sage", layers=3)
    compress(model, **SAVED)
    step(model, graph(), model.parameters())
    (made,) = explain(model).graphs
    places = {n.name: i for i, n in enumerate(made.backward_nodes)}
    of_gradients = {n.name for n in made.backward_nodes if n.op == "placeholder" and "tangents" in n.name}
    for node in made.backward_nodes:
        if of_gradients & set(node.inputs):
            of_gradients.add(node.name)
    decoded = [n for n in made.backward_nodes if n.op.startswith("actcompile.dequantize")]
    assert len(decoded) > 2
    for node in decoded:
        between = made.backward_nodes[places[node.name] + 1 : min(_users(made, node, places))]
        assert not [n.name for n in between if n.name in of_gradients]


def _users(made, node, places):
    return [places[n.name] for n in made.backward_nodes if node.name in n.inputs]
