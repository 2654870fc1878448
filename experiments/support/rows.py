"""Rows of results in files: CSV, a JSON object per line (`.jsonl`), or a JSON list of records (`.json`)."""

from __future__ import annotations

import csv
import fcntl
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rasa_theory.common import InputError, csv_text, write_file

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, in order; an empty list if there is no file.

    Numbers of a CSV file become int or float, empty fields become None. Raises InputError for a `.jsonl` file with a
    line that is no JSON.
    """
    if not path.exists():
        return []
    if path.suffix == ".jsonl":
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except json.JSONDecodeError as error:
            raise InputError(f"{path} has a line that is no JSON: {error}") from None
    if path.suffix == ".json":
        return list(json.loads(path.read_text(encoding="utf-8"))["records"])
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def of_models(rows: Iterable[Row], *models: str) -> list[Row]:
    """The rows of some models, and those that belong to no model."""
    return [row for row in rows if (row.get("model") or models[0]) in models]


def _value(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text or None


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write a new CSV file of these rows, and the folder if it is missing. A column that a row lacks stays empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_csv(columns, rows), encoding="utf-8")


def append_rows(path: Path, rows: Iterable[Row], columns: Sequence[str] = ()) -> None:
    """Add rows to a CSV file of these columns, or to a `.jsonl` file; processes that share the file take turns.

    A new CSV file begins with its header. A line that a killed process has left unfinished goes. The folder is made if
    it is missing. Raises ValueError if a CSV file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        present = file.read()
        whole = present[: present.rfind(b"\n") + 1]
        file.truncate(len(whole))
        if path.suffix == ".jsonl":
            text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        else:
            header, _, lines = _csv(columns, rows).partition("\n")
            if whole and (there := whole.decode().partition("\n")[0]) != header:
                raise ValueError(f"{path} has the columns {there}, not {header}")
            text = lines if whole else f"{header}\n{lines}"
        file.write(text.encode())


def _csv(columns: Sequence[str], rows: Iterable[Row]) -> str:
    return csv_text(columns, [[row.get(column) for column in columns] for row in rows])


def put_record(path: Path, record: Row, name: Callable[[Row], str]) -> None:
    """Add a record to a `.json` file in place of an earlier one of its name; the file is never half written."""
    records = [*(other for other in read_rows(path) if name(other) != name(record)), record]
    text = json.dumps({"records": records}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda file: file.write(text.encode()))


class Table:
    """A CSV file that grows row by row, so that an interrupted run takes up its work where it stopped.

    `columns` are the file's, `key` the columns that tell rows apart. Rows that the file has already are read first.
    """

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str]) -> None:
        self.path, self.columns, self._key = path, columns, key
        self.rows = read_rows(path)
        self._done = {self._identity(row) for row in self.rows}

    def __contains__(self, row: Row) -> bool:
        """Whether a row of the same key is in the file."""
        return self._identity(row) in self._done

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows to the file; `rows` holds them as they would be read from it."""
        append_rows(self.path, rows, self.columns)
        for row in rows:
            self.rows.append({name: _value(_text(row.get(name))) for name in self.columns})
            self._done.add(self._identity(row))

    def _identity(self, row: Row) -> tuple[Any, ...]:
        """The key as it would be read, so that 0.5, "0.5" and numpy's 0.5 are one."""
        return tuple(_value(_text(row[name])) for name in self._key)


def _text(value: Any) -> str:
    return "" if value is None else str(value)
