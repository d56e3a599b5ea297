from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimfit_fx import Gates, StateError

NAMES = ["a.weight", "b.weight", "c.weight"]


@given(st.sets(st.sampled_from(NAMES)))
def test_set_opens_just_these(open_names):
    gates = Gates(NAMES)
    gates.set(open_names)
    assert set(gates.open) == open_names
    assert set(gates.open) | set(gates.closed) == set(NAMES)
    assert dict(gates) == {name: name in open_names for name in NAMES}
    assert gates.table.tolist() == [gates[name] for name in NAMES]


def test_every_gate_starts_open():
    assert Gates(NAMES).closed == []


def test_the_table_stays_the_same_tensor():
    """Compiled graphs hold it."""
    gates = Gates(NAMES)
    table = gates.table
    gates["a.weight"] = False
    gates.set(["b.weight"])
    gates.set_flags([True, False, True])
    assert gates.table is table


def test_an_unknown_layer_is_named_and_changes_nothing():
    gates = Gates(NAMES)
    with pytest.raises(KeyError, match=r"no layer 'x' among 3; names look like a\.weight"):
        gates.set(["a.weight", "x"])
    assert len(gates.open) == 3


def test_gates_cannot_be_deleted():
    with pytest.raises(StateError, match="never_gate"):
        del Gates(NAMES)["a.weight"]
