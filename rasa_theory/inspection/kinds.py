"""The stacks of an inspection by kind of module: those together whose names differ in numbers alone (experts)."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rasa_theory.common import unique_labels

Row = Mapping[str, Any]
Key = tuple[str, str, tuple[int, ...]]
"""What the stacks of one kind have in common: kind and name without numbers, and shape."""


def key_of(stack: Row) -> Key:
    """The key of a stack, which has `kind`, `name` and `shape`."""
    name = stack["name"].replace(".weight", "")
    return _without_numbers(stack["kind"]), _without_numbers(name), tuple(stack["shape"])


def labels_of(keys: Iterable[Key]) -> dict[Key, str]:
    """The names of the kinds. In different parts of a model, such as encoder and decoder, they are told apart."""
    keys = list(keys)
    return dict(zip(keys, unique_labels([key[0] for key in keys], [key[1] for key in keys]), strict=True))


def kinds(stacks: Sequence[Row]) -> list[dict[str, Any]]:
    """The stacks of a report by kind.

    Energies are shares of the squared norm of the whole kind. Shared subspaces are means over its stacks.
    """
    together: dict[Key, list[Row]] = {}
    for row in stacks:
        together.setdefault(key_of(row), []).append(row)
    labels = labels_of(together)
    return [kind_of(labels[key], rows) for key, rows in together.items()]


def kind_of(label: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The facts of a kind, from the rows of all its stacks."""
    norm = math.fsum(row["norm_squared"] for row in rows)
    bases = [row["base_norm_squared"] for row in rows]
    changed = [row for row in rows if row["norm_squared"] > 0]
    return {
        "kind": label,
        "shape": rows[0]["shape"],
        "norm_squared": norm,
        "base_norm_squared": None if None in bases else math.fsum(bases),
        "energy": [
            [math.fsum(row["norm_squared"] / norm * row["energy"][n][bound] for row in changed) for bound in (0, 1)]
            for n in range(len(changed[0]["energy"]) if changed else 0)
        ],
        "columns": _mean_overlap(rows, "columns"),
        "rows": _mean_overlap(rows, "rows"),
        "modules": [module for row in rows for module in row["modules"]],
    }


def _without_numbers(name: str) -> str:
    """The name with a star for each number that is a component of its own, as those of experts and layers are."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _mean_overlap(rows: Sequence[Row], side: str) -> float | None:
    overlaps = [row["shared"][side]["overlap"] for row in rows if row["shared"][side] is not None]
    return statistics.fmean(overlaps) if overlaps else None
