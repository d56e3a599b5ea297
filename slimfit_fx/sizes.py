"""Numbers of bytes as text."""

from __future__ import annotations


def size_text(nbytes: int) -> str:
    """Bytes in the unit that keeps them readable, powers of 1,024."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
