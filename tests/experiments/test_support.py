"""Files of rows, and the forecast of a series of tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.models.update_sets import corner
from experiments.ranks_and_pools import COLUMNS, KEY
from experiments.support.rows import Table, append_rows, read_rows
from experiments.support.timing import percents
from rasa_theory import LayerStack


def test_rows_of_one_call_are_in_the_file_together_and_the_header_once(tmp_path: Path) -> None:
    for name in ("x.csv", "x.jsonl"):
        path = tmp_path / "new" / name
        for first in (0, 2):
            append_rows(path, [{"n": first, "text": "a,b"}, {"n": first + 1, "text": None}], ("n", "text"))
        assert [row["n"] for row in read_rows(path)] == [0, 1, 2, 3]
        assert [row["text"] for row in read_rows(path)] == ["a,b", None, "a,b", None]


def test_a_line_that_was_cut_off_goes_and_other_columns_are_refused(tmp_path: Path) -> None:
    for name, line in (("x.csv", b"5,wo"), ("x.jsonl", b'{"n":5,"te')):
        path = tmp_path / name
        append_rows(path, [{"n": 1, "text": "a"}], ("n", "text"))
        with path.open("ab") as file:
            file.write(line)
        append_rows(path, [{"n": 2, "text": "b"}], ("n", "text"))
        assert [(row["n"], row["text"]) for row in read_rows(path)] == [(1, "a"), (2, "b")]
    with pytest.raises(ValueError, match="has the columns n,text, not n,other"):
        append_rows(tmp_path / "x.csv", [{"n": 3, "other": 4}], ("n", "other"))
    assert len(read_rows(tmp_path / "x.csv")) == 2


def test_percents_of_tasks_without_weight() -> None:
    assert percents([1, 2, 1]) == [0, 25, 75]
    assert percents([0, 0]) == [0, 0]


def test_rows_of_another_effort_or_of_a_corner_are_other_rows(tmp_path: Path) -> None:
    table = Table(tmp_path / "x.csv", COLUMNS, KEY)
    row = {"model": "m", "stack": "query", "r": 8, "k": 1, "effort": "quick"}
    table.add([row])
    assert row in table
    assert row | {"effort": "default"} not in table
    stack = LayerStack([[[float(i == j) for j in range(4)] for i in range(4)]] * 3, "query")
    ((name, small),) = corner({"query": stack}, 2, 3).items()
    assert name == small.name == "query (corner)"
    assert row | {"stack": name} not in table
