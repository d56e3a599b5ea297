"""Ways to fine-tune a model in less memory, each as a function from a plain model to one that is ready to train.

methods.json names them with their options. All but `eager` run in torch.compile.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import slimfit_fx
from slimfit_fx.model.layers import find_head
from slimfit_fx.model.regions import find_regions

METHODS: Mapping[str, dict[str, Any]] = json.loads((Path(__file__).parent / "methods.json").read_text())


def prepare(model: nn.Module, method: str, **overrides: Any) -> nn.Module:
    """The model as the method trains it, with its options; parameters that `fixed` finds by name do not train."""
    chosen = options(method, overrides)
    if fixed := chosen.pop("fixed", None):
        found = [parameter for name, parameter in model.named_parameters() if re.search(fixed, name)]
        if not found:
            raise ValueError(f"{method}: {fixed!r} is found in no parameter's name of {type(model).__name__}")
        for parameter in found:
            parameter.requires_grad_(False)
    return PREPARE[chosen.pop("prepare")](model, **chosen)


def options(method: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options in methods.json, and others beside or instead of them."""
    return {**METHODS[method], **overrides}


def is_slimfit(method: str) -> bool:
    return METHODS[method]["prepare"] in ("slimfit", "slimfit_lora")


def eager(model: nn.Module) -> nn.Module:
    return model


def compile(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def compile_blocks(model: nn.Module) -> nn.Module:
    """torch.compile for each repeated block, which share their graph, and for what is beside them."""
    for region in find_regions(model, slimfit_fx.Config(regions="blocks")):
        region.module.compile()
    return model


def activation_memory_budget(model: nn.Module, budget: float) -> nn.Module:
    """torch's partitioner chooses what to compute again; `budget` is a part of what would be saved otherwise."""
    functorch_config.activation_memory_budget = budget
    return compile(model)


def checkpointing(model: nn.Module) -> nn.Module:
    """Each block is computed again in the backward."""
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    return compile(model)


def fp8_activations(model: nn.Module) -> nn.Module:
    """Inductor's pass that stores saved activations in 8-bit floats, scaled; small tensors as they are."""
    inductor_config.post_grad_fusion_options["activation_quantization_aten_pass"] = {
        "quant_type": "torch.float8_e4m3fn",
        "use_scaling": True,
        "size_in_mb": 0.1,
        "exclude_primals": True,
        "allowed_dtypes": "torch.float32;torch.bfloat16;torch.float16",
    }
    return compile(model)


def lora(model: nn.Module, rank: int) -> nn.Module:
    """PEFT's adapters at every linear layer of the blocks; the head trains as well."""
    return compile(_with_adapters(model, rank))


def slimfit_lora(model: nn.Module, rank: int, **options: Any) -> nn.Module:
    """Such adapters, trained by this library."""
    return slimfit(_with_adapters(model, rank), **options)


def _with_adapters(model: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    head = sorted({name.split(".")[0] for name in find_head(model, dict(model.named_parameters()))})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", modules_to_save=head)
    return get_peft_model(model, config)  # type: ignore[arg-type]


def bitfit(model: nn.Module) -> nn.Module:
    """Only biases and the head train."""
    head = set(find_head(model, dict(model.named_parameters())))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or name in head)
    return compile(model)


def lisa(model: nn.Module, blocks: int, period: int) -> nn.Module:
    """Embeddings, head and `blocks` random blocks train; others are drawn after every `period` optimizer steps.

    Frozen with `requires_grad`, as its authors do: torch.compile makes a new graph for each new set.
    """
    of_block: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if block := re.match(r".*?\.\d+(?=\.)", name):
            of_block.setdefault(block.group(), []).append(parameter)
    generator, steps = random.Random(0), 0

    def draw() -> None:
        trained = generator.sample(sorted(of_block), blocks)
        for block, parameters in of_block.items():
            for parameter in parameters:
                parameter.requires_grad_(block in trained)
                parameter.grad = None

    def after_step(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps % period == 0:
            draw()

    draw()
    register_optimizer_step_post_hook(after_step)
    return compile(model)


def slimfit(model: nn.Module, codecs: Mapping[str, Any] | None = None, **options: Any) -> nn.Module:
    """This library; `codecs` as JSON has them."""
    config = slimfit_fx.Config.from_json(json.dumps({"codecs": codecs or {}, **options}))
    return slimfit_fx.transform(model, config)


_ALL = (
    eager,
    compile,
    compile_blocks,
    activation_memory_budget,
    checkpointing,
    fp8_activations,
    lora,
    bitfit,
    lisa,
    slimfit,
    slimfit_lora,
)
PREPARE: Mapping[str, Callable[..., nn.Module]] = {function.__name__: function for function in _ALL}
