"""The report as text: it fits 100 columns whatever the names, its parts add up, and nothing is hidden in silence."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimfit_fx.graph.plan import GatedGradient, Plan, SavedTensor
from slimfit_fx.inspection.gradient_difference import GradientDifference
from slimfit_fx.inspection.report import Report
from slimfit_fx.inspection.text import few, shortened
from slimfit_fx.model.layers import Layer
from slimfit_fx.module_paths import numbered_block
from slimfit_fx.roles import ROLES
from slimfit_fx.sizes import size_text

BYTES = ("bytes", "bytes_stored", "bytes_now")
NAME = st.text("abcxyz_|é\n\u2028 ", min_size=1, max_size=90).filter(str.strip)
PATH = st.lists(st.one_of(NAME, st.integers(0, 30).map(str)), max_size=8).map(".".join)


@st.composite
def reports(draw):
    names = draw(st.lists(PATH.map(lambda path: path + ".weight"), min_size=1, max_size=12, unique=True))
    layers = [Layer(name, (name,), always_open=draw(st.booleans())) for name in names]
    gate = st.integers(0, len(layers) - 1)
    tensors = [
        SavedTensor(
            f"saved_{i}",
            draw(PATH),
            draw(st.sampled_from([*ROLES, "a role of one's own " * 9])),
            tuple(draw(st.lists(st.one_of(st.integers(0, 10**9), st.just("s0 * (s1 // 2)")), max_size=6))),
            "float32",
            tuple(sorted(draw(st.sets(gate, max_size=2)))),
            draw(st.integers(0, 2**45)),
            stored=draw(st.integers(0, 2**45)),
            form=draw(st.one_of(st.just(""), st.just("int8, group 128"), NAME)),
        )
        for i in range(draw(st.integers(0, 30)))
    ]
    gradients = [GatedGradient(i, i, draw(st.booleans())) for i in range(len(layers))]
    errors = {name: GradientDifference(0.5, draw(st.floats(0, 1e9))) for name in draw(st.sets(PATH, max_size=12))}
    return Report(
        Plan(tensors, gradients),
        layers,
        draw(st.lists(st.booleans(), min_size=len(layers), max_size=len(layers))),
        errors,
        draw(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40))),
        draw(st.lists(PATH.filter(bool), max_size=9)),
    )


@given(reports())
def test_it_fits_the_screen_and_its_parts_add_up(report):
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) <= 75
    whole = {column: sum(row[column] for row in report.rows) for column in BYTES}
    assert (whole["bytes"], whole["bytes_now"]) == (report.saved_bytes_before, report.saved_bytes_after)
    for totals in (report.by_role(), report.by_block()):
        assert {column: sum(total[column] for total in totals) for column in BYTES} == whole
        assert sum(total["tensors"] for total in totals) == len(report.rows)
    if report.saved_bytes_before or report.saved_bytes_after:
        assert f"{size_text(report.saved_bytes_after)} are saved" in " ".join(text.split())


def tensor(module: str, role: str = "norm input", nbytes: int = 2**20, stored: int = -1, gates=()) -> SavedTensor:
    return SavedTensor(f"t{module}{role}", module, role, (nbytes // 4,), "float32", gates, nbytes, stored=stored)


def numbers(table: str) -> dict[str, list[float]]:
    """MiB in the lines of a table, by first cell."""
    found = {}
    for line in table.splitlines()[2:]:
        cells = re.split(r" {2,}", line)
        found[cells[0]] = [float(cell.split()[0]) for cell in cells if re.fullmatch(r"[\d.]+ (MiB|B)", cell)]
    return found


@pytest.mark.parametrize("blocks", [1, 8, 9, 40])
def test_printed_totals_are_the_sums_of_the_lines(blocks):
    """Also where there are more blocks and roles than lines."""
    roles = list(ROLES)
    saved = [tensor(f"encoder.layer.{i}.dense", roles[i % len(roles)], (i + 1) * 2**20, 2**20) for i in range(blocks)]
    report = Report(Plan([*saved, tensor("head", nbytes=3 * 2**20)]), [], [])
    by_role, by_block = map(numbers, str(report).split("\n\n")[:2])
    total = by_role.pop("total")
    assert total == [
        report.saved_bytes_before / 2**20,
        report.saved_bytes_after / 2**20,
        report.saved_bytes_after / 2**20,
    ]
    for table in (by_role, by_block):
        assert len(table) <= 10
        assert [sum(column) for column in zip(*table.values(), strict=True)] == total
    assert by_block["beside them"] == [3, 3, 3]
    assert (f"{blocks - 8} more blocks" in by_block) == (blocks > 8)


def test_the_conclusion_is_two_sentences():
    layers = [Layer("a.weight", ("a.weight",)), Layer("b.weight", ("b.weight",))]
    saved = [
        tensor("a", "activation input", 8 * 2**20, 2 * 2**20),
        tensor("a", "statistics", 2**20),
        tensor("b", "dropout mask", 8 * 2**20, 2**20),
        tensor("b", "linear input", 4 * 2**20, gates=(0, 1)),
        tensor("b", "other", 2**19),
    ]
    report = Report(Plan(saved), layers, [False, False])
    text = " ".join(str(report).split())
    assert (
        "4.5 MiB are saved instead of 21.5 MiB (1/4.8): 2.0 MiB activation inputs, 1.0 MiB statistics, 1.0 MiB dropout "
        "masks, 512.0 KiB of other roles. Codecs and rebuilding account for 13.0 MiB of the difference, the 2 closed "
        "layers (of 2) for 4.0 MiB."
    ) in text
    larger = Report(Plan([tensor("a", stored=2**21)]), layers, [True, True])
    assert "2.0 MiB are saved instead of 1.0 MiB (2.00x)" in str(larger)
    assert "rebuilding account for -1.0 MiB" in " ".join(str(larger).split())
    assert "1.0 MiB are saved, as much as without slimfit_fx" in str(Report(Plan([tensor("a")]), [], []))
    assert "Nothing is saved for the backward." in str(Report(Plan(), layers, [True, False]))


def test_the_largest_ten_are_those_that_take_most_now():
    gated = [tensor(f"a.{i}", nbytes=2**30, gates=(0,)) for i in range(12)]
    kept = [tensor(f"b.{i}", nbytes=(i + 1) * 2**10) for i in range(12)]
    report = Report(Plan([*gated, *kept]), [Layer("w", ("w",))], [False])
    assert [row["module"] for row in report.largest()] == [f"b.{i}" for i in range(11, 1, -1)]
    assert len(report.largest(3)) == 3


def test_what_is_shortened_is_in_the_full_table():
    path = "model." + "a_long_name_of_a_module." * 6 + "layer.3.attention"
    layers = [Layer(f"{path}.{i}.weight", ("w",), always_open=True) for i in range(5)]
    report = Report(Plan([tensor(path)]), layers, [True] * 5)
    text = str(report)
    assert path not in text
    assert "..." in text
    assert "report.table()" in text
    assert "and 2 more." in " ".join(text.split())
    for full in (report.table(), report.to_markdown()):
        assert path in full
        assert all(layer.name in full for layer in layers)


def test_markdown():
    error = {"a.weight": GradientDifference(0.99, 0.125)}
    report = Report(Plan([tensor("a|b"), tensor("c")]), [Layer("a.weight", ("a.weight",))], [True], error, (2048, 0))
    lines = report.to_markdown().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert r"a\|b" in rows[2]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows[:4]} == {11}
    assert any(re.fullmatch(r"\| a.weight +\| +0.9900 \| +0.1250 \|", row) for row in rows)
    assert "Optimizer states of layers: 2.0 KiB." in lines


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("bert.encoder.layer.3.attention.self", "bert.encoder.layer.3"),
        ("encoder.layer.11", "encoder.layer.11"),
        ("decoder.block.2.layer.0.SelfAttention", "decoder.block.2"),
        ("0.auto_model.encoder.layer.5.output", "0.auto_model.encoder.layer.5"),
        ("7", "7"),
        ("7.norm", "7"),
        ("bert.pooler", ""),
        ("layer3.conv2", ""),
        ("", ""),
    ],
)
def test_the_block_of_a_path(path, block):
    assert numbered_block(path) == block


def test_shortened_names_keep_both_ends():
    assert shortened("short", 8) == "short"
    assert shortened("encoder.layer.3.attention", 13) == "enc...tention"
    assert all(len(shortened("x" * 50, width)) == width for width in range(4, 50))
    assert few(["a", "b"]) == "a, b"
    assert few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
