"""transformers' Trainer and accelerate: the same run as untransformed, resumed bit for bit, figures in the log."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import transformed
from torch import nn

import slimfit_fx
from slimfit_fx import StateError

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
import transformers

from slimfit_fx.integrations import SlimFitCallback

WIDTH = 16


class Classifier(nn.Module):
    """What Trainer asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def model_and_data() -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    model = Classifier()
    x = torch.randn(48, WIDTH)
    return model, [{"x": row, "labels": (row.sum() > 0).long()} for row in x]


def arguments(folder, **options) -> transformers.TrainingArguments:
    defaults = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
    )
    return transformers.TrainingArguments(**{**defaults, **options})


def trained(model, data, folder, callbacks=(), resume=None, **options) -> transformers.Trainer:
    trainer = transformers.Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1}, {"optim": "adamw_torch_fused"}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_with_all_gates_open_it_is_the_same_run(tmp_path, options):
    model, data = model_and_data()
    slim = transformed(model, freeze_rate=0.0)
    trained(model, data, tmp_path, **options)
    trained(slim, data, tmp_path, **options)
    tolerance = 2e-2 if "bf16" in options else 1e-4
    for name, value in model.state_dict().items():
        torch.testing.assert_close(slim.state_dict()[name], value, rtol=tolerance, atol=tolerance)


def test_the_log_has_the_figures(tmp_path):
    model, data = model_and_data()
    trainer = trained(transformed(model, freeze_rate=0.5), data, tmp_path, [SlimFitCallback()])
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 6
    assert all(entry["slimfit/freeze_rate"] == 0.5 and entry["slimfit/open_layers"] == 2 for entry in entries)
    assert all(entry["slimfit/saved_bytes"] > 0 for entry in entries)


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_is_bit_equal(tmp_path, restore):
    model, data = model_and_data()
    config: dict[str, Any] = dict(freeze_rate=0.5, catch_up=0.5)
    options: dict[str, Any] = dict(save_strategy="steps", save_steps=3, restore_callback_states_from_checkpoint=restore)
    whole, resumed = transformed(model, **config), transformed(model, **config)
    trained(whole, data, tmp_path, [SlimFitCallback()], **options)
    trained(resumed, data, tmp_path, [SlimFitCallback()], resume=str(tmp_path / "checkpoint-3"), **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert slimfit_fx.scheduler(whole).state_dict() == slimfit_fx.scheduler(resumed).state_dict()
    written = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert written["stateful_callbacks"]["SlimFitCallback"]["attributes"]["scheduler_state"]["step"] == 3


def test_a_checkpoint_without_state_is_named(tmp_path):
    model, data = model_and_data()
    trained(transformed(model), data, tmp_path, save_strategy="steps", save_steps=3)
    with pytest.raises(StateError, match="saved without SlimFitCallback"):
        trained(transformed(model), data, tmp_path, [SlimFitCallback()], resume=str(tmp_path / "checkpoint-3"))


def test_a_model_that_is_not_transformed_is_named(tmp_path):
    model, data = model_and_data()
    with pytest.raises(StateError, match="not transformed"):
        trained(model, data, tmp_path, [SlimFitCallback()])


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model, data = model_and_data()
    options: dict[str, Any] = dict(
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    slim = transformed(model, freeze_rate=0.5)
    trainer = trained(slim, data, tmp_path, [SlimFitCallback()], **options)
    best = min((e for e in trainer.state.log_history if "eval_loss" in e), key=lambda entry: entry["eval_loss"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"])
    assert slimfit_fx.scheduler(slim).state.step == 6


def test_torch_compile_of_the_trainer(tmp_path):
    """Two ways: Trainer compiles with our backend, or compiles a model that is transformed already."""
    model, data = model_and_data()
    slim = transformed(model, freeze_rate=0.5)
    trained(slim, data, tmp_path, [SlimFitCallback()], torch_compile=True, torch_compile_backend="eager")
    assert slimfit_fx.scheduler(slim).state.step == 6
    assert len(slimfit_fx.graphs(slim)) == 1


def test_accelerate_needs_no_callback(tmp_path):
    from accelerate import Accelerator

    model, data = model_and_data()
    slim = transformed(model, freeze_rate=0.5)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    prepared, optimizer, loader = accelerator.prepare(slim, torch.optim.AdamW(slim.parameters(), lr=0.01), loader)
    accelerator.register_for_checkpointing(slimfit_fx.scheduler(slim))
    for batch in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch)["loss"])
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert slimfit_fx.scheduler(slim).state.step == 6
    accelerator.save_state(str(tmp_path))
    saved = slimfit_fx.scheduler(slim).state_dict()
    slimfit_fx.scheduler(slim).load_state_dict({**saved, "step": 99})
    accelerator.load_state(str(tmp_path))
    assert slimfit_fx.scheduler(slim).state_dict() == saved
