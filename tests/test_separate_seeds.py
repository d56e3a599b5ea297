"""Seeds of random operators: each is a tensor of its own, so that equal layers are one kernel."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import count_calls, transformed
from slimfit_fx.passes.separate_seeds import separate_seeds
from torch import fx, nn
from torch._inductor import inductor_prims
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import slimfit_fx
from slimfit_fx.graph.plan import Plan
from slimfit_fx.graph.split import SplitGraph

prims, ops = torch.ops.prims, torch.ops.slimfit_fx


def split_graph(device: str) -> SplitGraph:
    """A forward that makes seeds, and a backward that takes them; both read them out of order."""

    def forward() -> list[torch.Tensor]:
        seeds = inductor_prims.seeds(3, torch.device(device))
        return [inductor_prims.lookup_seed(seeds, place) for place in (2, 0, 1)]

    def backward(seeds: torch.Tensor) -> list[torch.Tensor]:
        return [inductor_prims.lookup_seed(seeds, place) for place in (1, 2)]

    seeds = torch.zeros(3, dtype=torch.int64, device=device)
    traced = [make_fx(forward, tracing_mode="fake")(), make_fx(backward, tracing_mode="fake")(seeds)]
    return SplitGraph(*traced, num_outputs=3)


def reads(graph: fx.GraphModule) -> tuple[int, int]:
    return count_calls(graph, prims.inductor_lookup_seed.default), count_calls(graph, ops.separate.default)


def test_each_read_of_a_seed_is_a_tensor_of_its_own():
    split, untouched = split_graph("cpu"), split_graph("cpu")
    separate_seeds(split, Plan())
    split.forward.recompile()
    split.backward.recompile()
    assert reads(split.forward) == reads(split.backward) == (0, 1)
    seeds = torch.tensor([10, 20, 30])
    assert split.backward(seeds) == untouched.backward(seeds) == [20, 30]
    torch.manual_seed(0)
    expected = untouched.forward()
    torch.manual_seed(0)
    assert split.forward() == expected
    assert len(set(map(int, expected))) == 3


def test_other_devices_seeds_stay_together():
    split = split_graph("meta")
    separate_seeds(split, Plan())
    assert reads(split.forward) == (3, 0)


@pytest.mark.inductor
def test_equal_layers_are_one_kernel():
    torch.manual_seed(0)
    layers = [part for _ in range(3) for part in (nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.5))]
    slim = transformed(nn.Sequential(*layers), mode="inductor", always_open=())
    with torch._inductor.config.patch(force_disable_caches=True):
        _, (code,) = run_and_get_code(slim, torch.randn(4, 8))
    kernels = re.findall(r"async_compile\.cpp_pybinding\(.*?\n'''\)", code, re.DOTALL)
    assert sum("rand" in kernel for kernel in kernels) == 1, "one for the three dropouts"
    forward, backward = slimfit_fx.graphs(slim)[0]
    assert reads(forward) == (0, 1)
    assert reads(backward)[0] == 0
