"""Settings of the whole suite."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
# A folder of generated code for each process: two that compile the same kernel at once may load half a file.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"slimfit_fx_tests_{_worker}")
# Two cores, graphs that are traced and compiled: time limits would only report how busy the machine is.
hypothesis.settings.register_profile("graphs", deadline=None, max_examples=15, print_blob=True)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=4)
hypothesis.settings.load_profile("graphs")


def _stub_torchvision_operators() -> None:
    """torchvision's CUDA build does not load next to a CPU torch; timm only needs its schemas to exist."""
    try:
        torch.ops.torchvision.nms  # noqa: B018
    except AttributeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_torchvision"] = library


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        _stub_torchvision_operators()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Every test captures for itself: without this, the recompile limit of shared code would add up."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def tiny_bert(tmp_path):
    """A folder with a model and a tokenizer, as from_pretrained takes it."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)  # the same model whichever tests ran before
    transformers.BertModel(config).save_pretrained(tmp_path)
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory) -> str:
    """A folder with a BERT for the recipes, and its tokenizer."""
    from recipe_runs import make_bert

    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """Makes `datasets` keep what it prepares in a folder of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
