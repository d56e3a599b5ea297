"""What a user can choose: one frozen, JSON-able dataclass."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import torch
from typing_extensions import Unpack

from .codecs import Choice, Format
from .config_options import (
    ClosedState,
    ConfigOptions,
    Granularity,
    Mode,
    Outputs,
    PolicyName,
    PresetName,
    RateSchedule,
    Regions,
)
from .errors import ConfigError, choose
from .policies import POLICIES
from .presets import PRESETS
from .roles import ROLE_DTYPES, ROLES

RATE_SCHEDULES: tuple[RateSchedule, ...] = get_args(RateSchedule)
CLOSED_STATES: tuple[ClosedState, ...] = get_args(ClosedState)
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
MODES: tuple[Mode, ...] = get_args(Mode)
OUTPUTS: tuple[Outputs, ...] = get_args(Outputs)
REGIONS: tuple[Regions, ...] = get_args(Regions)


@dataclass(frozen=True)
class Config:
    """How a model is transformed. Every field has a default; a bad value raises `ConfigError`.

    Example:
        >>> Config(freeze_rate=0.95, always_open=("classifier",)).freeze_rate
        0.95

    Attributes:
        preset: how saved tensors are stored. `"exact"`: as they are, but none that can be rebuilt; `"balanced"`: an
            eighth of the bytes or less, at full accuracy; `"tight"`: the fewest bytes; `"paper"`: SlimFit's formats.
        codecs: overrides of the preset: a codec, a choice between such, or None for as it is, by role
            (`slimfit_fx.ROLES`) or by a regular expression that is searched in module paths, which goes before roles.
        freeze_rate: the part of the layers that is closed at each step, 0 <= F <= 1; with a schedule, its end value.
        rate_schedule: how the rate gets there: `"constant"`, at once; `"linear"`; `"cosine"`.
        rise_steps: optimizer steps that a linear or cosine rise from 0 takes.
        warmup_steps: optimizer steps without freezing, before that.
        memory_budget: instead of a rate, bytes or a text like `"2.5GiB"` (`KiB`, `MiB`, `GiB`, or `KB`, `MB`, `GB`)
            for the tensors saved between forward and backward: the layers of the largest scores that fit are open.
        policy: which layers are open next. `"update"`: those whose weights moved most, relative to their size, when
            they were last trained (the paper's inter-layer scheduling); `"overdue"`: those that have missed most: that
            change times the steps since; `"gain"`: those whose updates lower the loss most, times the steps since;
            `"gradient"`: those whose gradient's norm was
            largest, relative to the weights'; `"random"` (LISA); `"cyclic"`: in turn (BAdam); `"static"`: none, only
            biases and what is always open train (BitFit).
        min_open_steps: for how many steps a layer stays open at least.
        catch_up: 0 <= c <= 1: the update of a layer that was closed for k steps is lengthened (k + 1) ** c times, at
            most 10 times.
        decay_moments: whether a layer's momentum fades while it is closed.
        closed_state: where the optimizer's state of a layer is that has been closed for `closed_state_after` steps:
            `"device"`, on the `"host"`, or `"none"`: dropped, it begins anew.
        closed_state_after: see there.
        granularity: what one gate covers: a `"parameter"` (the paper), a `"module"`, or a numbered `"block"`.
        always_open: regular expressions, searched in parameter names, of layers that are trained at every step.
            `None` is the classification head.
        never_gate: regular expressions of parameters that get no gate at all.
        regions: what one graph covers: the whole `"model"`, or its `"blocks"`: repeated blocks are compiled once,
            whatever the depth, and everything else module by module (regional compilation). What the model's own
            forward computes between modules, such as the loss, then runs operator by operator, and stays exact.
        outputs: what a training call returns: `"all"`, or with `"loss"` no logits that only the caller would read where
            the loss is made in parts without them. Using them raises `OutputError`; eval mode returns them.
        mode: `"inductor"` generates code; `"eager"` runs the rewritten graphs operator by operator (compiles in
            seconds, for tests and debugging).
        compile_options: Inductor's own, by their names in `torch._inductor.config`, such as `{"max_autotune": True}`:
            what `torch.compile(options=...)` takes.
        disable_passes: names of passes that do not run (`slimfit_fx.compiler.pipeline.PIPELINE`), to find out what one
            does: gradients stay right, and more is saved.
        seed: of the order of the first turn and of random policies.
    """

    preset: PresetName = "balanced"
    codecs: Mapping[str, Format | None] = field(default_factory=dict)
    freeze_rate: float = 0.9
    rate_schedule: RateSchedule = "constant"
    rise_steps: int = 0
    warmup_steps: int = 0
    memory_budget: int | str | None = None
    policy: PolicyName = "update"
    min_open_steps: int = 1
    catch_up: float = 0.0
    decay_moments: bool = False
    closed_state: ClosedState = "device"
    closed_state_after: int = 50
    granularity: Granularity = "parameter"
    always_open: Sequence[str] | str | None = None
    never_gate: Sequence[str] | str = ()
    regions: Regions = "model"
    outputs: Outputs = "all"
    mode: Mode = "inductor"
    compile_options: Mapping[str, Any] = field(default_factory=dict)
    disable_passes: Sequence[str] | str = ()
    seed: int = 0

    def __post_init__(self) -> None:
        choose("preset", self.preset, PRESETS)
        object.__setattr__(self, "codecs", _codecs(self.codecs))
        choose("policy", self.policy, POLICIES)
        choose("granularity", self.granularity, GRANULARITIES)
        choose("mode", self.mode, MODES)
        choose("regions", self.regions, REGIONS)
        choose("outputs", self.outputs, OUTPUTS)
        if self.outputs == "loss" and self.regions == "blocks":
            raise ConfigError(
                'outputs="loss" needs head and loss in one graph, and regions="blocks" leaves the loss out of all'
            )
        object.__setattr__(self, "compile_options", _compile_options(self.compile_options, self.mode))
        choose("rate_schedule", self.rate_schedule, RATE_SCHEDULES)
        choose("closed_state", self.closed_state, CLOSED_STATES)
        _share("freeze_rate", self.freeze_rate, "the part of the layers frozen at each step")
        _share("catch_up", self.catch_up, "how much longer updates make up for missed steps")
        for name, least in (("rise_steps", 0), ("warmup_steps", 0), ("min_open_steps", 1), ("closed_state_after", 1)):
            _count(name, getattr(self, name), least)
        if (self.rate_schedule == "constant") != (self.rise_steps == 0):
            raise ConfigError(
                f"rate_schedule {self.rate_schedule!r} with rise_steps {self.rise_steps}: a linear or cosine schedule "
                "takes steps to rise, a constant one takes none"
            )
        if self.memory_budget is not None:
            object.__setattr__(self, "memory_budget", budget_bytes(self.memory_budget))
            if self.warmup_steps or self.rise_steps or self.policy == "static":
                raise ConfigError("memory_budget chooses the layers by itself: no warm-up, schedule or static policy")
        _count("seed", self.seed, None)
        if self.always_open is not None:
            object.__setattr__(self, "always_open", _patterns("always_open", self.always_open))
        object.__setattr__(self, "disable_passes", _names(self.disable_passes))
        object.__setattr__(self, "never_gate", _patterns("never_gate", self.never_gate))

    @property
    def budget(self) -> int | None:
        """`memory_budget` in bytes."""
        return None if self.memory_budget is None else int(self.memory_budget)

    def replace(self, **overrides: Unpack[ConfigOptions]) -> Config:
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
        codecs = fields.get("codecs", {})
        if isinstance(codecs, Mapping):  # else the field's own check names it
            codecs = {key: None if codec is None else Format.from_dict(codec) for key, codec in codecs.items()}
        return cls().replace(**cast(ConfigOptions, {**fields, "codecs": codecs}))


def _share(field: str, value: Any, meaning: str) -> None:
    """Raises if `value` is not a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"{field} is {meaning}, 0 to 1, for example 0.9; got {value!r}")


