"""Answers to questions: which span is chosen, and its scores, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from examples.recipes import answers


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1"),
    [
        ("The Beatles!", "beatles", 1, 1),
        ("a  cat-fish", "Catfish", 1, 1),
        ("in the year 1990", "1990", 0, 0.5),  # in, year, 1990: precision 1/3, recall 1
        ("paul paul", "paul mc", 0, 0.5),  # one of two, of two
        ("", "paul", 0, 0),
        ("the", "", 1, 1),  # an article alone is no answer
        ("", "", 1, 1),
    ],
)
def test_scores_of_an_answer(answer, reference, exact, f1):
    assert answers.exact_match(answer, reference) == exact
    assert answers.word_f1(answer, reference) == pytest.approx(f1)


def test_scores_of_answers():
    """The best reference counts; answers to questions that have none count as none."""
    given = ["john lennon", "in 1990", "", "paul"]
    references = [["lennon", "John Lennon"], ["1990"], [], []]
    assert answers.score_answers(given, references) == pytest.approx(
        {
            "exact_match": 0.5,
            "f1": (1 + 2 / 3 + 1 + 0) / 4,
            "answerable_exact_match": 0.5,
            "answerable_f1": (1 + 2 / 3) / 2,
            "unanswerable_accuracy": 0.5,
        }
    )


CONTEXT = "maria wrote the song"
# [CLS] who [SEP] maria wrote the song [SEP]
PLACES = np.array([(-1, -1)] * 3 + [(0, 5), (6, 11), (12, 15), (16, 20)] + [(-1, -1)])


def window(starts: dict[int, float], ends: dict[int, float]) -> answers.Window:
    """Logits that are 0 where nothing is said."""
    logits = np.zeros((2, len(PLACES)))
    for row, values in zip(logits, (starts, ends), strict=True):
        row[list(values)] = list(values.values())
    return answers.Window(*logits, PLACES)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([window({3: 5}, {4: 5})], "maria wrote"),
        ([window({3: 5, 0: 6}, {4: 5, 0: 6})], ""),  # 12 for no answer, 10 for the span
        ([window({3: 5, 0: 6}, {4: 5, 0: 6}), window({6: 3}, {6: 2})], "maria wrote"),  # the second has 0 for none
        ([window({6: 5, 3: 4}, {3: 5})], "maria"),  # a span does not end before it begins
        ([window({1: 9, 3: 1}, {2: 9, 3: 1})], "maria"),  # nor lies in the question
    ],
)
def test_the_answer_is_the_best_span_of_all_windows(windows, expected):
    assert answers.find_answer(CONTEXT, windows) == expected


def test_an_answer_is_not_too_long():
    places = np.array([(-1, -1)] + [(2 * i, 2 * i + 1) for i in range(40)])
    starts, ends = np.zeros(41), np.zeros(41)
    starts[1], ends[31], ends[30] = 5, 5, 4  # 31 tokens; 30 tokens
    assert answers.best_span(answers.Window(starts, ends, places)) == (9, 0, 59)


@pytest.mark.parametrize(
    ("begin", "end", "tokens"),
    [
        (0, 5, (3, 3)),
        (6, 20, (4, 6)),
        (7, 9, (4, 4)),  # a part of a token
        (6, 30, (0, 0)),  # ends behind the window
        (11, 12, (0, 0)),  # between tokens
    ],
)
def test_tokens_of_an_answer(begin, end, tokens):
    assert answers.find_tokens([tuple(place) for place in PLACES.tolist()], begin, end) == tokens


def test_an_answer_that_begins_before_the_window_is_not_in_it():
    assert answers.find_tokens([(-1, -1), (6, 11), (12, 15)], 0, 11) == (0, 0)
    assert answers.find_tokens([(-1, -1)], 0, 5) == (0, 0)
