"""Answers to questions that may have none, as in SQuAD 2.0: which span a model means, and how good it is.

A window is a piece of a context, cut to the model's length; its first token stands for "no answer here".
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST_LIKELY = 20  # starts and ends of a window that are tried with each other
LONGEST = 30  # tokens of an answer
OUTSIDE = (-1, -1)  # the place of a token that is not of the context


class Window(NamedTuple):
    """Logits [n] that an answer starts, and ends, at a token; and the tokens' places [n, 2] in the context's text."""

    starts: np.ndarray
    ends: np.ndarray
    places: np.ndarray


def find_answer(context: str, windows: Sequence[Window]) -> str:
    """The text of the best span of all windows; "" if having no answer scores more.

    Having none scores as it does in the window where it scores least: a window beside the answer always has none.
    """
    nothing = min(float(window.starts[0] + window.ends[0]) for window in windows)
    spans = [span for window in windows if (span := best_span(window)) is not None]
    score, begin, end = max(spans, default=(-np.inf, 0, 0))
    return "" if nothing > score else context[begin:end]


def best_span(window: Window) -> tuple[float, int, int] | None:
    """Score, begin and end in the context's text; None if the window has nothing of the context."""
    inside = np.flatnonzero(window.places[:, 0] >= 0)
    starts = inside[np.argsort(-window.starts[inside], kind="stable")[:MOST_LIKELY]]
    ends = inside[np.argsort(-window.ends[inside], kind="stable")[:MOST_LIKELY]]
    spans = [
        (float(window.starts[first] + window.ends[last]), int(window.places[first, 0]), int(window.places[last, 1]))
        for first in starts
        for last in ends
        if first <= last < first + LONGEST
    ]
    return max(spans, default=None)


def find_tokens(places: Sequence[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """The first and last token of the text from `begin` to `end`; (0, 0), no answer, if it is not all in the window."""
    inside = [token for token, place in enumerate(places) if tuple(place) != OUTSIDE]
    if not inside or places[inside[0]][0] > begin or places[inside[-1]][1] < end:
        return 0, 0
    touched = [token for token in inside if places[token][0] < end and places[token][1] > begin]
    return (touched[0], touched[-1]) if touched else (0, 0)


def normalize(answer: str) -> str:
    """What answers are compared by: no case, punctuation, articles; single spaces."""
    answer = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def exact_match(answer: str, reference: str) -> float:
    return float(normalize(answer) == normalize(reference))


def word_f1(answer: str, reference: str) -> float:
    """F1 of the words that both have; of answers without words, whether both have none."""
    given, wanted = normalize(answer).split(), normalize(reference).split()
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted))


def score_answers(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over all questions, and over those with and without an answer; the best of several references counts."""
    rows = []
    for answer, texts in zip(answers, references, strict=True):
        wanted = [text for text in texts if normalize(text)] or [""]
        exact = max(exact_match(answer, text) for text in wanted)
        rows.append((exact, max(word_f1(answer, text) for text in wanted), wanted != [""]))
    exacts, f1s, answerable = (np.array(column) for column in zip(*rows, strict=True))
    scores = {"exact_match": exacts.mean(), "f1": f1s.mean()}
    if answerable.any():
        scores |= {"answerable_exact_match": exacts[answerable].mean(), "answerable_f1": f1s[answerable].mean()}
    if not answerable.all():
        scores |= {"unanswerable_accuracy": exacts[~answerable].mean()}
    return {name: float(value) for name, value in scores.items()}
