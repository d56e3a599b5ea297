"""Features of real training loops, each compared with the same run untransformed, all gates open."""

from __future__ import annotations

import copy
import gc

import helpers
import pytest
import torch
import transformers
from helpers import no_recompile
from torch import nn

import slimfit_fx
from slimfit_fx.runtime.registry import session_of
from slimfit_fx.runtime.session import Session

WIDTH = 8


def net(depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(depth)))


def batches(count: int, rows: int = 4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, WIDTH, generator=generator) for _ in range(count)]


def transformed(model: nn.Module, **config) -> nn.Module:
    return helpers.transformed(model, **{"freeze_rate": 0.0, "always_open": (), **config})


def assert_same(slim: nn.Module, model: nn.Module, tolerance: float = 1e-5) -> None:
    for name, value in model.state_dict().items():
        torch.testing.assert_close(slim.state_dict()[name], value, rtol=tolerance, atol=tolerance)


def adamw(parameters, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, **options)


def plain_loop(model, make=adamw, steps: int = 6) -> None:
    optimizer = make(model.parameters())
    for x in batches(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


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


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def tokens(batch: int = 2, length: int = 8) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 32, (batch, length), generator=torch.Generator().manual_seed(batch * length))
    return {"input_ids": ids, "labels": ids}


def language_loop(model, steps: int = 3, **inputs) -> None:
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    for _ in range(steps):
        optimizer.zero_grad()
        model(**(inputs or tokens())).loss.backward()
        optimizer.step()


def train_open_and_frozen(model: nn.Module, **frozen_config) -> nn.Module:
    """Trains the model, a copy with all gates open, which must stay the same and is returned, and one half frozen."""
    slim, frozen = transformed(model), transformed(model, freeze_rate=0.5, **frozen_config)
    for each in (model, slim, frozen):
        language_loop(each)
    assert_same(slim, model, 1e-4)
    assert slimfit_fx.scheduler(frozen).state.step == 3
    return slim


def test_tied_embeddings_and_generation():
    model = tiny_llama()
    slim = transformed(model)
    language_loop(model)
    language_loop(slim)
    assert_same(slim, model, 1e-4)
    prompt = tokens()["input_ids"]
    generated = [m.eval().generate(prompt, max_new_tokens=4, do_sample=False) for m in (model, slim)]
    assert torch.equal(*generated)
    slim.train()
    language_loop(slim, 1)


def test_checkpointed_blocks_of_transformers():
    model = tiny_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    train_open_and_frozen(model, preset="balanced")


def test_adapters_are_layers():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama(), config)
    slim = train_open_and_frozen(model)
    assert all("lora" in name for name in slimfit_fx.gates(slim).names)
    assert len(slimfit_fx.gates(slim)) == 8


def test_changing_batches_recompile_once():
    slim = transformed(tiny_llama(), freeze_rate=0.5)
    for batch, length in ((2, 8), (3, 9)):
        language_loop(slim, 1, **tokens(batch, length))
    with no_recompile():
        for batch, length in ((4, 11), (5, 6), (2, 8)):
            language_loop(slim, 1, **tokens(batch, length))


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


def test_states_of_closed_layers_are_dropped():
    slim = transformed(net(8), freeze_rate=0.75, policy="random", closed_state="none", closed_state_after=3)
    optimizer = adamw(slim.parameters())
    session = session_of(slim)
    assert isinstance(session, Session)
    for x in batches(30):
        optimizer.zero_grad()
        slim(x).square().sum().backward()
        optimizer.step()
        missed = session.scheduler._state.missed
        open_now = slimfit_fx.gates(slim).table.tolist()
        for layer, name in enumerate(slimfit_fx.gates(slim).names):
            has_state = bool(optimizer.state.get(slim.get_parameter(name)))
            assert not has_state or open_now[layer] or missed[layer] + 1 < 3
    assert all(torch.isfinite(value).all() for value in slim.state_dict().values())


def test_states_on_the_host_change_nothing():
    """On a CPU the host is where they are; on a GPU this is the test of the copies."""
    device = torch.accelerator.current_accelerator() or "cpu"
    results = []
    for place in ("device", "host"):
        slim = transformed(net(8).to(device), freeze_rate=0.75, closed_state=place, closed_state_after=2)
        optimizer = adamw(slim.parameters())
        for x in batches(12):
            optimizer.zero_grad()
            slim(x.to(device)).square().sum().backward()
            optimizer.step()
        results.append(slim.state_dict())
        optimizer.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_the_report_counts_optimizer_states():
    slim = transformed(net(4), freeze_rate=0.5)
    plain_loop(slim, steps=1)
    slim(batches(1)[0])
    assert "optimizer states" not in str(slimfit_fx.report(slim)), "no optimizer is alive"
    optimizer = adamw(slim.parameters())
    slim(batches(1)[0]).sum().backward()
    optimizer.step()
    report = slimfit_fx.report(slim)
    gated = sum(p.nbytes for p in slim.parameters() if p.grad is not None and p.dim() > 1)
    assert report.optimizer_bytes == (2 * gated, 0)
    assert "Optimizer states of layers: " in str(report)
