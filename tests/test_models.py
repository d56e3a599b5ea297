"""The invariants on small transformers and timm models, in the interpreter mode."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers
from differential import compared
from helpers import gated_parameters, given_to_regions, handed_over, no_recompile, reference, run, tensors, transformed

import slimfit_fx
from slimfit_fx.runtime.registry import session_of

SMALL: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
TIMM: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)


def text(length: int = 7, batch: int = 3) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(2, 50, (batch, length)),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
    }


def labelled_text(length: int = 7) -> dict[str, torch.Tensor]:
    return {**text(length), "labels": torch.randint(0, 2, (3,))}


def next_token() -> dict[str, torch.Tensor | bool]:
    return {**text(), "labels": torch.randint(2, 50, (3, 7)), "use_cache": False}


def pixels(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(3, 3, 32, 32), **more}


MODELS = {
    "bert": lambda: (
        transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **SMALL)),
        labelled_text(),
    ),
    "roberta": lambda: (
        transformers.RobertaForSequenceClassification(transformers.RobertaConfig(vocab_size=50, **SMALL)),
        labelled_text(),
    ),
    "gpt2": lambda: (
        transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2)),
        next_token(),
    ),
    "llama": lambda: (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, num_key_value_heads=1, **SMALL)),
        next_token(),
    ),
    "vit": lambda: (
        transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)),
        pixels(labels=torch.randint(0, 2, (3,))),
    ),
    "timm_vit": lambda: (timm.models.VisionTransformer(**TIMM), {"x": torch.randn(3, 3, 32, 32)}),
    "timm_deit": lambda: (
        timm.models.deit.VisionTransformerDistilled(**TIMM),
        {"x": torch.randn(3, 3, 32, 32)},
    ),
}


def decoder(name: str, **more):
    """A small decoder of transformers, and what it learns from."""
    config = getattr(transformers, f"{name}Config")(vocab_size=50, pad_token_id=0, **{**SMALL, **more})
    return getattr(transformers, f"{name}ForCausalLM")(config), next_token()


def translator(name: str, **more):
    """A small encoder and decoder."""
    config = getattr(transformers, f"{name}Config")(vocab_size=50, d_model=32, decoder_start_token_id=0, **more)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), next_token()


def classifier(name: str, **more):
    config = getattr(transformers, f"{name}Config")(vocab_size=50, pad_token_id=0, **{**SMALL, **more})
    config.problem_type = "single_label_classification"
    return getattr(transformers, f"{name}ForSequenceClassification")(config), labelled_text()


GROUPED: dict[str, Any] = dict(num_key_value_heads=1, head_dim=16)
# looked at once, with half of the layers frozen
OTHERS = {
    "distilbert": lambda: classifier("DistilBert", dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    "electra": lambda: classifier("Electra"),
    "albert": lambda: classifier("Albert", embedding_size=16),
    "deberta": lambda: classifier("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "modernbert": lambda: classifier("ModernBert"),
    "opt": lambda: decoder("OPT", ffn_dim=64, word_embed_proj_dim=32),
    "neox": lambda: decoder("GPTNeoX"),
    "mistral": lambda: decoder("Mistral", **GROUPED),
    "mixtral": lambda: decoder("Mixtral", num_local_experts=2, **GROUPED),
    "qwen3": lambda: decoder("Qwen3", **GROUPED),
    "gemma2": lambda: decoder("Gemma2", **GROUPED),
    "phi3": lambda: decoder("Phi3", num_key_value_heads=1),
    "t5": lambda: translator("T5", d_ff=64, d_kv=16, num_layers=2, num_heads=2),
    "bart": lambda: translator("Bart", encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64),
    "dinov2": lambda: (
        transformers.Dinov2ForImageClassification(transformers.Dinov2Config(image_size=32, patch_size=8, **SMALL)),
        pixels(labels=torch.randint(0, 2, (3,))),
    ),
    "timm_swin": lambda: (
        timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2)
        ),
        {"x": torch.randn(3, 3, 32, 32)},
    ),
    "timm_convnext": lambda: (
        timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=3),
        {"x": torch.randn(3, 3, 32, 32)},
    ),
}


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    model, inputs = MODELS[request.param]()
    return model.train(), inputs


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return dict(rtol=1e-4, atol=1e-5) if dtype is torch.float32 else dict(rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "autocast, regions", [(False, "model"), (True, "model"), (False, "blocks")], ids=["fp32", "autocast", "blocks"]
)
def test_forward_gradients_and_bytes(case, autocast, regions):
    model, inputs = case
    plain, slim = reference(model, regions=regions), transformed(model, freeze_rate=0.5, regions=regions)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = run(plain, inputs)
        for frozen in choices(slim):
            check(slim, inputs, frozen, expected, tolerance(torch.bfloat16 if autocast else torch.float32))


def check(model, inputs, frozen: set[str], expected, close: dict[str, float]) -> None:
    """With the layers `frozen`: outputs to the last bit, the open layers' gradients, and the bytes of the report."""
    gates = slimfit_fx.gates(model)
    gates.set(set(gates.names) - frozen)
    assert gates.closed == [name for name in gates.names if name in frozen]
    outputs, found = run(model, inputs)
    expected_outputs, expected_gradients = expected
    assert all(map(torch.equal, tensors(outputs), tensors(expected_outputs)))
    layer_of = gated_parameters(model)
    for name, gradient in expected_gradients.items():
        if gradient is None or layer_of.get(name) in frozen:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], gradient, **close)
    open_ones = {name: None if layer_of.get(name) in frozen else g for name, g in expected_gradients.items()}
    # one by one by their norms: small gradients are within any absolute tolerance of zero
    assert not compared("gradients", found, open_ones, expected_gradients, close["rtol"])
    with given_to_regions(model) as tables:
        outputs = model(**inputs)
    held = {**inputs, **dict(enumerate(tables))}
    assert slimfit_fx.report(model).saved_bytes_after == handed_over(outputs, model, held)


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name):
    torch.manual_seed(0)
    model, inputs = OTHERS[name]()
    plain, slim = reference(model.train()), transformed(model)
    check(slim, inputs, choices(slim)[1], run(plain, inputs), tolerance(torch.float32))


