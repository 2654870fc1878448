"""Tables: columns line up, and CSV gives the same values back."""

from __future__ import annotations

import csv

from rasa_theory.common import aligned, csv_text

ROWS = [("name", "n", "what"), ("a", "10", "x"), ("longest", "7", "y y")]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert aligned(ROWS) == [
        "name     n   what",
        "-----------------",
        "a        10  x",
        "longest  7   y y",
    ]
    assert aligned(ROWS, left=(0, 2), gap=1) == [
        "name     n what",
        "---------------",
        "a       10 x",
        "longest  7 y y",
    ]


def test_the_first_column_gives_way_where_lines_would_be_too_long() -> None:
    assert aligned(ROWS, width=15) == [
        "name   n   what",
        "---------------",
        "a      10  x",
        "..est  7   y y",
    ]
    assert aligned(ROWS, width=17) == aligned(ROWS) == aligned(ROWS, width=100)


def test_csv_keeps_every_digit_and_leaves_out_what_is_none() -> None:
    text = csv_text(("a", "b"), [(0.1 + 0.2, None), ("x, y", 1e-300)])
    assert text == 'a,b\n0.30000000000000004,\n"x, y",1e-300\n'
    assert [row["a"] for row in csv.DictReader(text.splitlines())] == [repr(0.1 + 0.2), "x, y"]


def test_names_in_wide_characters_stay_on_one_line() -> None:
    """An East Asian character takes two columns of a terminal."""
    rows = [("name", "L"), ("layers.*.注意力", "4"), ("layers.*.q", "12")]
    assert aligned(rows, left={0})[2] == "layers.*.注意力   4"
    assert aligned(rows, left={0}, width=16)[2] == "..s.*.注意力   4"
