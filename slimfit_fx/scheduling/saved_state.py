"""The scheduler's state as plain numbers, strings and lists, and the checks that it is one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slimfit_fx.errors import StateError
from slimfit_fx.policies import State

_VERSION = 2
_MOST = 1 << 62  # steps: what arithmetic with floats bears
_LARGEST = 1e100  # score: its product with a number of steps is finite
_LONGEST_SEED = 1 << 1000  # Python refuses to print much longer numbers


@dataclass(frozen=True)
class SavedState:
    """Everything that a resumed run needs to choose the same layers.

    Attributes:
        state: what the policy remembers.
        measured: by layer, what was measured at the last step and is not learnt yet; may be infinite or NaN.
        trained: the layers that were open at that step.
        flags: the gates of the next step.
    """

    state: State
    measured: Mapping[int, float]
    trained: frozenset[int]
    flags: tuple[bool, ...]

    def to_dict(self, policy: str, names: Sequence[str]) -> dict[str, Any]:
        """Plain numbers, strings and lists; `policy` and the layers' `names` say to what they belong."""
        return {
            "version": _VERSION,
            "policy": policy,
            "layers": list(names),
            **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self.state).items()},
            "measured": sorted(map(list, self.measured.items())),
            "trained": sorted(self.trained),
            "open": list(self.flags),
        }


def read_state(saved: Any, policy: str, names: Sequence[str]) -> SavedState:
    """What `SavedState.to_dict` made.

    Raises:
        StateError: it is damaged, or of another version, policy or model.
    """
    if not isinstance(saved, Mapping) or "version" not in saved:
        raise StateError("this is no scheduler state: pass what slimfit_fx.scheduler(model).state_dict() returned")
    if not isinstance(saved["version"], int) or saved["version"] != _VERSION:
        raise StateError(f"scheduler state of version {_shown(saved['version'])}, this library reads {_VERSION}")
    found = _text(saved, "policy", _get(saved, "policy"))
    if found != policy:
        raise StateError(f"scheduler state of policy {found!r}, the model has {policy!r}")
    layers = [_text(saved, "layers", name) for name in _list(saved, "layers")]
    if layers != list(names):
        different = set(layers) ^ set(names)
        example = f", for example {min(different)!r}" if different else " in their order"
        raise StateError(f"scheduler state of another model: layers differ{example}")

    count = len(names)
    columns = {name: _list(saved, name) for name in ("score", "missed", "held", "open")}
    if any(len(column) != count for column in columns.values()):
        raise StateError(f"the scheduler state is damaged: it does not have {count} numbers in each column")
    state = State(
        step=_whole("step", _get(saved, "step"), _MOST),
        seed=_whole("seed", _get(saved, "seed"), _LONGEST_SEED, least=-_LONGEST_SEED),
        score=tuple(_score(value) for value in columns["score"]),
        missed=tuple(_whole("missed", value, _MOST) for value in columns["missed"]),
        held=tuple(_whole("held", value, _MOST) for value in columns["held"]),
    )
    measured = {}
    for pair in _list(saved, "measured"):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise _damaged("measured", pair)
        measured[_whole("measured", pair[0], count)] = _measured(pair[1])
    return SavedState(
        state,
        measured,
        trained=frozenset(_whole("trained", layer, count) for layer in _list(saved, "trained")),
        flags=tuple(_flag(value) for value in columns["open"]),
    )


def _damaged(name: str, value: object) -> StateError:
    return StateError(f"the scheduler state is damaged: {name!r} has {_shown(value)}")


def _shown(value: object) -> str:
    """A value that may be anything, for a message; Python refuses to print very long numbers."""
    plain = isinstance(value, (float, str)) or (isinstance(value, int) and abs(value) < _LONGEST_SEED)
    return repr(value)[:50] if plain else f"a {type(value).__name__}"


def _get(saved: Mapping[str, Any], name: str) -> Any:
    if name not in saved:
        raise StateError(f"the scheduler state is damaged: {name!r} is missing")
    return saved[name]


def _list(saved: Mapping[str, Any], name: str) -> list[Any] | tuple[Any, ...]:
    value = _get(saved, name)
    if not isinstance(value, (list, tuple)):
        raise _damaged(name, value)
    return value


def _text(saved: Mapping[str, Any], name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _damaged(name, value)
    return value


def _whole(name: str, value: Any, end: int, least: int = 0) -> int:
    """`value` if it is a whole number from `least` to below `end`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < end:
        raise _damaged(name, value)
    return value


def _number(name: str, value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or (isinstance(value, int) and abs(value) > _MOST)
    ):
        raise _damaged(name, value)
    return float(value)


def _measured(value: Any) -> float:
    measured = _number("measured", value)
    if measured < 0 or _LARGEST < measured < math.inf:
        raise _damaged("measured", value)
    return measured


def _score(value: Any) -> float:
    score = _number("score", value)
    if not abs(score) <= _LARGEST:  # NaN is not
        raise _damaged("score", value)
    return score


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _damaged("open", value)
    return value
