"""What the tests want to know of a small model's generated code, as JSON."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._inductor import config as inductor_config

from slimfit_fx.codecs import Quantize
from slimfit_fx.graph.plan import SavedTensor
from slimfit_fx.presets import PRESETS
from slimfit_fx.roles import EXACT

from . import generate
from .devices import A100, H100
from .generate import Generated, Pair
from .kernels import compile_kernel, kernels
from .library_calls import library_calls
from .methods import FREEZE_RATE
from .models import SMALL
from .simulate import simulate

BATCH = 8
REGIONS = ("model", "blocks")
_LARGE = 16 << 10  # bytes: an activation of a small model has more, a statistic less
_STORED_AS_THEY_ARE = frozenset({"statistics", "logits", "indices", EXACT})  # whatever the preset


def check(name: str) -> Iterator[dict[str, Any]]:
    """For torch.compile, and for each preset and kind of regions, what came out of the small model `name`."""
    model, bf16 = SMALL[name], name == "llama"
    yield {"method": "plain", "regions": "model"} | _facts(generate.plain(*model.build(BATCH), bf16=bf16), 0.0)
    with inductor_config.patch(combo_kernels=True):  # as ours: joined kernels change the order of what is between them
        joined = generate.plain(*model.build(BATCH), bf16=bf16)
    yield {"method": "joined", "regions": "model", "library_calls": library_calls(joined.pairs[0])}
    for preset in PRESETS:
        for regions in REGIONS:
            options = {"preset": preset, "regions": regions, "freeze_rate": FREEZE_RATE}
            made = generate.slim(*model.build(BATCH), bf16=bf16, **options)
            yield {"method": preset, "regions": regions} | _facts(made, FREEZE_RATE)


def _facts(made: Generated, freeze_rate: float) -> dict[str, Any]:
    sources = [code.source for pair in made.pairs for code in (pair.forward, pair.backward)]
    found = [kernel for source in sources for kernel in kernels(source)]
    facts: dict[str, Any] = {"graphs": len(made.pairs), "calls": len(made.calls), "kernels": len(found)}
    compiled = [
        (device.architecture, kernel, compile_kernel(kernel.source, device.architecture))
        for kernel in found
        for device in (A100, H100)
    ]
    facts["compiled"] = len(compiled)
    facts["errors"] = {f"{kernel.name} sm_{sm}": result.error for sm, kernel, result in compiled if result.error}
    facts["spilled"] = {f"{kernel.name} sm_{sm}": result.spilled for sm, kernel, result in compiled if result.spilled}
    facts["as_it_is"] = [row for pair in made.pairs for row in _as_it_is(pair)]
    if len(made.pairs) == 1:
        facts["library_calls"] = library_calls(made.pairs[0])
        trace = simulate(made.pairs[0], freeze_rate)
        figures = trace.figures(H100, "fp32")
        facts |= {name: figures[name] for name in ("saved_bytes", "gradient_bytes", "kernel_traffic", "flops")}
        facts |= {"peak_bytes": trace.peak, "launches": figures["kernels"]}
        facts |= {"planned_bytes": _planned(made.pairs[0]), "handed_over": len(_saved(made.pairs[0]))}
    return facts


def _saved(pair: Pair) -> list[SavedTensor]:
    return pair.capture.plan.saved if pair.capture else []


def _planned(pair: Pair) -> float:
    """Bytes that the plan says are held, a mean over the sets of open layers."""
    closed = [0.0 if always else FREEZE_RATE for always in pair.open]
    rows = [row for row in _saved(pair) if not row.borrowed]
    return sum(row.stored * (1 - math.prod(closed[gate] for gate in row.gates) if row.gates else 1) for row in rows)


def _as_it_is(pair: Pair) -> list[list[Any]]:
    """The static saved tensors that are large and were left as they are: [role, module, bytes]."""
    return [
        [row.role, row.module, row.nbytes]
        for row in _saved(pair)
        if row.nbytes > _LARGE and not row.form and not (row.dynamic or row.borrowed)
        if row.role not in _STORED_AS_THEY_ARE
    ]


def layers() -> Iterator[dict[str, Any]]:
    """The forward's calls of libraries of small stacks of layers, by torch.compile and with each preset."""
    linear, inputs = functools.partial(nn.Linear, 64, 64), {"input": torch.randn(256, 64, device="meta")}
    stacks: dict[str, tuple[Callable[[], nn.Module], dict[str, torch.Tensor]]] = {
        "gelu": (lambda: nn.Sequential(linear(), nn.GELU(), linear()), inputs),
        "relu": (lambda: nn.Sequential(linear(), nn.ReLU(), linear()), inputs),
        "norms": (lambda: nn.Sequential(linear(), nn.LayerNorm(64), linear(), nn.Softmax(-1), linear()), inputs),
        "convolution": (
            lambda: nn.Sequential(nn.Conv2d(3, 64, 4, 4), nn.GELU(), nn.Flatten(2), *(linear() for _ in range(3))),
            {"input": torch.randn(8, 3, 32, 32, device="meta")},
        ),
    }
    for name, (build, batch) in stacks.items():
        for bf16 in (False, True):
            for method in ("plain", *PRESETS):
                with torch.device("meta"):
                    model = build().train()
                options = {"preset": method, "freeze_rate": FREEZE_RATE}
                made = (
                    generate.plain(model, batch, bf16=bf16)
                    if method == "plain"
                    else generate.slim(model, batch, bf16=bf16, **options)
                )
                yield {"name": name, "bf16": bf16, "method": method, "calls": library_calls(made.pairs[0])}


