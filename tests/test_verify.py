"""`slimfit_fx.verify`: what it says of models that are right, and that it leaves no trace."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from helpers import no_recompile
from torch import Tensor, nn
from word_classifier import Classifier, batch

import slimfit_fx
from slimfit_fx import ModelError, StateError
from slimfit_fx.inspection.comparison import forward_rounding_of
from slimfit_fx.inspection.gradient_difference import TOLERANCES, rounding
from slimfit_fx.presets import PRESETS
from slimfit_fx.runtime.registry import session_of


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier()


LOSSES = {"loss": None, "tuple": lambda outputs: outputs[0], "tensor": lambda logits: logits.square().mean()}


@pytest.mark.parametrize("returns", LOSSES)
@pytest.mark.parametrize("preset", PRESETS)
def test_all_is_well(returns, preset):
    torch.manual_seed(0)
    found = slimfit_fx.verify(Classifier(returns, 0.1), batch(), LOSSES[returns], mode="eager", preset=preset)
    assert found.ok, found.faults
    assert str(found).splitlines()[-1].startswith(f"All is well (preset '{preset}', mode 'eager'): the forward")
    rows = {row["parameter"]: row for row in found.rows}
    assert set(rows) == {name for name, _ in Classifier().named_parameters()}
    assert rows["embed.weight"]["relative_error_half_closed"] is None
    assert rows["norm.weight"]["relative_error_half_closed"] is not None
    assert rows["down.bias"]["layer"] is None
    assert 0 < found.saved_bytes["half_closed"] <= found.saved_bytes["open"] <= found.saved_bytes["plain"]
    assert json.loads(found.to_json())["rows"] == found.rows
    assert found.notes, "eager PyTorch has other dropout masks"


@pytest.mark.parametrize("autocast", [False, True], ids=["parameters", "autocast"])
def test_bf16(model, autocast):
    """Rounding of bf16 is no fault, and it is not the preset's."""
    if not autocast:
        model.bfloat16()
        model.calls = torch.zeros(())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = slimfit_fx.verify(model, batch(), mode="eager", preset="exact")
    assert found.ok, found.faults
    assert found.tolerance.each == 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("regions", ["model", "blocks"])
def test_a_transformed_model_is_verified_as_it_is_configured(regions):
    torch.manual_seed(0)
    block = lambda: nn.Sequential(nn.Linear(16, 36), nn.GELU(), nn.Linear(36, 16))  # noqa: E731
    model = Stack([block(), block()])
    slimfit_fx.transform(model, mode="eager", preset="tight", regions=regions, memory_budget="1GiB")
    found = slimfit_fx.verify(model, torch.randn(5, 16), lambda outputs: outputs.square().mean())
    assert found.ok, found.faults
    assert (found.preset, found.mode) == ("tight", "eager")
    assert slimfit_fx.verify(model, torch.randn(5, 16), torch.sum, preset="exact").preset == "exact"


class Stack(nn.Module):
    """Blocks with a mask between them that no graph made."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x * torch.linspace(0.5, 1.5, 16))
        return x


def test_no_trace_is_left():
    """The user's model is used before, verified in between, and used again: nothing can tell."""

    def trained(verified: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Classifier(dropout=0.5)
        slimfit_fx.transform(model, mode="eager", freeze_rate=0.5)
        optimizer = torch.optim.AdamW(model.parameters())
        inputs = batch()
        found = []
        for step in range(4):
            loss = model(**inputs).loss
            if verified and step == 2:
                look(model, inputs)
            loss.backward()
            if verified and step == 1:
                look(model, inputs)
            found += [p.grad for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        return [*found, *model.parameters(), *model.buffers()]

    def look(model: nn.Module, inputs: dict[str, Tensor]) -> None:
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        before, python_state = state(model), random.getstate()
        assert slimfit_fx.verify(model, inputs).ok
        assert state(model) == before
        assert random.getstate() == python_state
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (gradients[name] is None)
            assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])

    def state(model: nn.Module) -> object:
        session = session_of(model)
        return (
            dict(session.gates),
            len(session.captures),
            [id(run) for run in session.active],
            slimfit_fx.report(model).to_json(),
            str(slimfit_fx.scheduler(model).state_dict()),
            torch.get_rng_state().tolist(),
            [(module.training, id(module._compiled_call_impl)) for module in model.modules()],
            [(id(buffer), buffer.tolist()) for buffer in model.buffers()],
        )

    assert all(map(torch.equal, trained(False), trained(True)))


