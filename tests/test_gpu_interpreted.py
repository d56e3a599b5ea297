"""Generated CUDA code in Triton's interpreter computes what the library computes on a CPU."""

from __future__ import annotations

import gpu_code
import pytest

pytestmark = gpu_code.marks


def test_codecs_are_equal_to_the_bit(tmp_path_factory):
    rows = gpu_code.facts(gpu_code.shared(tmp_path_factory), "interpret", "codecs")
    assert len({row["codec"] for row in rows}) == 12
    assert len(rows) == 48
    assert [row for row in rows if not (row["encode"] and row["decode"])] == []


@pytest.mark.parametrize("preset", ["exact", "balanced", "tight"])
def test_gradients_of_a_model_are_the_cpus(preset, tmp_path_factory):
    rows = {row["name"]: row for row in gpu_code.facts(gpu_code.shared(tmp_path_factory), "interpret", preset)}
    closed = {name for name, row in rows.items() if row["closed"]}
    assert len(closed) > 3
    assert all(rows[name]["both_none"] for name in closed)
    # softmax does not see what is added to every key: its gradient is zero but for rounding
    (key_bias,) = [rows.pop(name) for name in list(rows) if name.endswith("key.bias")]
    (value_bias,) = [row for name, row in rows.items() if name.endswith("value.bias")]
    assert key_bias["norm"] < 1e-4 * value_bias["norm"]
    open_rows = [row for name, row in rows.items() if name not in closed]
    assert len(open_rows) > 10
    assert {row["name"]: row["distance"] for row in open_rows if not row["distance"] < 1e-4} == {}
