"""The fields of `Config` as types: what each may be, and all of them as keyword arguments, which editors complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

from .codecs import Format

PresetName: TypeAlias = Literal["exact", "paper", "balanced", "tight"]
# users may add to POLICIES
PolicyName: TypeAlias = Literal["update", "overdue", "gain", "gradient", "random", "cyclic", "static"] | str
RateSchedule: TypeAlias = Literal["constant", "linear", "cosine"]
ClosedState: TypeAlias = Literal["device", "host", "none"]
Granularity: TypeAlias = Literal["parameter", "module", "block"]
Regions: TypeAlias = Literal["model", "blocks"]
Outputs: TypeAlias = Literal["all", "loss"]
Mode: TypeAlias = Literal["inductor", "eager"]


class ConfigOptions(TypedDict, total=False):
    """Any of `Config`'s fields; what they mean stands there."""

    preset: PresetName
    codecs: Mapping[str, Format | None]
    freeze_rate: float
    rate_schedule: RateSchedule
    rise_steps: int
    warmup_steps: int
    memory_budget: int | str | None
    policy: PolicyName
    min_open_steps: int
    catch_up: float
    decay_moments: bool
    closed_state: ClosedState
    closed_state_after: int
    granularity: Granularity
    always_open: Sequence[str] | str | None
    never_gate: Sequence[str] | str
    regions: Regions
    outputs: Outputs
    mode: Mode
    compile_options: Mapping[str, Any]
    disable_passes: Sequence[str] | str
    seed: int