def test_the_users_graphs_are_found_again(model):
    slimfit_fx.transform(model, mode="eager")
    inputs = batch()
    model(**inputs).loss.backward()
    for _ in range(3):
        assert slimfit_fx.verify(model, inputs).ok
    with no_recompile():
        model(**inputs).loss.backward()


def test_a_model_that_is_not_transformed_stays_so(model):
    model.eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert slimfit_fx.verify(model, batch(), mode="eager").ok
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert session_of(model) is None
    slimfit_fx.transform(model, mode="eager")


def test_a_failing_batch_loses_nothing(model):
    slimfit_fx.transform(model, mode="eager")
    inputs = batch()
    model(**inputs).loss.backward()
    gradient = model.head.weight.grad.clone()
    with pytest.raises(ModelError, match="put labels into it, or pass loss="):
        slimfit_fx.verify(model, inputs, loss=lambda outputs: outputs["logits"])
    with pytest.raises(ModelError, match="depends on no parameter"):
        slimfit_fx.verify(model, inputs, loss=lambda outputs: outputs.loss.detach())
    with pytest.raises(IndexError):
        slimfit_fx.verify(model, {**inputs, "words": inputs["words"] + 11})
    assert torch.equal(model.head.weight.grad, gradient)
    with no_recompile():
        model(**inputs)


def test_what_is_to_be_verified_is_said(model):
    wrapper = nn.Sequential(slimfit_fx.transform(model, mode="eager"))
    with pytest.raises(StateError, match="not the model, but 0 in it was transformed"):
        slimfit_fx.verify(wrapper, torch.zeros(1, 7, dtype=torch.long), torch.sum)
    compiled = torch.compile(copy.deepcopy(model), backend="slimfit_fx", options={"mode": "eager"})
    with pytest.raises(StateError, match="verify the plain model, with the options"):
        slimfit_fx.verify(compiled, batch())
    compiled(**batch())
    assert slimfit_fx.verify(compiled, batch()).ok


def test_every_preset_has_a_tolerance():
    assert set(TOLERANCES) == set(PRESETS)


def test_a_model_whose_own_gradients_are_not_finite_is_not_called_right(model):
    found = slimfit_fx.verify(model, batch(), lambda outputs: outputs["loss"] * float("inf"), mode="eager")
    assert any("own gradients are not finite" in fault for fault in found.faults)


@pytest.mark.inductor
def test_inductor():
    """In the mode that people run; the user's graphs are found again."""
    torch.manual_seed(0)
    model, inputs = Classifier(dropout=0.1), batch()
    slimfit_fx.transform(model, freeze_rate=0.5)
    model(**inputs).loss.backward()
    found = slimfit_fx.verify(model, inputs)
    assert found.ok, found.faults
    assert found.mode == "inductor"
    with no_recompile():
        model(**inputs).loss.backward()


def test_outputs_are_compared_to_the_bit_in_float32_on_a_cpu_alone(monkeypatch):
    """On a GPU, of which `meta` takes the place here, sums may be divided otherwise."""
    assert forward_rounding_of(nn.Linear(3, 3)) == 0.0
    assert forward_rounding_of(nn.Linear(3, 3, dtype=torch.bfloat16)) == rounding(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert forward_rounding_of(nn.Linear(3, 3)) == rounding(torch.bfloat16)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # torch knows none for `meta`
    assert forward_rounding_of(nn.Linear(3, 3, device="meta")) == rounding(torch.float32)


def test_what_is_said_of_the_forward_is_what_was_compared():
    model, inputs = Classifier(), batch()
    assert "the forward to the last bit" in str(slimfit_fx.verify(model, inputs, mode="eager"))
    with torch.autocast("cpu", torch.bfloat16):
        assert "the forward within 0.062" in str(slimfit_fx.verify(model, inputs, mode="eager"))
