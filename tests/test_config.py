from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimfit_fx import Config, ConfigError
from slimfit_fx.config import GRANULARITIES, MODES, POLICIES

configs = st.builds(
    Config,
    freeze_rate=st.floats(0, 1),
    policy=st.sampled_from(list(POLICIES)),
    granularity=st.sampled_from(GRANULARITIES),
    always_open=st.none() | st.lists(st.sampled_from(["head", r"\d+"])).map(tuple),
    never_gate=st.lists(st.sampled_from(["embed", r"norm\."])).map(tuple),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**31),
)


@given(configs)
def test_json_round_trip(config):
    assert Config.from_json(config.to_json()) == config


def test_absent_fields_keep_their_defaults():
    assert Config.from_json("{}") == Config()


def test_one_pattern_may_be_a_string():
    assert Config(never_gate="embed").never_gate == ("embed",)


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan"), "0.9", True, None])
def test_freeze_rate_out_of_range(rate):
    with pytest.raises(ConfigError, match="freeze_rate is the part of the layers"):
        Config(freeze_rate=rate)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"preset": "exakt"},
            "unknown preset 'exakt'; known: 'exact', 'paper', 'balanced', 'tight'. Did you mean 'exact'?",
        ),
        (
            {"policy": "lru"},
            "unknown policy 'lru'; known: 'update', 'overdue', 'gain', 'gradient', 'random', 'cyclic', 'static'.",
        ),
        ({"mode": "triton"}, "unknown mode 'triton'"),
        ({"granularity": "row"}, "unknown granularity 'row'"),
        ({"never_gate": ("(",)}, "never_gate: '(' is not a regular expression"),
        ({"always_open": (3,)}, "always_open: 3 is not a regular expression"),
        ({"seed": 1.5}, "seed must be an int"),
        ({"rate_schedule": "step"}, "unknown rate_schedule 'step'"),
        ({"rate_schedule": "linear"}, "takes steps to rise"),
        ({"rise_steps": 5}, "takes steps to rise"),
        ({"warmup_steps": -1}, "warmup_steps must be an int of at least 0"),
        ({"min_open_steps": 0}, "min_open_steps must be an int of at least 1"),
        ({"catch_up": 2}, "catch_up is how much"),
        ({"closed_state": "cpu"}, "unknown closed_state 'cpu'"),
        ({"memory_budget": "2.5"}, "memory_budget is a number of bytes, or a text like '2.5GiB'"),
        ({"memory_budget": 0}, "memory_budget is a number of bytes"),
        ({"memory_budget": "1GiB", "warmup_steps": 5}, "memory_budget chooses the layers by itself"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ConfigError) as error:
        Config(**fields)
    assert message in str(error.value)


def test_memory_budgets_have_units():
    budgets = ["2.5GiB", "800MB", " 64 KiB ", 4096]
    assert [Config(memory_budget=b).memory_budget for b in budgets] == [5 * 2**29, 800_000_000, 65536, 4096]


def test_unknown_field_suggests_the_right_one():
    with pytest.raises(ConfigError, match="unknown config field 'freezing_rate'.*Did you mean 'freeze_rate'"):
        Config().replace(freezing_rate=0.5)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_bad_json(text):
    with pytest.raises(ConfigError):
        Config.from_json(text)
