"""Text for a person: names of a few things, tables that fit a screen."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tabulate import MIN_PADDING, tabulate

WIDTH = 100  # columns of a screen
_NARROWEST = 8  # columns that are left of a shortened cell
_NAMES = 3  # of a list that is cut
_NAME = 60  # columns of a name in such a list


def shortened(text: str, width: int) -> str:
    """`text` on one line of at most `width` columns; "..." stands for what is left out of its middle.

    Most of what stays is the end: the paths of the modules of a model differ there.
    """
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    end = (width - 3) * 3 // 4
    return f"{text[: width - 3 - end]}...{text[len(text) - end :]}"


def few(names: Sequence[str]) -> str:
    """The first names, shortened, and how many there are beside them."""
    shown = [shortened(name, _NAME) for name in names[:_NAMES]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def fitted_table(rows: Sequence[Sequence[str]], headings: Sequence[str], words: int) -> str:
    """A table of at most `WIDTH` columns; the widest cells are shortened.

    Args:
        rows: cells.
        headings: of the columns.
        words: how many columns, from the left, hold words that may be shortened; the others hold numbers.
    """
    lines = [[" ".join(cell.split()) for cell in row] for row in rows]
    headed = [len(heading) + MIN_PADDING for heading in headings]
    narrowest = [max(_NARROWEST, width) for width in headed]
    widths = [max([headed[i], *(len(line[i]) for line in lines)]) for i in range(len(headings))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widest = max(range(words), key=lambda column: widths[column] - narrowest[column])
        if widths[widest] <= narrowest[widest]:
            break  # numbers alone are wider
        widths[widest] -= 1
    cut = [[shortened(cell, width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return aligned_table(cut, headings, words)


def aligned_table(rows: Sequence[Sequence[str]], headings: Sequence[str], words: int, style: str = "simple") -> str:
    """A table of any width, `words` columns of words on the left, numbers on the right."""
    sides = ["left"] * words + ["right"] * (len(headings) - words)
    if not rows:  # tabulate aligns columns of rows only
        return tabulate([], headings, style)
    return tabulate(rows, headings, style, colalign=sides, disable_numparse=True)
