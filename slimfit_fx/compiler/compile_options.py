"""Inductor's own options, which a user hands on to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from slimfit_fx.errors import ConfigError, choose
from slimfit_fx.torch_internals import inductor_config

# What would be taken from us, or go wrong in silence.
_REFUSED = {
    "custom_partitioner_fn": "our passes are Inductor's custom partitioner",
    "triton.cudagraphs": "operators that read gates cannot be captured, and what is around them was not tried on a GPU",
}
_NO_CUDA_GRAPHS = (
    "CUDA graphs are switched on (torch._inductor.config.triton.cudagraphs, or TORCHINDUCTOR_CUDAGRAPHS=1), and they "
    f"are not supported: {_REFUSED['triton.cudagraphs']}. Switch them off, or transform the model with "
    "compile_options={'triton.cudagraphs': False}."
)

# What a GPU gets if the user says nothing else. Codecs come in threes and fours (query, key, value), and the gradients
# of biases and norms end in kernels of 2 microseconds: Inductor can join kernels that do not depend on each other. Only
# near ones: decoding depends on nothing in the backward, and several layers would be decoded at once.
_ON_GPU = {"combo_kernels": True, "combo_kernel_max_distance": 24}


def compile_options_for(inputs: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a graph with these example inputs is compiled with; `options` are the user's."""
    on_gpu = any(isinstance(x, Tensor) and x.device.type == "cuda" for x in inputs)
    ours = {name: value for name, value in _ON_GPU.items() if hasattr(inductor_config, name)}  # the second: torch 2.13
    return {**(ours if on_gpu else {}), **options}


def check_compile_options(options: Mapping[str, Any]) -> None:
    """Raises `ConfigError` if Inductor has no such option, if a value is of another type, or if we need the option."""
    known = inductor_config.get_config_copy()
    for name, value in options.items():
        default = known[choose("option in compile_options", name, known)]
        if value and name in _REFUSED:
            raise ConfigError(f"compile_options: {name!r} is not supported: {_REFUSED[name]}. Leave it out.")
        if default is not None and type(value) is not type(default):
            raise ConfigError(
                f"compile_options: {name!r} is of type {type(default).__name__}, for example {default!r}; got {value!r}"
            )


def check_no_cuda_graphs(options: Mapping[str, Any]) -> None:
    """Raises `ConfigError` if Inductor would record CUDA graphs of what it is about to compile with `options`."""
    if options.get("triton.cudagraphs", inductor_config.triton.cudagraphs):
        raise ConfigError(_NO_CUDA_GRAPHS)
