"""The same code generators without the passes: what a transformed model is compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from slimfit_fx.compiler.dynamo import own_code
from slimfit_fx.model.regions import Region
from slimfit_fx.torch_internals import aot_autograd, min_cut_rematerialization_partition, select_decomp_table


def compile_plain(regions: Sequence[Region], mode: str) -> None:
    """Makes calls of the regions compiled ones, as `nn.Module.compile` does; regions of a kind share their graphs."""
    backend = "inductor" if mode == "inductor" else interpreter()
    kinds = {region.kind: type(region.module).__name__ for region in regions}
    functions = {kind: torch.compile(own_code(name), backend=backend) for kind, name in kinds.items()}
    for region in regions:
        region.module._compiled_call_impl = functools.partial(functions[region.kind], region.module)


def interpreter() -> Callable[..., Any]:
    """The graphs operator by operator, with the decompositions and the partitioner of `mode="eager"`."""

    def boxed(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        def run(arguments: list[Any]) -> Any:
            return gm(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return aot_autograd(
        fw_compiler=boxed,
        bw_compiler=boxed,
        inference_compiler=boxed,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
