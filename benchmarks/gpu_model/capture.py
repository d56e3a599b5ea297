"""From a graph that Dynamo captured on the meta device to the same graph on fake CUDA tensors.

Models stand on the meta device, so they take no memory at any size, and their forward can go on, on that device, behind
each graph that was compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext
from torch._subclasses import FakeTensorMode

aten = torch.ops.aten


def to_cuda(module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of a captured graph on CUDA, and fake CUDA tensors of Dynamo's own fake mode in place of its inputs.

    Attention gets the kernel that a GPU would choose: flash attention for half precision without a mask, else the
    memory-efficient one.
    """
    mode = TracingContext.get().fake_mode
    assert mode is not None
    moved = _moved(module, mode)
    placeholders = moved.graph.find_nodes(op="placeholder")
    pairs = zip(inputs, placeholders, strict=True)
    return moved, [_like(mode, x, node) if isinstance(x, Tensor) else x for x, node in pairs]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` becomes on an Ampere GPU or newer, cuDNN's kernels left aside."""
    if torch.is_autocast_enabled("cuda"):
        half = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(half), key.to(half), value.to(half)
    if enable_gqa and key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    bias = attn_mask
    if bias is not None:
        if bias.dtype is torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, float("-inf"))
        bias = bias.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]


def _moved(module: fx.GraphModule, mode: FakeTensorMode) -> fx.GraphModule:
    moved = fx.GraphModule(module, copy.deepcopy(module.graph))
    for name, part in list(moved.named_children()):
        if isinstance(part, fx.GraphModule):  # the body of a checkpointed block
            setattr(moved, name, _moved(part, mode))
    for node in moved.graph.nodes:
        if node.op == "placeholder" and isinstance(example := node.meta.get("example_value"), Tensor):
            node.meta["example_value"] = _fake(mode, example)
        node.args = tuple(map(_device, node.args))
        node.kwargs = {name: _device(value) for name, value in node.kwargs.items()}
        if node.op == "call_function" and node.target is nn.functional.scaled_dot_product_attention:
            node.target = attention
    moved.recompile()
    return moved


def _device(argument: Any) -> Any:
    is_meta = argument == "meta" if isinstance(argument, str) else argument == torch.device("meta")
    return torch.device("cuda", 0) if is_meta else argument


def _fake(mode: FakeTensorMode, value: Tensor) -> Tensor:
    if value.device.type != "meta":
        return value
    with mode:
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")
    return fake.requires_grad_(value.requires_grad)


def _like(mode: FakeTensorMode, real: Tensor, node: fx.Node) -> Tensor:
    if real.device.type != "meta":
        return real
    example = node.meta.get("example_value")
    fake = example if isinstance(example, Tensor) and example.device.type == "cuda" else _fake(mode, real)
    if isinstance(real, nn.Parameter) and not isinstance(fake, nn.Parameter):
        with mode:
            fake = nn.Parameter(fake.detach(), requires_grad=real.requires_grad)
    if hasattr(real, "_dynamo_static_input_type"):  # what marks parameters for AOTAutograd
        fake._dynamo_static_input_type = real._dynamo_static_input_type  # type: ignore[attr-defined]
    return fake