def choices(model: torch.nn.Module) -> list[set[str]]:
    """Frozen sets: nothing, half of the layers, all of them."""
    names = slimfit_fx.gates(model).names
    return [set(), set(names[::2]), set(names)]


def test_every_linear_layer_is_conditional(case):
    """All matrices that a linear layer multiplies with skip their gradient, not only drop it."""
    model, inputs = case
    slim = transformed(model)
    slim(**inputs)
    session = session_of(slim)
    dropped = {session.layers[g.gate].name for g in session.plan.gradients if not g.conditional}
    tied = getattr(model.config, "tie_word_embeddings", False) if hasattr(model, "config") else False
    for name, module in slim.named_modules():
        if (
            isinstance(module, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))
            and f"{name}.weight" in session.gates
        ):
            assert f"{name}.weight" not in dropped or tied


def test_changing_sizes_recompile_once(case):
    """Batch size and sequence length: dynamic shapes after one recompile, with the same gradients."""
    model, inputs = case
    plain, slim = reference(model), transformed(model, freeze_rate=0.5)
    run(slim, inputs)

    def resized(batch: int):
        return {
            k: v[:1].expand(batch, *v.shape[1:]).clone() if isinstance(v, torch.Tensor) else v
            for k, v in inputs.items()
        }

    run(slim, resized(5))
    with no_recompile():
        for batch in (4, 7):
            _, found = run(slim, resized(batch))
    _, expected = run(plain, resized(7))
    for name, gradient in found.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


def test_evaluation_runs_untouched(case):
    model, inputs = case
    slim = transformed(model).eval()
    expected = model.eval()(**inputs)
    assert all(map(torch.equal, tensors(slim(**inputs)), tensors(expected)))
    with torch.no_grad():
        slim.train()(**inputs)
    assert not session_of(slim).captures


def test_gradient_checkpointing():
    """What a checkpointed block computes again is not kept for its linear layers; the gradients stay the same."""
    torch.manual_seed(0)
    model, inputs = MODELS["bert"]()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    kept = transformed(model, always_open=())
    kept(**inputs)
    model.gradient_checkpointing_enable()
    _, expected = run(reference(model), inputs)
    slim = transformed(model, freeze_rate=0.0)
    _, found = run(slim, inputs)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    slimfit_fx.gates(slim).set([])
    _, found = run(slim, inputs)
    assert {name for name, gradient in found.items() if gradient is None} == set(gated_parameters(slim))
    assert slimfit_fx.report(slim).saved_bytes_before < slimfit_fx.report(kept).saved_bytes_before / 2
