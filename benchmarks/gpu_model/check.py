"""What the tests want to know of a small model's generated code, as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch._inductor import config as inductor_config

from slimfit_fx.codecs import Quantize
from slimfit_fx.graph.plan import SavedTensor
from slimfit_fx.presets import PRESETS
from slimfit_fx.roles import EXACT

from . import generate
from .devices import A100, H100
from .generate import Generated, Pair
from .kernels import compile_kernel, kernels
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
