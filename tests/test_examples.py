"""The examples run from end to end on tiny data, models and steps."""

from __future__ import annotations

import csv
import gzip
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))


@pytest.mark.parametrize("method", [["--mode=eager", "--freeze-rate=0.5"], ["--eager-baseline"]])
def test_text(tiny_bert, method, capsys):
    import finetune_text

    rows = [{"text": f"{word} film", "label": int(word == "good")} for word in ("good", "bad")] * 60
    data, out = tiny_bert / "data.csv", tiny_bert / "out.json"
    with data.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    command = ["--model", str(tiny_bert), "--csv", str(data), "--json", str(out), "--device=cpu"]
    command += ["--steps=25", "--batch=8", "--length=6", "--learning-rate=3e-2", *method]
    command += ["--option=catch_up=0.5", "--option=closed_state=none", "--plot", str(tiny_bert / "pictures")]
    result = finetune_text.main(command)
    assert result["test_accuracy"] > 0.9
    pictures = {path.name for path in (tiny_bert / "pictures").iterdir()}
    assert pictures == ({"memory.png"} if "--eager-baseline" in method else {"memory.png", "history.png"})
    assert json.loads(out.read_text())["steps"] == 25
    assert ("layers open." in capsys.readouterr().out) == ("--eager-baseline" not in method)


def test_the_split_is_fixed_stratified_and_disjoint(tmp_path):
    import finetune_text

    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "".join(f"sentence {i},{i % 2}\n" for i in range(853)))
    options = finetune_text.parse(["--csv", str(data)])
    splits = finetune_text.load_splits(options)
    assert splits == finetune_text.load_splits(options)
    texts = [text for rows in splits.values() for text, _ in rows]
    assert len(set(texts)) == len(texts)
    for part, size in finetune_text.SIZES.items():
        assert len(splits[part]) == pytest.approx(size / 10, abs=2)
        assert sum(label for _, label in splits[part]) == pytest.approx(size / 20, abs=2)


def write_idx(path: Path, values: np.ndarray) -> None:
    """The format of MNIST's files: a magic number, the sizes, the bytes; gzipped."""
    header = struct.pack(f">i{values.ndim}i", 0x800 + values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def test_vision(tmp_path):
    """A ViT learns to tell bright images from dark ones."""
    import finetune_vision

    config = transformers.ViTConfig(
        image_size=28, patch_size=14, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    for part in ("train", "t10k"):
        labels = np.arange(64) % 2
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", np.ones((64, 28, 28)) * labels[:, None, None] * 255)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    command = ["--model", str(tmp_path), "--data", str(tmp_path), "--image-size=28", "--device=cpu", "--mode=eager"]
    result = finetune_vision.main([*command, "--steps=20", "--batch=8", "--learning-rate=1e-2", "--freeze-rate=0.5"])
    assert result["test_accuracy"] > 0.9


def test_missing_data_is_named(tmp_path):
    import finetune_vision

    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        finetune_vision.main(["--data", str(tmp_path)])
