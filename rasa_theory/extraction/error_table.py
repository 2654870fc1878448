"""The table of an extraction: a row for every stack, made when the stack is finished, and one for their sum."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rasa_theory.common import WIDTH, TextTable, columns_of, shortened, unique_labels

_OF_POOL = ("k", "gain", "limit")
_RELATIVE, _SHARE, _PER_CENT = (len(text) for text in ("1.2e-05", "0.1234", "100.0"))


class ErrorTable:
    """The table of an extraction whose format has ranks, made row by row.

    Where names are too long for `width`, the components that all begin with are left out (`prefix`), and then their
    beginnings. Lines are longer only where names would be alike otherwise, or the numbers alone are.

    - stacks: kind, name, layers and shape of all stacks, as in their rows.
    - rank: the rank budget r of a layer; None if layers differ in rank.
    - has_pool: whether there are columns for k, gain and limit.
    """

    def __init__(
        self, stacks: Sequence[Mapping[str, Any]], rank: int | None, has_pool: bool, width: int = WIDTH
    ) -> None:
        narrow = max(min(stack["shape"]) for stack in stacks)
        widths = {
            "L": max(len(str(stack["layers"])) for stack in stacks),
            "shape": max(len(shape_text(stack)) for stack in stacks),
            "rel": _RELATIVE,
            "r": len(f"{narrow}..{narrow}" if rank is None else str(rank)),
            "k": len(str(narrow if rank is None else rank)),
            "LoRA": _SHARE,
            "gain": _PER_CENT,
            "limit": _PER_CENT,
            "file": _SHARE,
            "90%": len(str(narrow)),
        }
        self._columns = [name for name in widths if has_pool or name not in _OF_POOL]
        numbers = [widths[name] for name in self._columns]
        room = width - TextTable(self._columns, numbers, gap=1).width - 1
        labels = kind_labels(stacks)
        self.prefix = _common_prefix(labels) if max(map(columns_of, labels)) > room else ""
        labels = shortened([label.removeprefix(self.prefix) for label in labels], room)
        self._label_of = dict(zip((stack["name"] for stack in stacks), labels, strict=True))
        self._table = TextTable(("kind", *self._columns), (max(map(columns_of, labels)), *numbers), {0}, gap=1)

    def head(self) -> list[str]:
        """The names of the columns, and a rule below."""
        return self._table.head()

    def rows(self, row: Mapping[str, Any]) -> list[str]:
        """The lines of a stack; none where nothing has changed."""
        if row["norm_squared"] == 0:
            return []
        ranks = [module["rank_90"] for module in row["modules"]]
        return self._line(
            self._label_of[row["name"]],
            _errors(row)
            | {
                "L": str(row["layers"]),
                "shape": shape_text(row),
                "rel": relative_text(row),
                "r": _ranks(row),
                "k": str(row["k"]),
                "limit": "-" if row["k"] == 0 else _less(row["lower_bound"], row["e_lora"]),
                "90%": "-" if None in ranks else str(int(statistics.median_low(ranks))),
            },
        )

    def total(self, report: Mapping[str, Any]) -> list[str]:
        """The line of the sums of all stacks; its `rel` is that of all tensors."""
        k = max(row["k"] for row in report["stacks"])
        return self._line("all", _errors(totals(report["stacks"]) | {"k": k}) | {"rel": relative_text(report)})

    def _line(self, label: str, cells: Mapping[str, str]) -> list[str]:
        return self._table.row((label, *(cells.get(name, "") for name in self._columns)))


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Squared norms and squared errors, summed over the rows of stacks; None for those that format diff has not."""
    sums: dict[str, Any] = {}
    for key in ("norm_squared", "e_lora", "e_rasa", "e_stored"):
        values = [row[key] for row in rows]
        sums[key] = None if None in values else math.fsum(values)
    return sums


def kind_labels(stacks: Sequence[Mapping[str, Any]]) -> list[str]:
    """The kinds of the stacks, and what tells them apart where two are of one kind."""
    return unique_labels(
        [stack["kind"] for stack in stacks], [stack["name"].replace(".weight", "") for stack in stacks]
    )


def shape_text(stack: Mapping[str, Any]) -> str:
    """The shape of the layers, as 4096x1024."""
    return "{}x{}".format(*stack["shape"])


def relative_text(row: Mapping[str, Any]) -> str:
    """The norm of the update divided by that of the weights before, as text."""
    relative = row.get("relative_norm")
    return "-" if relative is None else f"{relative:.2g}"


def ratio_text(x: float | None, y: float | None) -> str:
    """x / y with four decimals; "-" where it is not known."""
    return f"{x / y:.4f}" if x is not None and y else "-"


def _common_prefix(kinds: Sequence[str]) -> str:
    """The leading components that all kinds share, each with its dot; the last component is never one."""
    columns = zip(*(kind.split(".")[:-1] for kind in kinds), strict=False)
    return "".join(f"{column[0]}." for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _ranks(row: Mapping[str, Any]) -> str:
    """The rank of the layers, or their range."""
    if row["rank"] is not None:
        return str(row["rank"])
    ranks = [module["rank"] for module in row["modules"]]
    return f"{min(ranks)}..{max(ranks)}" if len(set(ranks)) > 1 else str(ranks[0])


def _errors(row: Mapping[str, Any]) -> dict[str, str]:
    """What LoRA and the file miss, as shares of ||M||^2, and RaSA's gain in per cent of LoRA's error."""
    return {
        "LoRA": ratio_text(row["e_lora"], row["norm_squared"]),
        "gain": "-" if row["k"] == 0 else _less(row["e_rasa"], row["e_lora"]),
        "file": ratio_text(row["e_stored"], row["norm_squared"]),
    }


def _less(x: float, y: float) -> str:
    """By how many per cent of y x is below y; "-" where y is 0."""
    return f"{100 * (1 - x / y):.1f}" if y else "-"
