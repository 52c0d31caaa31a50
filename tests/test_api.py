"""`compress`, `explain` and the backend, as a user calls them."""

import copy
import gc
import json
import weakref

import pytest
import torch
from torch import nn

import actcompile
from actcompile import Config, Report, bits, compress, explain, keep, lossless
from tests.helpers import EXACT, FAST, SAVED, Mlp, assert_equal, gnn, graph, loss, step, uncompressed

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def codecs(report: Report) -> list[list[str]]:
    return [[row.codec.partition(",")[0] for row in g.rows if row.bytes_after] for g in report.graphs]


class Broken(nn.Module):
    """Three graphs, the middle one without parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = self.first(x).sin()
        torch._dynamo.graph_break()
        x = nn.functional.dropout((x * x).relu().sin())
        torch._dynamo.graph_break()
        return self.last(x.sigmoid().relu())


def test_the_same_object_comes_back_with_the_same_state():
    model = gnn()
    keys, kind, children = list(model.state_dict()), type(model), dict(model.named_modules())
    parameters = dict(model.named_parameters())
    assert compress(model, **FAST) is model
    model(*graph()).sum().backward()
    assert type(model) is kind and isinstance(model, nn.Module)
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == children
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_a_deep_copy_is_an_uncompressed_model():
    model, inputs = compress(gnn(), **FAST), graph()
    model(*inputs).sum().backward()
    copied = copy.deepcopy(model)
    assert copied._compiled_call_impl is None
    assert explain(copied).graphs == ()
    assert_equal(step(copied, inputs, copied.parameters())[:1], step(copied, inputs, copied.parameters())[:1])
    compress(copied, **EXACT)(*inputs).sum().backward()
    assert "quantize" in str(codecs(explain(model))) and "quantize" not in str(codecs(explain(copied)))


def test_a_state_goes_to_an_uncompressed_model_and_back(tmp_path):
    model, inputs = compress(gnn(dropout=0.0), **FAST).eval(), graph()
    plain = gnn(dropout=0.0).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    plain.load_state_dict(torch.load(tmp_path / "state.pt"), strict=True)
    torch.testing.assert_close(plain(*inputs), model(*inputs))
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(0.5)
    model.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(model(*inputs), plain(*inputs))


def test_two_models_with_two_configs_do_not_mix():
    coarse, fine, inputs = compress(gnn(), **SAVED), compress(gnn(), **EXACT), graph()
    reference = step(uncompressed(gnn()), inputs, fine.parameters())[:1]
    torch._dynamo.reset()
    for _ in range(2):
        exact = step(fine, inputs, fine.parameters())
        rounded = step(coarse, inputs, coarse.parameters())
    assert_equal(exact[:1], reference)
    assert not torch.equal(exact[1], rounded[1])
    assert len(explain(coarse).graphs) == len(explain(fine).graphs) == 1
    assert "quantize(2 bits" in codecs(explain(coarse))[0]
    assert not any("quantize" in c for c in codecs(explain(fine))[0])


def test_ten_models_of_a_class_are_all_compressed():
    for _ in range(10):  # torch compiles one piece of code eight times, then gives up
        model = compress(Mlp(), **FAST)
        model(torch.randn(64, 16)).sum().backward()
        assert len(explain(model).graphs) == 1


def test_compressing_again_replaces_the_config():
    model, x = compress(Mlp(), **FAST), torch.randn(64, 16)
    model(x).sum().backward()
    compress(model, bits=8, **FAST)
    assert "quantize(8 bits" in codecs(explain(model, x))[0]
    model(x).sum().backward()
    assert [["quantize(8 bits" in c for c in codecs(explain(model))]] == [[True]]


def test_a_compressed_model_is_freed():
    model = compress(Mlp(), **FAST)
    loss(model(torch.randn(64, 16))).backward()
    reference = weakref.ref(model.first.weight)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("model", [lambda x: x, torch.zeros(3), None])
def test_what_is_no_module_is_an_error(model):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        compress(model)


def test_a_compiled_model_is_an_error():
    with pytest.raises(TypeError, match="compiled already"):
        compress(torch.compile(Mlp()))


def test_wrong_options_are_errors_that_name_the_field():
    with pytest.raises(ValueError, match="^bits must"):
        compress(Mlp(), bits=3)
    with pytest.raises(TypeError, match="unknown option 'bit'"):
        compress(Mlp(), bit=2)
    with pytest.raises(ValueError, match=r"rules\['heads'\] matches no module of Mlp.*first, last, dropout"):
        compress(Mlp(), rules={"*": keep(), "heads": keep()})
    with pytest.raises(ValueError, match="^bits must"):
        explain(Mlp(), torch.randn(4, 16), options={"bits": 3})
    compiled = torch.compile(Mlp(), backend=actcompile.backend, options={"levels": "best"})
    with pytest.raises(Exception, match="levels must be one of"):
        compiled(torch.randn(4, 16))


def test_rules_choose_by_module():
    model, inputs = gnn(layers=3, norm=False), graph()
    rules = {"convs.0.*": keep(), "convs.1.*": bits(8), "convs.2.*": lossless()}
    report = explain(model, *inputs, config=Config(**SAVED, rules=rules))
    (rows,) = (g.rows for g in report.graphs)
    made = {p: {r.codec.partition(",")[0] for r in rows if r.module.startswith(p) and r.bytes_before > 1000} for p in
            ("convs.0", "convs.1", "convs.2", "dropout")}  # fmt: skip
    assert made["convs.0"] == {"keep"}
    assert "quantize(8 bits" in made["convs.1"] and "quantize(2 bits" not in made["convs.1"]
    assert made["convs.2"] <= {"keep", "recompute", "pack_bits"}
    assert "quantize(2 bits" in made["dropout"]


def test_keeping_everything_changes_nothing():
    model, inputs = gnn(), graph()
    report = explain(model, *inputs, config=Config(**FAST, rules={"*": keep()}, fast_dropout=False, fuse=False))
    assert report.saved_bytes_after <= report.saved_bytes_before
    assert "ops.actcompile" not in report.code()


def test_explain_needs_no_run_and_disturbs_nothing():
    model, inputs = gnn(), graph()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = explain(model, *inputs, config=Config(**FAST))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert 0 < report.saved_bytes_after < report.saved_bytes_before
    assert report.saved_bytes_before == sum(r.bytes_before for g in report.graphs for r in g.rows)


@pytest.mark.parametrize("name", ["sage", "gin", "edge_mlp"])
def test_explain_says_what_a_run_then_does(name):
    model, inputs = compress(gnn(name), **FAST), graph()
    told = explain(model, *inputs)
    model(*inputs).sum().backward()
    done = explain(model)
    assert done.graphs == told.graphs
    assert {r.source.partition(":")[0] for g in done.graphs for r in g.rows if r.bytes_before} <= {"models.py", ""}


def test_explain_of_meta_inputs_allocates_nothing_large():
    x, edges = torch.empty(10**8, 16, device="meta"), torch.empty(2, 10**9, dtype=torch.long, device="meta")
    report = explain(gnn(), x, edges, config=Config(inner="aot_eager"))
    assert report.saved_bytes_before > 10**10
    assert report.saved_bytes_after < report.saved_bytes_before / 8


def test_explain_of_a_compiled_model_and_of_a_function():
    model, x = Mlp(), torch.randn(64, 16)
    options = {**FAST, "bits": 8}
    compiled = torch.compile(model, backend="actcompile" if _installed() else actcompile.backend, options=options)
    assert explain(compiled).graphs == explain(model).graphs == ()
    told = explain(compiled, x, options=options)
    compiled(x).sum().backward()
    assert explain(compiled).graphs == explain(model).graphs == told.graphs
    assert "quantize(8 bits" in codecs(told)[0]
    assert explain(lambda x: model(x).sum(), x, options=options).saved_bytes_after == told.saved_bytes_after
    with pytest.raises(ValueError, match=r"explain\(function"):
        explain(lambda x: x)


def _installed() -> bool:
    return "actcompile" in torch._dynamo.list_backends(exclude_tags=())


def test_every_graph_between_breaks_is_compressed_and_shown():
    model, x = compress(Broken(), **FAST), torch.randn(64, 16)
    told = explain(model, x)
    assert len(told.graphs) == 3
    assert [note for note in told.notes if note.startswith("graph break") and "test_api.py" in note] == list(told.notes)
    loss(model(x)).backward()
    assert explain(model).graphs == told.graphs
    assert all(any(c != "keep" for c in made) for made in codecs(told))


def test_a_report_survives_json(tmp_path):
    report = explain(Broken(), torch.randn(64, 16), config=Config(**FAST))
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text
    assert Report.from_json(text) == report
    assert json.loads(text)["graphs"][0]["rows"][0]["codec"]


def test_a_report_shows_both_graphs_and_marks_what_was_inserted():
    report = explain(Mlp(), torch.randn(64, 16), config=Config(**FAST))
    (g,) = report.graphs
    assert "actcompile.quantize" in g.forward and "actcompile.dequantize" in g.backward
    assert {n.op for n in g.forward_nodes if n.inserted} >= {
        "actcompile.quantize.default",
        "actcompile.draw_seed.default",
    }
    others = [n.op for n in (*g.forward_nodes, *g.backward_nodes) if not n.inserted and "actcompile" in n.op]
    own = ("mask_to_bytes", "bytes_to_mask", "random_mask", "draw_seed")  # casts, and the model's dropout
    assert all(op.split(".")[1] in own for op in others)
    assert g.forward in report.code() and g.backward in report.code()
    shown = str(report)
    assert "pack_bits" in shown and "test_api.py" not in shown


def test_modules_of_torch_itself_are_compressed():
    models = [nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)) for _ in range(2)]
    for model in models:
        assert compress(model, inner="aot_eager", min_bytes=0) is model
        model(torch.randn(128, 8)).sum().backward()
        (made,) = explain(model).graphs
        assert made.bytes_after < made.bytes_before
        assert model[0].weight.grad is not None
