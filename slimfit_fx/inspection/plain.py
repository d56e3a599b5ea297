"""The same code generators without the passes: what a transformed model is compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from slimfit_fx.compiler.backend import interpreted
from slimfit_fx.compiler.dynamo import own_code
from slimfit_fx.model.regions import Region
from slimfit_fx.torch_internals import aot_autograd, min_cut_rematerialization_partition, select_decomp_table


def compile_plain(regions: Sequence[Region], mode: str, options: Mapping[str, Any]) -> None:
    """Makes calls of the regions compiled ones, as `nn.Module.compile` does; regions of a kind share their graphs.

    Args:
        options: Inductor's own, which are those of the model that is compared.
    """
    compiler = functools.partial(torch.compile, backend="inductor" if mode == "inductor" else interpreter())
    if options:
        compiler = functools.partial(compiler, options=dict(options))
    kinds = {region.kind: type(region.module).__name__ for region in regions}
    functions = {kind: compiler(own_code(name)) for kind, name in kinds.items()}
    for region in regions:
        region.module._compiled_call_impl = functools.partial(functions[region.kind], region.module)


def interpreter() -> Callable[..., Any]:
    """The graphs operator by operator, with the decompositions and the partitioner of `mode="eager"`."""

    return aot_autograd(
        fw_compiler=interpreted,
        bw_compiler=interpreted,
        inference_compiler=interpreted,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
