"""Tables as text: aligned columns for the eye, CSV for programs."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

from rasa_theory.common.labels import columns_of, shortened

WIDTH = 80
"""Characters of a line where no terminal says otherwise."""


class TextTable:
    """A table as plain text whose rows are made one by one, so that each can be printed as soon as it is known.

    Columns have fixed widths. A cell that is wider is folded, and the row takes several lines.

    - head: names of the columns; one may have several lines.
    - widths: characters of each column, or of its name if that is wider.
    - left: indices of the columns that are flush left (None: all), the others are flush right.
    - gap: spaces between columns.
    """

    def __init__(
        self, head: Sequence[str], widths: Sequence[int], left: Collection[int] | None = None, gap: int = 2
    ) -> None:
        self._head = head
        names = [max(map(columns_of, name.split("\n"))) for name in head]
        self._widths = [max(pair) for pair in zip(names, widths, strict=True)]
        self._left = range(len(head)) if left is None else left
        self._gap = gap

    @property
    def width(self) -> int:
        """Characters of a line."""
        return sum(self._widths) + self._gap * (len(self._widths) - 1)

    def head(self) -> list[str]:
        """The names of the columns, and a rule below."""
        return [*self._lines(self._head, "bottom"), "-" * self.width]

    def row(self, cells: Sequence[str]) -> list[str]:
        """The lines of a row."""
        return self._lines(cells, "top")

    def _lines(self, cells: Sequence[str], vertical: Literal["top", "bottom"]) -> list[str]:
        from rich.console import Console  # imported here, since the library itself prints no tables
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, self._gap))
        for i, width in enumerate(self._widths):
            side: Literal["left", "right"] = "left" if i in self._left else "right"
            grid.add_column(justify=side, width=width, vertical=vertical, overflow="fold")
        grid.add_row(*map(Text, cells))
        text = io.StringIO()
        console = Console(
            file=text, width=self.width, height=1, color_system=None, force_terminal=False, force_jupyter=False
        )
        console.print(grid)
        return [line.rstrip() for line in text.getvalue().splitlines()]


def aligned(
    rows: Sequence[Sequence[str]], left: Collection[int] | None = None, gap: int = 2, width: int | None = None
) -> list[str]:
    """Lines of a table: the first row, a rule, then the other rows, in columns of equal width.

    Columns whose index is in `left` are flush left (None: all), the others flush right. Where lines would be longer
    than `width`, the cells of the first column are `shortened`. Lines stay longer if those would be alike otherwise.
    """
    columns = [list(column) for column in zip(*rows, strict=True)]
    if width is not None:
        rest = sum(max(map(columns_of, column)) for column in columns[1:])
        columns[0] = shortened(columns[0], width - rest - gap * (len(columns) - 1))
    head, *body = zip(*columns, strict=True)
    table = TextTable(head, [max(map(columns_of, column)) for column in columns], left, gap)
    return [*table.head(), *(line for row in body for line in table.row(row))]


def wrapped(text: str, width: int = WIDTH, first: str = "", later: str = "") -> list[str]:
    """The text in lines of at most `width` characters, with these indents; names and paths stay whole."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The rows as CSV under a line of column names; None becomes an empty cell, a float all of its digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
