"""Which codec each role gets: the presets, and the overrides of a configuration.

The table in docs/codecs.md says why: the gradient error of every codec in every role, on real weights and data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .codecs import BitMask, Derivative, FixedPoint, Format, Quantize, Recompute, TopK, WhenFrozen
from .config_options import PresetName
from .module_paths import joined, matches
from .roles import EXACT, MASK


@dataclass(frozen=True)
class Preset:
    """Attributes:
    codecs: by role; a role that is absent is stored as it is.
    rebuild: whether what can be computed from other saved tensors is not saved.
    """

    codecs: Mapping[str, Format] = field(default_factory=dict)
    rebuild: bool = True


_INT8 = Quantize(8)
_INT4 = Quantize(4, group=64)
# the largest source of error: outliers of a few features are far above the rest
_NORM8 = Quantize(8, group=64, symmetric=False)
# GELU's and SiLU's derivatives lie in [-0.13, 1.13]
_DERIVATIVE4 = FixedPoint(4, step=1.26 / 15, low=-0.13)
_FIXED8 = FixedPoint(8, 1 / 16, -8.0)

_BALANCED: Mapping[str, Format] = {
    "linear input": _INT8,
    "feed-forward input": _INT8,
    "activation input": _INT8,
    "activation output": _INT8,
    "softmax output": Recompute(otherwise=_INT8),
    "attention operand": _INT8,
    "norm input": _NORM8,
    "convolution input": _INT8,
    "dropout mask": BitMask(),
    "other": _INT8,
}

PRESETS: dict[PresetName, Preset] = {
    "exact": Preset(),
    # SlimFit, section 4: every tensor as published, nothing rebuilt
    "paper": Preset(
        {
            "activation input": FixedPoint(4, 0.5, -4.0),
            "attention operand": _FIXED8,
            "softmax output": FixedPoint(8, 1 / 256, 0.0),
            "feed-forward input": _FIXED8,
            "norm input": WhenFrozen(TopK(0.1)),
        },
        rebuild=False,
    ),
    "balanced": Preset(_BALANCED),
    "tight": Preset(
        {
            **_BALANCED,
            "linear input": _INT4,
            "feed-forward input": _INT4,
            "activation input": Derivative(_DERIVATIVE4, otherwise=_INT4),
            "attention operand": Recompute(otherwise=_INT8),
            "convolution input": _INT4,
        }
    ),
}


# An error in these is an error in everything that they scale, choose or measure.
_PRECISE = frozenset({"statistics", "logits", "loss gradient", "indices", EXACT, MASK})


@dataclass(frozen=True)
class CodecRules:
    """Chooses a codec for a saved tensor: overrides by module first, then overrides by role, then the preset.

    A module's override leaves alone what its codec cannot encode (masks), and what is exact unless asked for by role.

    Attributes:
        preset: a name in `PRESETS`.
        overrides: codec, choice, or None for as it is, by role or by a regular expression that is searched in module
            paths.
        path: of the captured module in the model; it goes before the paths of the modules in it.
    """

    preset: PresetName
    overrides: Mapping[str, Format | None]
    path: str = ""

    @property
    def rebuild(self) -> bool:
        """Whether what can be computed from other saved tensors is not saved."""
        return PRESETS[self.preset].rebuild

    def chosen(self, role: str, module: str, dtype: torch.dtype) -> tuple[bool, Format | None]:
        """(whether an override says so, the codec or the choice)."""
        for key in matches(self.overrides, joined(self.path, module)):
            codec = self.overrides[key]
            if role not in _PRECISE and (codec is None or codec.accepts(dtype)):
                return True, codec
        if role in self.overrides:
            return True, self.overrides[role]
        return False, PRESETS[self.preset].codecs.get(role)
