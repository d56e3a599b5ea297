"""How CUDA graphs would divide the generated code: what docs/support.md says of them, and why they are refused."""

from __future__ import annotations

from typing import Any

import gpu_code
import pytest

pytestmark = gpu_code.marks


@pytest.fixture
def counted(tmp_path_factory) -> dict[tuple[str, int], dict[str, Any]]:
    """By method and number of layers; counts are of the forward and of the backward."""
    rows = gpu_code.facts(gpu_code.shared(tmp_path_factory), "partitions", "bert")
    return {(row["method"], row["layers"]): row for row in rows}


def each_layer(counted: dict[tuple[str, int], dict[str, Any]], method: str, name: str) -> list[int]:
    return [two - one for one, two in zip(counted[method, 1][name], counted[method, 2][name], strict=True)]


def test_torch_compile_is_one_graph_each_way(counted):
    for layers in (1, 2):
        assert counted["plain", layers]["partitions"] == [1, 1]
        assert counted["plain", layers]["gated"] == counted["plain", layers]["outside"] == [0, 0]
    assert min(each_layer(counted, "plain", "captured")) >= 5


@pytest.mark.parametrize("preset", ["exact", "balanced", "tight"])
def test_operators_that_read_gates_are_in_no_graph_and_nothing_else_is_outside(counted, preset):
    for layers in (1, 2):
        assert counted[preset, layers]["outside"] == [0, 0]
        assert counted[preset, layers]["gated"][1] > 8 * layers


# forward and backward, for each further layer
@pytest.mark.parametrize(("preset", "ceilings"), [("exact", [0, 0]), ("balanced", [0, 9]), ("tight", [1, 9])])
def test_ceilings(counted, preset, ceilings):
    found = each_layer(counted, preset, "partitions")
    assert all(number <= ceiling for number, ceiling in zip(found, ceilings, strict=True)), found
    assert counted[preset, 2]["partitions"][0] <= 1 + 2 * ceilings[0]
    assert counted[preset, 2]["partitions"][1] <= 6 + 2 * ceilings[1]
