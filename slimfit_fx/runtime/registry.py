"""Which session belongs to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn

from slimfit_fx.config import Config
from slimfit_fx.errors import StateError
from slimfit_fx.model.hints import hint_at_costs
from slimfit_fx.model.layers import warn_if_all_open

if TYPE_CHECKING:
    from .session import Session

_sessions: WeakKeyDictionary[nn.Module, Session] = WeakKeyDictionary()


def start_session(model: nn.Module, config: Config) -> Session:
    """Finds the layers of `model` and begins to listen to optimizers.

    Raises:
        StateError: layers of the model have another scheduler: that of a part of it, or of a model around it.
    """
    from .session import Session  # with Dynamo and Inductor: `import slimfit_fx` stays cheap

    for other, session in list(_sessions.items()):
        if (shared := session.layer_shared_with(model)) is not None:
            raise StateError(
                f"{shared} of this {type(model).__name__} belongs to a {type(other).__name__} that is transformed "
                "already: two schedulers would freeze it. Transform one of the two; slimfit_fx.undo ends the other."
            )
    session = _sessions[model] = Session(model, config)
    warn_if_all_open(model, session.layers, config)
    hint_at_costs(model, session.layers, config)
    return session


def session_of(model: nn.Module) -> Session | None:
    """What belongs to a transformed model, compiled wrappers included; None if it is not transformed."""
    return _sessions.get(original(model))


def started_session(model: nn.Module) -> Session:
    """What belongs to a transformed model. Raises `StateError` if it is not transformed."""
    session = session_of(model)
    if session is None:
        raise StateError(f"this {type(model).__name__} is not transformed; call slimfit_fx.transform(model) first")
    return session


def original(model: nn.Module) -> nn.Module:
    """The module inside of what torch.compile returned, or `model` itself."""
    return model._modules.get("_orig_mod") or model  # no getattr: wrappers forward it to what they wrap


def end_session(model: nn.Module) -> Session:
    """Closes the session of a transformed model, and forgets it. Raises `StateError` if it is not transformed."""
    session = started_session(model)
    session.close()
    del _sessions[original(model)]
    return session