def derivative() -> dict[str, int]:
    """How many kernels compute GELU, and its derivative in four bits, by the input's dtype."""
    from .interpret import function_source

    codec = PRESETS["tight"].codecs["activation input"].codec  # type: ignore[attr-defined]

    def both(x: torch.Tensor) -> list[torch.Tensor]:
        slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x)
        return [nn.functional.gelu(x), *codec.encode(slope)]

    dtypes = (torch.float32, torch.bfloat16)
    sources = {str(d): function_source(both, [torch.empty(32, 128, 3072, dtype=d, device="meta")]) for d in dtypes}
    return {name: len(list(kernels(source))) for name, source in sources.items()}


def eager_attention() -> Iterator[dict[str, Any]]:
    """What becomes of the saved softmax of a BERT whose attention is written out."""
    model = dataclasses.replace(SMALL["bert"], config={**SMALL["bert"].config, "attn_implementation": "eager"})
    for bf16 in (False, True):
        (pair,) = generate.slim(*model.build(BATCH), bf16=bf16, preset="balanced").pairs
        yield {"bf16": bf16, "forms": [row.form for row in _saved(pair) if row.role == "softmax output"]}


def padded() -> dict[str, bool]:
    """Whether each weight gradient of a pair of linear layers can be skipped, where Inductor pads odd sizes."""
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(1024, 1022), torch.nn.GELU(), torch.nn.Linear(1022, 1024))
        inputs = {"input": torch.randn(512, 1024)}
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    with inductor_config.patch(shape_padding=True, force_shape_pad=True):
        made = generate.slim(model.train(), inputs, preset="exact", always_open=())
    (pair,) = made.pairs
    assert pair.capture is not None
    return dict(zip(names, (gradient.conditional for gradient in pair.capture.plan.gradients), strict=True))


def stochastic() -> dict[str, Any]:
    """How many kernels encode with stochastic rounding, and why those that do not compile do not."""
    from .interpret import function_source

    codec = Quantize(8, stochastic=True)
    source = function_source(lambda x: list(codec.encode(x)), [torch.empty(32, 128, 768, device="meta")])
    found = [compile_kernel(kernel.source, H100.architecture) for kernel in kernels(source)]
    return {"kernels": len(found), "errors": [result.error for result in found if result.error]}
