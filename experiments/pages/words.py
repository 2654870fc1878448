"""Data of the figures folder, and numbers and tables as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from experiments.models.update_sets import FIRST_MODEL, MODEL_NAMES
from experiments.support.rows import Row, read_rows

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "figures"
KINDS = ("query", "key", "value", "attention_output")

Line = Sequence[str]


@cache
def rows(name: str) -> list[Row]:
    """The rows of a data file in figures/. Raises FileNotFoundError if there is no such file."""
    if not (FIGURES / name).exists():
        raise FileNotFoundError(f"figures/{name} is missing; `python -m experiments.figures --list` says what makes it")
    return read_rows(FIGURES / name)


@cache
def record(path: str) -> Any:
    """A JSON file, by its path in the repository."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def of_model(model: str, name: str, **where: Any) -> list[Row]:
    """The rows of a model whose columns have the given values. Raises ValueError if there are none."""
    if not (own := [row for row in by_model(rows(name)).get(model, []) if has(row, where)]):
        raise ValueError(f"figures/{name} has no rows of {model} with {where}")
    return own


def first_model(name: str, **where: Any) -> list[Row]:
    """The same for the first model."""
    return of_model(FIRST_MODEL, name, **where)


def second_model(name: str, **where: Any) -> list[Row]:
    """The same for mpnet, the larger model."""
    return of_model(MODEL_NAMES["mpnet"], name, **where)


def allocation_share(row: Row) -> float:
    """The share of the gain over LoRA that unequal allocation of ranks explains."""
    return float((1 - row["allocation"]) / (1 - row["best_found"]))


def has(row: Row, where: dict[str, Any]) -> bool:
    return all(row[key] == value for key, value in where.items())


def by_model(all_rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each model, the smaller model first. Rows without a model are of the first one."""
    groups: dict[str, list[Row]] = {model: [] for model in MODEL_NAMES.values()}
    for row in all_rows:
        groups.setdefault(row.get("model") or FIRST_MODEL, []).append(row)
    return {model: own for model, own in groups.items() if own}


def model_table(columns: Sequence[str], all_rows: Iterable[Row], lines: Callable[[list[Row]], Iterable[Line]]) -> str:
    """A table with the lines of every model. The model is its first column where there are several."""
    groups = by_model(all_rows)
    if len(groups) == 1:
        return table(columns, [line for own in groups.values() for line in lines(own)])
    return table(["model", *columns], [[model, *line] for model, own in groups.items() for line in lines(own)])


def table(columns: Sequence[str], lines: Iterable[Line]) -> str:
    """A Markdown table; all columns but the first are aligned right. Raises ValueError for a line of another length."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [columns, rule, *checked(columns, lines)])


def checked(columns: Sequence[str], lines: Iterable[Line]) -> Iterable[Line]:
    for line in lines:
        if len(line) != len(columns):
            raise ValueError(f"{len(line)} cells for {len(columns)} columns: {line}")
        yield line


def spelled(stack: str) -> str:
    """The name of a stack as prose writes it."""
    return stack.replace("_", " ")


def percent(share: float, digits: int = 2) -> str:
    return percents([share], digits)


def span(values: Iterable[float], form: str = ".0f", unit: str = "") -> str:
    """The least and the largest of some values, such as `56 to 89 %`; one number where both look the same."""
    numbers = list(values)
    low, high = (re.sub(r"^-(?=[0.]*$)", "", f"{number:{form}}") for number in (min(numbers), max(numbers)))  # no -0
    return (low if low == high else f"{low} to {high}") + unit


def percents(shares: Iterable[float], digits: int = 2) -> str:
    """The least and the largest share, in per cent."""
    return span((100 * share for share in shares), f".{digits}f", " %")


def signed(interval: tuple[float, float], digits: int = 4) -> str:
    """A mean difference with half its interval, such as `-0.0006 ± 0.0077`."""
    return f"{interval[0]:+.{digits}f} ± {interval[1]:.{digits}f}"


def plus_minus(row: Row, key: str, digits: int = 4) -> str:
    """The same from a row with both."""
    return signed((row[key], row[f"{key}_interval"]), digits)


def one(all_rows: Iterable[Row], **where: Any) -> Row:
    """The single row with these values. Raises ValueError if there are none or several."""
    found = [row for row in all_rows if has(row, where)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows with {where}")
    return found[0]


def kinds_of(all_rows: Iterable[Row]) -> list[str]:
    """The stacks of some rows: those of the bundled updates first, in their order."""
    names = dict.fromkeys(row["stack"] for row in all_rows)
    return [*(kind for kind in KINDS if kind in names), *(name for name in names if name not in KINDS)]
