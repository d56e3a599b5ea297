"""README and docs: links lead somewhere, the first program runs, code is code, and no riddles of old come back."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

import slimfit_fx

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()


def outside_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", outside_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", outside_code(text)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken(page, page.read_text()) == []


def test_a_broken_link_is_found():
    text = "[a](docs/nowhere.md) [b](docs/training.md#nothing) [c](#try-it) [d](https://example.org) [e](LICENSE)"
    assert broken(PAGES[0], text) == ["docs/nowhere.md", "docs/training.md#nothing"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_code(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("mode", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_the_first_program_runs(mode, monkeypatch, capsys):
    program = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len([line for line in program.splitlines() if line]) <= 10
    transform = slimfit_fx.transform
    monkeypatch.setattr(slimfit_fx, "transform", lambda model, **options: transform(model, mode=mode, **options))
    torch.manual_seed(0)
    names: dict = {}
    exec(program, names)
    report = slimfit_fx.report(names["model"])
    assert report.saved_bytes_after < report.saved_bytes_before / 3
    assert len(slimfit_fx.gates(names["model"]).closed) > 0
    assert "are saved instead of" in capsys.readouterr().out


def test_every_page_is_in_the_readme():
    for page in PAGES[1:]:
        assert f"(docs/{page.name}" in README


def test_every_option_is_explained():
    options = (ROOT / "docs" / "options.md").read_text()
    for field in slimfit_fx.Config.__dataclass_fields__:
        assert f"`{field}`" in options
