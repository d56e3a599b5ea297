"""A user's program: tests/test_typing.py checks its types and runs it, outside of the repository."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, fx, nn
from typing_extensions import assert_type

import slimfit_fx
from slimfit_fx import codecs


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.LayerNorm(16), nn.Linear(16, 2))


def loss_of(outputs: Tensor) -> Tensor:
    return outputs.square().mean()


def configure() -> slimfit_fx.Config:
    config = slimfit_fx.Config(
        preset="tight",
        codecs={
            "norm input": codecs.Quantize(4, group=64, symmetric=False),
            "activation input": codecs.Derivative(codecs.Quantize(8)),
            "dropout mask": codecs.BitMask(),
            "logits": None,
        },
        freeze_rate=0.5,
        always_open=("4",),
        mode="eager",
    )
    assert_type(config.replace(seed=1), slimfit_fx.Config)
    assert_type(config.to_json(), str)
    assert_type(config.budget, int | None)
    plain = config.replace(codecs={"norm input": codecs.Quantize(4)})
    assert slimfit_fx.Config.from_json(plain.to_json()) == plain
    return config


def train(model: nn.Module, batch: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        loss_of(model(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()


def gate_by_hand(model: nn.Module) -> None:
    gates = slimfit_fx.gates(model)
    assert_type(gates, slimfit_fx.Gates)
    assert_type(gates["0.weight"], bool)
    assert_type(gates.open, list[str])
    assert_type(gates.closed, list[str])
    gates["0.weight"] = False
    gates.set(["2.weight"])


def schedule(model: nn.Module) -> None:
    scheduler = slimfit_fx.scheduler(model)
    assert_type(scheduler, slimfit_fx.Scheduler)
    assert_type(scheduler.freeze_rate, float)
    assert_type(scheduler.optimizer_bytes(), tuple[int, int])
    choice = scheduler.history[-1]
    assert_type(choice, slimfit_fx.Choice)
    assert_type(choice.open, tuple[str, ...])
    assert_type(choice.scores, Sequence[float])
    scheduler.load_state_dict(json.loads(json.dumps(scheduler.state_dict())))
    scheduler.step()


def look(model: nn.Module, batch: Tensor) -> None:
    report = slimfit_fx.report(model, sample=batch, loss=loss_of)
    assert_type(report, slimfit_fx.Report)
    assert_type(report.saved_bytes_after, int)
    assert_type(report.rows, list[dict[str, Any]])
    assert_type(report.gradient_errors["all"].relative, float)
    assert_type(slimfit_fx.graphs(model), list[tuple[fx.GraphModule, fx.GraphModule]])
    assert_type(slimfit_fx.plot_history(model), Figure)
    assert_type(slimfit_fx.plot_memory([(0.0, 1024), (1.0, 0)], marks=[(0.5, "backward")]), Figure)
    found = slimfit_fx.verify(model, batch, loss_of)
    assert_type(found, slimfit_fx.Verification)
    assert_type(found.ok, bool)
    assert_type(found.faults, Sequence[str])
    assert found.ok, found.faults


def store(codec: codecs.Codec, x: Tensor) -> None:
    parts = codec.encode(x)
    assert_type(parts, tuple[Tensor, ...])
    assert_type(codec.decode(parts, x.shape, x.dtype), Tensor)
    assert_type(codec.error_bound(x), Tensor)
    assert_type(codec.nbytes(x.shape, x.dtype), int)
    assert_type(codec.label, str)


def catch_errors(model: nn.Module) -> None:
    try:
        slimfit_fx.transform(model)
    except (slimfit_fx.ConfigError, slimfit_fx.ModelError, slimfit_fx.VersionError):
        raise
    except slimfit_fx.StateError as error:
        assert isinstance(error, slimfit_fx.SlimFitError)
    assert issubclass(slimfit_fx.BackendError, RuntimeError) and issubclass(slimfit_fx.BackwardError, RuntimeError)
    assert issubclass(slimfit_fx.SlimFitWarning, UserWarning)


def main() -> None:
    torch.manual_seed(0)
    roles: Mapping[str, str] = slimfit_fx.ROLES
    assert "norm input" in roles and "update" in slimfit_fx.POLICIES
    batch = torch.randn(32, 16)
    model = slimfit_fx.transform(make_model(), configure(), policy="cyclic", min_open_steps=2)
    assert_type(model, nn.Module)
    train(model, batch)
    gate_by_hand(model)
    schedule(model)
    loss_of(model(batch)).backward()
    look(model, batch)
    catch_errors(model)
    assert_type(slimfit_fx.undo(model), nn.Module)
    for codec in (codecs.Quantize(8), codecs.Float8(), codecs.FixedPoint(8, 1 / 16, -8.0), codecs.TopK(0.1)):
        store(codec, batch)
    print(Path(slimfit_fx.__file__).parent)


if __name__ == "__main__":
    main()
