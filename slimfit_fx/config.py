"""What a user can choose: one frozen, JSON-able dataclass."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .codecs import Codec
from .errors import ConfigError, choose
from .presets import PRESETS
from .roles import ROLE_DTYPES, ROLES

POLICIES = ("update", "random", "cyclic", "static")
GRANULARITIES = ("parameter", "module", "block")
MODES = ("inductor", "eager")


@dataclass(frozen=True)
class Config:
    """How a model is transformed. Every field has a default; a bad value raises `ConfigError`.

    Example:
        >>> Config(freeze_rate=0.95, always_open=("classifier",)).freeze_rate
        0.95

    Attributes:
        preset: how saved tensors are stored. `"exact"`: as they are, but none that can be rebuilt; `"balanced"`: an
            eighth of the bytes or less, at full accuracy; `"tight"`: the fewest bytes; `"paper"`: SlimFit's formats.
        codecs: overrides of the preset: a codec, or None for as it is, by role (`slimfit_fx.ROLES`) or by a regular
            expression that is searched in module paths, which goes before roles.
        freeze_rate: the part of the layers that is closed at each step, 0 <= F <= 1.
        policy: which layers are open next. `"update"`: those whose weights moved most, relative to their size, when
            they were last trained (the paper's inter-layer scheduling); `"random"`; `"cyclic"`: in turn; `"static"`:
            none, only biases and what is always open train (BitFit).
        granularity: what one gate covers: a `"parameter"` (the paper), a `"module"`, or a numbered `"block"`.
        always_open: regular expressions, searched in parameter names, of layers that are trained at every step.
            `None` is the classification head.
        never_gate: regular expressions of parameters that get no gate at all.
        mode: `"inductor"` generates code; `"eager"` runs the rewritten graphs operator by operator (compiles in
            seconds, for tests and debugging).
        seed: of the order of the first turn and of random policies.
    """

    preset: str = "balanced"
    codecs: Mapping[str, Codec | None] = field(default_factory=dict)
    freeze_rate: float = 0.9
    policy: str = "update"
    granularity: str = "parameter"
    always_open: tuple[str, ...] | None = None
    never_gate: tuple[str, ...] = ()
    mode: str = "inductor"
    seed: int = 0

    def __post_init__(self) -> None:
        choose("preset", self.preset, PRESETS)
        object.__setattr__(self, "codecs", _codecs(self.codecs))
        choose("policy", self.policy, POLICIES)
        choose("granularity", self.granularity, GRANULARITIES)
        choose("mode", self.mode, MODES)
        rate = self.freeze_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
            raise ConfigError(
                f"freeze_rate is the part of the layers frozen at each step, 0 to 1, for example 0.9; got {rate!r}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed must be an int, got {self.seed!r}")
        if self.always_open is not None:
            object.__setattr__(self, "always_open", _patterns("always_open", self.always_open))
        object.__setattr__(self, "never_gate", _patterns("never_gate", self.never_gate))

    def replace(self, **overrides: Any) -> Config:
        """A copy with some fields changed; an unknown field raises `ConfigError`."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            choose("config field", name, names)
        return dataclasses.replace(self, **overrides)

    def to_json(self) -> str:
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        options["codecs"] = {key: codec and codec.to_dict() for key, codec in self.codecs.items()}
        return json.dumps(options)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The inverse of `to_json`; fields that are absent keep their defaults."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not a JSON text: {error}") from error
        if not isinstance(fields, Mapping):
            raise ConfigError(f"a config is a JSON object, got {type(fields).__name__}")
        codecs = fields.get("codecs", {}).items()
        decoded = {key: Codec.from_dict(codec) if codec else None for key, codec in codecs}
        return cls().replace(**{**fields, "codecs": decoded})


def _codecs(overrides: Any) -> dict[str, Codec | None]:
    """`overrides` with their keys and values checked."""
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"codecs is a mapping from role or regular expression to codec, got {overrides!r}")
    for key, codec in overrides.items():
        if codec is not None and not isinstance(codec, Codec):
            raise ConfigError(
                f"codecs[{key!r}] must be a codec, for example slimfit_fx.codecs.Quantize(8), or None; got {codec!r}"
            )
        dtype = ROLE_DTYPES.get(key, torch.float32)
        if codec is not None and key in ROLES and not codec.accepts(dtype):
            raise ConfigError(f"codecs[{key!r}]: {codec.label} does not encode {str(dtype).removeprefix('torch.')}")
    _patterns("codecs", [key for key in overrides if key not in ROLES])
    return dict(overrides)


def _patterns(field: str, patterns: Any) -> tuple[str, ...]:
    """`patterns` as a tuple of valid regular expressions; one string stands for itself."""
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ConfigError(f"{field}: {pattern!r} is not a regular expression: {error}") from error
    return patterns
