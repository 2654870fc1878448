"""Tables as text: aligned columns for the eye, CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rasa_theory.common.labels import shortened


def aligned(
    rows: Sequence[Sequence[str]], left: Collection[int] | None = None, gap: str = "  ", width: int | None = None
) -> list[str]:
    """Lines of a table: the first row, a rule, then the other rows, in columns of equal width.

    Columns whose index is in `left` are flush left (None: all), the others flush right. Where lines would be longer
    than `width`, the cells of the first column are `shortened`. Lines stay longer if those would be alike otherwise.
    """
    columns = [list(column) for column in zip(*rows, strict=True)]
    if width is not None:
        rest = sum(max(map(len, column)) for column in columns[1:])
        columns[0] = shortened(columns[0], width - rest - len(gap) * (len(columns) - 1))
    sides = [str.ljust if left is None or i in left else str.rjust for i in range(len(columns))]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        gap.join(side(cell, w) for side, cell, w in zip(sides, row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The rows as CSV under a line of column names; None becomes an empty cell, a float all of its digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
