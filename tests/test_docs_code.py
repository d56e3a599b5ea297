"""The documentation's code blocks run, as they stand and in order; its reference names everything that is public."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn

import slimfit_fx

DOCS = Path(__file__).parent.parent / "docs"
TEXTS = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
SKETCH = 'python title="not run"'  # how a block is marked that cannot run by itself
SKETCHES = 3
ELSEWHERE = {"extending.md"}  # tests/test_extending.py runs its blocks, and looks at what they do

Names = dict[str, Any]


def blocks(text: str, info: str = "python") -> list[str]:
    """The fenced blocks whose info string is `info`."""
    return re.findall(rf"^```{re.escape(info)}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


class Classifier(nn.Module):
    """A model that takes what Trainer hands over, with blocks and norms that overrides can name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(2))
        self.classifier = nn.Linear(64, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for block in self.layer:
            x = x + block(x)
        logits = self.classifier(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


SENTENCES = [{"x": torch.randn(64), "labels": torch.tensor(index % 2)} for index in range(64)]


def backward(model: nn.Module) -> None:
    model(torch.randn(64, 64), torch.arange(64) % 2)["loss"].backward()


def codecs(names: Names, folder: Path) -> Iterator[None]:
    names["model"] = Classifier()
    yield
    backward(names["model"])
    rows = slimfit_fx.report(names["model"]).rows
    norms = {row["module"]: row["stored_as"] for row in rows if row["role"] == "norm input"}
    assert norms == {"layer.0.0": "", "layer.1.0": "int4, group 64"}


def training(names: Names, folder: Path) -> Iterator[None]:
    """An optimizer over copies of the weights; then Trainer, accelerate, Lightning."""
    model = names["model"] = slimfit_fx.transform(Classifier())
    names["masters"] = [parameter.detach().clone() for parameter in model.parameters()]
    names["optimizer"] = torch.optim.SGD(names["masters"], 0.1)
    backward(model)
    yield
    assert slimfit_fx.scheduler(model).state.step == 1

    names["model"], names["sentences"], names["Trainer"] = Classifier(), SENTENCES, transformers.Trainer
    names["arguments"] = transformers.TrainingArguments(str(folder), max_steps=2, use_cpu=True, report_to="none")
    yield
    names["trainer"].train()
    assert slimfit_fx.scheduler(names["model"]).state.step == 2

    model = names["model"] = Classifier()
    names["optimizer"] = torch.optim.SGD(model.parameters(), 0.1)
    names["loader"] = torch.utils.data.DataLoader(SENTENCES, batch_size=4)  # pyright: ignore[reportArgumentType]
    names["accelerator"] = accelerate.Accelerator(cpu=True)
    yield
    names["accelerator"].save_state(str(folder / "accelerate"))
    assert any(path.name.startswith("custom_checkpoint") for path in (folder / "accelerate").iterdir())

    names["lightning"] = SimpleNamespace(LightningModule=nn.Module)  # all that the block asks of it
    yield
    first, second, checkpoint = names["Module"](Classifier()), names["Module"](Classifier()), {}
    optimizer = torch.optim.SGD(first.parameters(), 0.1)
    backward(first.model)
    optimizer.step()
    first.on_save_checkpoint(checkpoint)
    second.on_load_checkpoint(checkpoint)
    assert slimfit_fx.scheduler(second.model).state.step == 1


# by page: what its blocks need and what they must have done; it stops before each block and once more behind the last
PAGES: dict[str, Callable[[Names, Path], Iterator[None]]] = {"codecs.md": codecs, "training.md": training}


@pytest.mark.parametrize("page", sorted(page for page in TEXTS if blocks(TEXTS[page]) and page not in ELSEWHERE))
def test_code_blocks_run(page, tmp_path, monkeypatch):
    assert page in PAGES, f"{page} has code blocks: say in PAGES what they need, or mark them {SKETCH!r}"
    monkeypatch.setattr(slimfit_fx, "transform", functools.partial(slimfit_fx.transform, mode="eager"))
    monkeypatch.chdir(tmp_path)
    names: Names = {"slimfit_fx": slimfit_fx, "torch": torch}
    around = PAGES[page](names, tmp_path)
    for number, code in enumerate(blocks(TEXTS[page]), start=1):
        assert next(around, "ended") is None, f"{page}: PAGES knows nothing of block {number}"
        exec(compile(code, f"{page}, block {number}", "exec"), names)
    assert next(around, "ended") == "ended", f"{page}: PAGES knows of more blocks than there are"


def test_no_block_is_left_out_silently():
    languages = {info for text in TEXTS.values() for info in re.findall(r"^```(.+)$", text, re.MULTILINE)}
    assert languages <= {"python", SKETCH, "bash"}
    assert sum(len(blocks(text, SKETCH)) for text in TEXTS.values()) == SKETCHES


@pytest.mark.parametrize("module", [slimfit_fx, slimfit_fx.codecs], ids=lambda module: module.__name__)
def test_every_public_name_has_a_docstring_and_a_place_in_the_reference(module):
    referred = re.findall(r"^::: ([\w.]+)$", "\n".join(TEXTS.values()), re.MULTILINE)
    public = {
        name: value for name, value in vars(module).items() if not (name.startswith("_") or inspect.ismodule(value))
    }
    assert {name for name in public if callable(public[name]) and not inspect.getdoc(public[name])} == set()
    prefix = f"{module.__name__}."
    assert sorted(name for name in referred if name.rpartition(".")[0] == module.__name__) == sorted(
        prefix + name for name in public
    )
