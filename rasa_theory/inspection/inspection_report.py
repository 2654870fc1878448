"""The report of an inspection as plain data, from the rows of its stacks: data/inspect.schema.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rasa_theory.formats import layer_span
from rasa_theory.inspection.inspect_settings import FAILURE, InspectSettings, RankGoal
from rasa_theory.inspection.measurement import Row
from rasa_theory.inspection.rank_choice import FileEnergies, StackEnergies, curve, recommend
from rasa_theory.sources import Norms, pair_warning

_KINDS_SHOWN = 3
_DIGITS = 3  # of the number of a layer: the heat map has a column for each


def inspection_report(
    rows: Sequence[Row], settings: InspectSettings, goal: RankGoal | None, itemsize: int
) -> dict[str, Any]:
    """The report: every stack and module at the ranks of `settings`, error against rank, and the recommended ranks.

    Errors and energies are shares of the squared norm of the updates, as pairs of bounds. `itemsize`: the bytes of a
    parameter in the adapter.
    """
    changed = FileEnergies(tuple(StackEnergies.of(row) for row in rows if any(row["norms_squared"])))
    norm = changed.norm_squared
    is_pair = all(row["base_norms_squared"] is not None for row in rows)
    base = math.fsum(base for row in rows for base in row["base_norms_squared"]) if is_pair else None
    return {
        "schema": 1,
        "ranks": list(settings.ranks),
        "failure": FAILURE,
        "itemsize": itemsize,
        "norm_squared": norm,
        "base_norm_squared": base,
        "relative_norm": _relative(norm, base),
        "curve": curve(changed, range(1, settings.rank + 1), itemsize) if norm > 0 else [],
        "recommendation": None if goal is None or norm == 0 else recommend(changed, goal, settings.rank, itemsize),
        "stacks": [stack_row(row, settings.ranks) for row in rows],
    }


def stack_row(row: Row, ranks: Sequence[int]) -> dict[str, Any]:
    """The part of the report on one stack, at these ranks, from the row of its measurement."""
    norms, bases = row["norms_squared"], row["base_norms_squared"] or [None] * len(row["norms_squared"])
    layers = zip(row["modules"], norms, bases, row["low"], row["high"], strict=True)
    low, high = ([math.fsum(column) for column in zip(*row[key], strict=True)] for key in ("low", "high"))
    base = None if row["base_norms_squared"] is None else math.fsum(bases)
    return {
        "name": row["name"],
        "kind": row["kind"],
        "layers": len(norms),
        "shape": row["shape"],
        "decomposed": row["decomposed"],
        **_facts(math.fsum(norms), base, low, high, ranks),
        "rounding": row["rounding"],
        "shared": row["shared"],
        "modules": [
            {
                "module": name,
                "layer": layer_number(name, i),
                **_facts(norm, base, low, high, ranks),
                "stable_rank": _stable_rank(norm, low, high),
            }
            for i, (name, norm, base, low, high) in enumerate(layers)
        ],
    }


def layer_number(module: str, i: int) -> int:
    """The number of the layer in the name of a module; its place i in the stack where there is none, or a huge one."""
    span = layer_span(module)
    digits = "" if span is None else module[slice(*span)]
    return int(digits) if 0 < len(digits) <= _DIGITS else i


def _facts(
    norm: float, base: float | None, low: Sequence[float], high: Sequence[float], ranks: Sequence[int]
) -> dict[str, Any]:
    """Norms, and the shares of the energy that the ranks hold; none of a matrix of zeros."""
    last = len(low) - 1  # a rank above holds as much: it takes the matrix whole
    energy = [[low[min(rank - 1, last)] / norm, high[min(rank - 1, last)] / norm] for rank in ranks] if norm else None
    return {
        "norm_squared": norm,
        "base_norm_squared": base,
        "relative_norm": _relative(norm, base),
        "energy": energy,
    }


def _stable_rank(norm: float, low: Sequence[float], high: Sequence[float]) -> list[float] | None:
    """Bounds on ||M||^2 / sigma_1^2; None for a matrix of zeros."""
    return [norm / high[0], norm / low[0]] if norm else None


def _relative(norm: float, base: float | None) -> float | None:
    """||M|| / ||W||, not squared; None without a base, or where the base is zero."""
    return math.sqrt(norm / base) if base else None


def warnings(report: dict[str, Any]) -> list[str]:
    """A sentence if the pair differs by rounding alone, or if updates are as large as half of the weights or more.

    It is on the pair as a whole, or else on the kinds of module that are so.
    """
    changed = [row for row in report["stacks"] if row["norm_squared"] > 0]
    norms = [Norms(row["norm_squared"], row["base_norm_squared"], frozenset(row["rounding"])) for row in changed]
    if (whole := pair_warning(Norms.together(norms), report["source"])) is not None:
        return [whole]
    alone = [one._replace(rounding=frozenset()) for one in norms]
    large = [n for n, one in enumerate(alone) if pair_warning(one, "") is not None]
    names = ", ".join(changed[n]["kind"] for n in large[:_KINDS_SHOWN])
    more = f" and {len(large) - _KINDS_SHOWN} kinds more" if len(large) > _KINDS_SHOWN else ""
    warning = pair_warning(Norms.together(alone[n] for n in large), names + more)
    return [] if warning is None else [warning]
