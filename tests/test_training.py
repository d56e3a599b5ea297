"""Features of real training loops, each compared with the same run untransformed, all gates open."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from helpers import no_recompile
from torch import nn
from training_loops import adamw, assert_same, batches, net, plain_loop, transformed

import slimfit_fx
from slimfit_fx.runtime.registry import session_of


def clipped(model) -> None:
    optimizer = adamw(model.parameters())
    for x in batches(6):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def accumulated(model) -> None:
    optimizer = adamw(model.parameters())
    for step, x in enumerate(batches(6)):
        model(x).square().sum().backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()


def with_groups_and_schedule(model) -> None:
    groups = [{"params": model[0].parameters(), "lr": 0.05}, {"params": model[1:].parameters(), "weight_decay": 0.5}]
    optimizer = adamw(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.05, 0.01], total_steps=8)
    for x in batches(6):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        schedule.step()


def with_two_optimizers(model) -> None:
    optimizers = [adamw(model[0].parameters()), torch.optim.SGD(model[1:].parameters(), lr=0.01, momentum=0.9)]
    for x in batches(6):
        model(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def with_evaluation_between(model) -> None:
    optimizer = adamw(model.parameters())
    for x in batches(6):
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def with_a_compiled_step(model) -> None:
    optimizer = adamw(model.parameters())
    step = torch.compile(optimizer.step, backend="eager")
    for x in batches(4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        step()


LOOPS = [clipped, accumulated, with_groups_and_schedule, with_two_optimizers, with_evaluation_between]


LOOPS.append(with_a_compiled_step)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loops(loop):
    model = net()
    slim = transformed(model)
    loop(model)
    loop(slim)
    assert_same(slim, model)


OPTIMIZERS = {
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "fused adamw": lambda p: adamw(p, fused=True),
    "foreach adamw": lambda p: adamw(p, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers(make):
    model = net()
    slim, frozen = transformed(model), transformed(model, freeze_rate=0.7, catch_up=1.0, decay_moments=True)
    plain_loop(model, make)
    plain_loop(slim, make)
    plain_loop(frozen, make)
    assert_same(slim, model)
    assert slimfit_fx.scheduler(frozen).state.step == 6
    assert all(torch.isfinite(value).all() for value in frozen.state_dict().values())


def test_eight_bit_adamw():
    low_bit = pytest.importorskip("torchao.optim")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))  # torchao quantises 4,096 elements or more
    x = torch.randn(4, 64)
    slim, frozen = transformed(model), transformed(model, freeze_rate=0.5, catch_up=1.0, decay_moments=True)
    for net_ in (model, slim, frozen):
        optimizer = low_bit.AdamW8bit(net_.parameters(), lr=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            net_(x).square().sum().backward()
            optimizer.step()
    assert_same(slim, model, 1e-3)
    assert all(torch.isfinite(value).all() for value in frozen.state_dict().values())


def scaled(model, make, overflow_at: int) -> torch.amp.GradScaler:
    """fp16 with a gradient scaler; one step overflows and is skipped."""
    optimizer, scaler = make(model.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, x in enumerate(batches(6)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(x).float().square().sum() * (1e38 if step == overflow_at else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return scaler


@pytest.mark.parametrize("make", [adamw, lambda p: adamw(p, fused=True)], ids=["adamw", "fused adamw"])
def test_gradient_scaler(make):
    model = net()
    slim = transformed(model)
    scaled(model, make, overflow_at=3)
    scaler = scaled(slim, make, overflow_at=3)
    assert scaler.get_scale() < 2.0**10
    assert_same(slim, model, 1e-2)


@pytest.mark.parametrize("make", [adamw, lambda p: adamw(p, fused=True)], ids=["adamw", "fused adamw"])
@pytest.mark.parametrize("policy", ["update", "gradient"])
def test_a_skipped_step_updates_no_score(make, policy):
    """Every step overflows: nothing moves, and no score is learnt."""
    slim = transformed(net(6), freeze_rate=0.5, policy=policy)
    before = slimfit_fx.scheduler(slim).state.score
    optimizer, scaler = make(slim.parameters()), torch.amp.GradScaler("cpu")
    weights = copy.deepcopy(slim.state_dict())
    for x in batches(5):
        scaler.scale(slim(x).square().sum() * 1e38 * 1e38).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    slim(batches(1)[0])
    assert all(torch.equal(value, weights[name]) for name, value in slim.state_dict().items())
    learnt = slimfit_fx.scheduler(slim).state.score
    assert all(score in (before[layer], -1.0) for layer, score in enumerate(learnt))


def test_moving_averages_of_the_weights():
    model = net()
    slim = transformed(model)
    averages = []
    for net_ in (model, slim):
        average = torch.optim.swa_utils.AveragedModel(
            net_, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        )
        optimizer = adamw(net_.parameters())
        for x in batches(4):
            optimizer.zero_grad()
            net_(x).square().sum().backward()
            optimizer.step()
            average.update_parameters(net_)
        averages.append(average.module)
    assert_same(averages[1], averages[0])
    assert session_of(averages[1]) is None, "a copy is a plain model"


def test_a_thousand_steps():
    """No recompile, and nothing piles up: neither objects nor history beyond its bound."""
    slim = transformed(net(6), freeze_rate=0.7, catch_up=0.5, decay_moments=True)
    optimizer, data = adamw(slim.parameters()), batches(20)
    counts = []
    plain_loop(slim, steps=2)
    with no_recompile():
        for step in range(1000):
            optimizer.zero_grad()
            slim(data[step % 20]).square().sum().backward()
            optimizer.step()
            if step in (50, 500, 999):
                gc.collect()
                counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert counts[0] >= counts[1] >= counts[2]
    assert len(slimfit_fx.graphs(slim)) == 1
