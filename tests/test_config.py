"""A wrong field is an error that names it; a right one reaches the planner."""

import pickle
from types import MappingProxyType

import pytest
import torch

from actcompile import Config, bits, keep, lossless


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 3),
        ("bits", True),
        ("bits", "2"),
        ("bits", "Auto"),
        ("nonlinear_bits", 16),
        ("nonlinear_bits", "Auto"),
        ("block", 4),
        ("block", 256.0),
        ("block", None),
        ("levels", "optimal"),
        ("metadata", torch.bfloat16),
        ("min_bytes", -1),
        ("min_bytes", True),
        ("inner", "eager"),
    ],
)
def test_a_wrong_value_names_its_field_and_what_it_got(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be") as error:
        Config(**{field: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "rules", ["convs", ["convs"], 3, ("convs", keep()), {"convs": "keep"}, {"convs": 4}, {1: keep()}]
)
def test_wrong_rules_name_rules(rules):
    with pytest.raises(TypeError, match=r"^rules(\[.*\])? must"):
        Config(rules=rules)


@pytest.mark.parametrize("number", [0, 3, 16, None, "2"])
def test_a_rule_with_wrong_bits_is_an_error(number):
    with pytest.raises(ValueError, match="number must be one of"):
        bits(number)


def test_an_unknown_field_lists_the_known_ones():
    with pytest.raises(TypeError, match="'bit'.*nonlinear_bits.*inner"):
        Config.make(bit=2)


def test_single_fields_change_a_config_and_leave_the_rest():
    config = Config(bits=4, block=64)
    assert Config.make(config, bits=8) == Config(bits=8, block=64)
    assert config == Config(bits=4, block=64)
    assert Config.make() == Config()


def test_a_config_is_a_value():
    made = [Config(rules=rules) for rules in ({"a": keep()}, MappingProxyType({"a": keep()}), (("a", keep()),))]
    assert len(set(made)) == 1
    assert pickle.loads(pickle.dumps(made[0])) == made[0]
    assert repr(made[0]) == repr(pickle.loads(pickle.dumps(made[0])))
    assert Config(rules={"a": keep(), "b": bits(8)}) != Config(rules={"b": bits(8), "a": keep()})  # first match wins
    with pytest.raises(AttributeError):
        made[0].bits = 8


def test_the_policy_has_the_fields():
    policy = Config(bits=1, nonlinear_bits=None, block=64, levels="uniform", metadata="bfloat16", min_bytes=7).policy()
    assert (policy.bits, policy.nonlinear_bits, policy.block) == (1, None, 64)
    assert (policy.levels, policy.metadata, policy.min_bytes) == ("uniform", torch.bfloat16, 7)


def test_rules_match_by_path_first_match_first():
    policy = Config(rules={"convs.0.lin": bits(8), "convs.*": keep(), "head": lossless(), "*": bits(4)}).policy()
    assert policy.for_module("convs.0.lin").bits == 8
    assert policy.for_module("convs.0.lin.deep").nonlinear_bits == 8  # what is inside matches too
    assert not policy.for_module("convs.0.line").lossless
    assert not policy.for_module("convs.11.aggr").lossless
    assert policy.for_module("head").bits is None and policy.for_module("head").lossless
    assert policy.for_module("header").bits == 4
    assert policy.for_module("").bits == 4  # outside every submodule


def test_without_a_match_the_config_itself_decides():
    policy = Config(bits=1, rules={"head": keep()}).policy()
    assert policy.for_module("convs.0").bits == 1
    assert policy.for_module("").lossless
