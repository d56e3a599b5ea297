"""The allocator's bytes beside those of the report."""

from __future__ import annotations

import gc

import pytest
import torch
from device_runs import moved, slim
from helpers import handed_over, reference
from torch import nn

import slimfit_fx

LENGTH, BATCH = 128, 16


def bert(device: torch.device) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Large enough that blocks of 512 bytes do not matter."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024, vocab_size=1000,
        problem_type="single_label_classification",
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).to(device).train()
    inputs = {
        "input_ids": torch.randint(2, 1000, (BATCH, LENGTH)),
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
        "labels": torch.randint(0, 2, (BATCH,)),
    }
    return model, moved(inputs, device)


def forward_backward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    model(**inputs).loss.backward()
    model.zero_grad()


@pytest.mark.parametrize("preset", ["exact", "balanced", "tight", "paper"])
def test_what_a_forward_holds_is_what_the_report_says(preset, device):
    model, inputs = bert(device)
    ours = slim(model, preset=preset, freeze_rate=0.9)
    forward_backward(ours, inputs)  # allocates what libraries keep
    forward_backward(ours, inputs)
    gates = slimfit_fx.gates(ours)
    seen = []
    for opened in ([], gates.names, gates.names[::2]):
        gates.set(opened)
        gc.collect()
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        outputs = ours(**inputs)
        reported = slimfit_fx.report(ours).saved_bytes_after
        assert handed_over(outputs, ours, inputs) == reported
        if device.type == "cuda":
            returned = sum(outputs[name].numel() * outputs[name].element_size() for name in ("loss", "logits"))
            held = torch.cuda.memory_allocated(device) - before
            assert held - returned == pytest.approx(reported, rel=0.01)
        outputs.loss.backward()
        ours.zero_grad()
        del outputs
        if device.type == "cuda":
            assert torch.cuda.memory_allocated(device) <= before + 0.01 * reported, "what a step leaves behind"
        seen.append(reported)
    assert seen[0] <= seen[2] <= seen[1]


def test_the_peak_is_below_that_of_torch_compile(cuda):
    """Of activations, gradients and temporaries; simulated, it is about a half."""
    model, inputs = bert(cuda)
    peaks = []
    for each in (reference(model, "inductor"), slim(model, preset="balanced", freeze_rate=0.9)):
        forward_backward(each, inputs)
        forward_backward(each, inputs)
        gc.collect()
        torch.cuda.reset_peak_memory_stats(cuda)
        before = torch.cuda.memory_allocated(cuda)
        forward_backward(each, inputs)
        peaks.append(torch.cuda.max_memory_allocated(cuda) - before)
    assert peaks[1] < 0.8 * peaks[0], peaks