def _count(field: str, value: Any, least: int | None) -> None:
    """Raises if `value` is not a whole number, or less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ConfigError(f"{field} must be an int{bound}, got {value!r}")


def budget_bytes(value: Any, field: str = "memory_budget") -> int:
    """A number of bytes from itself or from a text with a unit."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG])(i?)B\s*", value) if isinstance(value, str) else None
    if match is None or float(match.group(1)) == 0:
        raise ConfigError(f"{field} is a number of bytes, or a text like '2.5GiB' or '800MB'; got {value!r}")
    return int(float(match.group(1)) * (1024 if match.group(3) else 1000) ** ("KMG".index(match.group(2)) + 1))


def _codecs(overrides: Any) -> dict[str, Format | None]:
    """`overrides` with their keys and values checked."""
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"codecs is a mapping from role or regular expression to codec, got {overrides!r}")
    for key, codec in overrides.items():
        if codec is not None and not isinstance(codec, Format):
            raise ConfigError(
                f"codecs[{key!r}] must be a codec, for example slimfit_fx.codecs.Quantize(8), or None; got {codec!r}"
            )
        dtype = ROLE_DTYPES.get(key, torch.float32)
        if codec is not None and key in ROLES and not codec.accepts(dtype):
            raise ConfigError(f"codecs[{key!r}]: {codec.label} does not encode {str(dtype).removeprefix('torch.')}")
        if isinstance(codec, Choice) and key in ROLES:
            codec.check_role(key)
    _patterns("codecs", [key for key in overrides if key not in ROLES])
    return dict(overrides)


def _compile_options(options: Any, mode: str) -> dict[str, Any]:
    """Options as a dict; which there are is known where they are used."""
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ConfigError(f"compile_options is a mapping from names to values, got {options!r}")
    if options and mode != "inductor":
        raise ConfigError(f"compile_options are Inductor's, and mode={mode!r} does without it: leave one of them out")
    return dict(options)


def _names(names: Any) -> tuple[str, ...]:
    """Names of passes as a tuple, each once; which there are is known where they run."""
    names = (names,) if isinstance(names, str) else tuple(names)
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"disable_passes takes names of passes, for example 'rebuild'; got {names!r}")
    return tuple(dict.fromkeys(names))


def _patterns(field: str, patterns: Any) -> tuple[str, ...]:
    """`patterns` as a tuple of valid regular expressions; one string stands for itself."""
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ConfigError(f"{field}: {pattern!r} is not a regular expression: {error}") from error
    return patterns
