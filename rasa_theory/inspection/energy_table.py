"""The table of an inspection: a row for every kind of module, made when its last stack is measured."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rasa_theory.common import WIDTH, TextTable, columns_of, shortened
from rasa_theory.inspection.kinds import Key, Row, key_of, kind_of, labels_of

_RELATIVE, _STABLE, _PER_CENT = (len(text) for text in ("1.2e-05", "stable", "100"))
_WHOLE = 1 - 1e-9  # a share from here on is printed as 100 %: the rest is rounding


class EnergyTable:
    """The table of an inspection, made row by row: norms, the energy at several ranks, and what layers share.

    Where names are too long for `width`, they lose their beginnings; lines are longer only where names would be alike
    otherwise, or the numbers alone are.

    - stacks: kind, name, layers and shape of all stacks, as in their rows.
    - ranks: the ranks that have columns.
    """

    def __init__(self, stacks: Sequence[Row], ranks: Sequence[int], width: int = WIDTH) -> None:
        layers: Counter[Key] = Counter()
        for stack in stacks:
            layers[key_of(stack)] += stack["layers"]
        self._missing = Counter(map(key_of, stacks))
        self._rows: dict[Key, list[Row]] = {key: [] for key in layers}
        columns = {
            "L": max(len(str(count)) for count in layers.values()),
            "shape": max(len(_shape(shape)) for _, _, shape in layers),
            "rel": _RELATIVE,
            "stable": _STABLE,
            **dict.fromkeys(map(str, ranks), _PER_CENT),
            "col": _PER_CENT,
            "row": _PER_CENT,
        }
        room = width - TextTable(list(columns), list(columns.values()), gap=1).width - 1
        labels = shortened(list(labels_of(layers).values()), room)
        self._label_of = dict(zip(layers, labels, strict=True))
        self._table = TextTable(("kind", *columns), (max(map(columns_of, labels)), *columns.values()), {0}, gap=1)

    def head(self) -> list[str]:
        """The names of the columns, and a rule below."""
        return self._table.head()

    def rows(self, row: Row) -> list[str]:
        """The line of a kind, if the row of this stack was the last that it lacked; none if it has not changed."""
        key = key_of(row)
        self._rows[key].append(row)
        self._missing[key] -= 1
        if self._missing[key]:
            return []
        kind = kind_of(self._label_of[key], self._rows[key])
        if not kind["norm_squared"]:
            return []
        return self._table.row(
            (
                kind["kind"], str(len(kind["modules"])), _shape(kind["shape"]), _relative(kind),
                _stable(kind["modules"]), *(_per_cent(low) for low, _ in kind["energy"]),
                _signed_per_cent(kind["columns"]), _signed_per_cent(kind["rows"]),
            )
        )  # fmt: skip


def _shape(shape: Sequence[int]) -> str:
    return "{}x{}".format(*shape)


def _relative(kind: Mapping[str, Any]) -> str:
    base = kind["base_norm_squared"]
    return f"{math.sqrt(kind['norm_squared'] / base):.2g}" if base else "-"


def _stable(modules: Iterable[Row]) -> str:
    """The median of the stable ranks, each the geometric mean of its bounds."""
    ranks = [math.sqrt(math.prod(module["stable_rank"])) for module in modules if module["stable_rank"] is not None]
    median = statistics.median(ranks)
    return f"{median:.3g}" if median < 999.5 else f"{median:.0f}"


def _per_cent(share: float) -> str:
    """A share in whole per cent, rounded down, as it is a lower bound."""
    return "100" if share >= _WHOLE else str(math.floor(100 * share))


def _signed_per_cent(share: float | None) -> str:
    return "-" if share is None else str(round(100 * share))
