"""Where the gated parameters sit in the model, and whether they are still there."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import nn

from slimfit_fx.errors import BackwardError, StateError
from slimfit_fx.torch_internals import peek_interpreter_stack

from .fsdp import Units


class Places:
    """Notices that gated parameters of a model were replaced. It does not hold the model.

    A check looks up every submodule and gated parameter by its name in the module above, and walks through the model
    only if one of them is another: a parameter that merely moved is still the model's. So is one in whose place FSDP2
    put another for a while.
    """

    def __init__(self, model: nn.Module, gated: Mapping[str, nn.Parameter], units: Units) -> None:
        self._model = weakref.ref(model)
        self._gated = dict(gated)
        self._units = units
        self._find()

    def check(self) -> None:
        """Call when a training forward begins.

        Raises:
            BackwardError: the model is called inside of `torch.func.grad` or another transform of torch.func.
            StateError: a gated parameter is no longer one of the model's.
            ModelError: so it is because `fully_shard` came after the transformation.
        """
        if peek_interpreter_stack() is not None:
            raise BackwardError(
                "torch.func transforms (grad, vmap, jvp, ...) do not go through compiled graphs, and frozen layers "
                "have no gradient. Call slimfit_fx.undo(model) first."
            )
        if self._hold():
            return
        model = self._model()
        assert model is not None, "a model that is being called is alive"
        present = set(map(id, map(self._units.original, model.parameters())))
        if lost := [name for name, parameter in self._gated.items() if id(parameter) not in present]:
            self._units.check_order()
            others = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            raise StateError(
                f"{lost[0]!r}{others}: parameters of the model were replaced after slimfit_fx.transform, or taken out, "
                "for example by load_state_dict(assign=True) or torch.func.functional_call, so the scheduler does not "
                "know them. Replace them first, or call slimfit_fx.undo(model) and transform it again."
            )
        self._find()

    def _hold(self) -> bool:
        for owner, name, child in self._modules:
            above, below = owner(), child()
            if above is None or below is None or above._modules.get(name) is not below:
                return False
        for owner, name, parameter in self._parameters:
            above = owner()
            found = None if above is None else above._parameters.get(name)
            if found is not parameter and (found is None or self._units.original(found) is not parameter):
                return False
        return True

    def _find(self) -> None:
        model = self._model()
        assert model is not None
        gated = set(map(id, self._gated.values()))
        modules = list(model.modules())
        self._modules = [
            (weakref.ref(module), name, weakref.ref(child))
            for module in modules
            for name, child in module._modules.items()
            if child is not None
        ]
        self._parameters = [
            (weakref.ref(module), name, original)
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None and id(original := self._units.original(parameter)) in gated
        ]
