"""Builds the site from the repository as it lies: README, changelog and contributing become pages of it."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the Markdown files of the repository's root to the pages."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that are right in the repository into ones that are right on the site."""
    sources = {page: source for source, page in PAGES.items()}
    path = page.file.src_uri
    folder = posixpath.dirname(sources.get(path, f"docs/{path}"))

    def on_the_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link.group()))
        if not (ROOT / target).exists():
            raise PluginError(f"{path} links to {link.group()}, which is not in the repository")
        where = PAGES.get(target, target.removeprefix("docs/"))
        if target in PAGES or target.startswith("docs/"):
            return posixpath.relpath(where, posixpath.dirname(path) or ".")
        return f"{config.repo_url}/tree/main/{target}"

    return _LINK.sub(on_the_site, markdown)
