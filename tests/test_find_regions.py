"""Repeated blocks are found, whatever is around them."""

from __future__ import annotations

import copy

import timm
import torch
import transformers
from helpers import transformed
from small_bert import bert
from torch import nn

import slimfit_fx
from slimfit_fx import Config
from slimfit_fx.codecs import Quantize
from slimfit_fx.model.regions import find_regions
from slimfit_fx.runtime.registry import session_of


def paths(model: nn.Module) -> list[str]:
    return [region.path for region in find_regions(model, Config(regions="blocks"))]


def kinds(model: nn.Module, **config) -> dict[str, int]:
    """The regions, numbered by kind."""
    regions = find_regions(model, Config(regions="blocks", **config))
    order = list(dict.fromkeys(region.kind for region in regions))
    return {region.path: order.index(region.kind) for region in regions}


def test_bert_is_its_layers_and_what_is_beside_them():
    assert kinds(bert()[0]) == {
        "bert.embeddings": 0,
        "bert.encoder.layer.0": 1,
        "bert.encoder.layer.1": 1,
        "bert.encoder.layer.2": 1,
        "bert.pooler": 2,
        "classifier": 3,
    }


def test_blocks_that_differ_are_of_different_kinds():
    """The first block of T5 has a table of positions; a codec for one layer makes it a kind of its own."""
    t5 = transformers.T5Model(
        transformers.T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2)
    )
    found = kinds(t5)
    assert found["encoder.block.0"] != found["encoder.block.1"] == found["encoder.block.2"]
    assert found["decoder.block.1"] not in (found["encoder.block.1"], found["decoder.block.0"])
    found = kinds(bert()[0], codecs={r"layer\.1\.intermediate": Quantize(8)})
    assert found["bert.encoder.layer.0"] == found["bert.encoder.layer.2"] != found["bert.encoder.layer.1"]
    model = bert()[0]
    model.bert.encoder.layer[0].requires_grad_(False)
    found = kinds(model)
    assert found["bert.encoder.layer.0"] != found["bert.encoder.layer.1"] == found["bert.encoder.layer.2"]


def test_the_outermost_repetition_counts():
    """Stages of different widths are no repetition, the blocks in them are; a block's own layers are not looked at."""
    swin = timm.models.swin_transformer.SwinTransformer(
        img_size=32,
        patch_size=2,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 2),
        window_size=4,
        num_classes=3,
        drop_path_rate=0.0,
    )
    assert {"layers.0.blocks.0", "layers.1.blocks.1", "patch_embed", "head"} <= set(paths(swin))
    block = nn.ModuleDict({"experts": nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))})
    assert paths(nn.Sequential(copy.deepcopy(block), copy.deepcopy(block))) == ["0", "1"]


def test_without_repetition_the_model_is_one_region():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert paths(model) == [""]
    slim = transformed(model.train(), regions="blocks", always_open=())
    slim(torch.randn(2, 4)).sum().backward()
    assert len(session_of(slim).captures) == 1
    assert slimfit_fx.undo(slim)._compiled_call_impl is None
