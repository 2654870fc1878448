"""The results as text: two tables and a verdict. Also the list of families and laws."""

from __future__ import annotations

import textwrap
from typing import Any

from rasa_theory.common import aligned
from rasa_theory.verification.instances import FAMILIES
from rasa_theory.verification.laws import LAWS

_SHOWN = 10
_HEAD = ("#", "family", "instances", "checks", "violations", "strict", "crossed", "worst margin")
_EXPLANATION = (
    "strict: mixing_drop > 0 at LoRA's optimum, hence e_rasa(k) < e_lora; crossed: 30 iterations of the paper "
    "from a random start came below e_lora."
)
_LEGEND = (
    "Worst margin of each law, in units of its tolerance, by number of family: a law fails above 1; < 0 is a strict "
    "inequality."
)


def describe() -> str:
    """The list of all families and laws, one a line."""
    families = {name: family.what for name, family in FAMILIES.items()}
    laws = {name: law.statement for name, law in LAWS.items()}
    parts = (("Families:", families), ("Laws, each to rounding (10 max(b, a) eps ||M|| in norm):", laws))
    return "\n".join(
        line for title, names in parts for line in [title, *(f"  {name:<26}{what}" for name, what in names.items())]
    )


def table(results: dict[str, Any]) -> str:
    """Two tables: a line per family, then a line per law with its worst margin in every family."""
    families = results["families"]
    rows = [_HEAD, *(_family_row(n, family) for n, family in enumerate(families, 1))]
    lines = aligned(rows, left=(1, 7))
    lines += [*textwrap.wrap(_EXPLANATION, 120), ""]
    lines += textwrap.wrap(_LEGEND, 120)
    margins = [{law["name"]: law for law in family["laws"]} for family in families]
    grid = [("law", *(str(n) for n in range(1, len(families) + 1)))]
    tried = [law for law in results["statements"] if any(law in held for held in margins)]
    grid += [(law, *(_cell(held.get(law)) for held in margins)) for law in tried]
    return "\n".join([*lines, *aligned(grid, left=(0,), gap=" ")])


def verdict_lines(results: dict[str, Any], interrupted: bool = False) -> list[str]:
    """The failures, each with the command that tries it again, and one sentence on the whole run."""
    lines = []
    for failure in results["failures"][:_SHOWN]:
        shape = " x ".join(map(str, failure["shape"]))
        laws = ", ".join(_broken(law) for law in failure["laws"])
        where = f"{failure['family']} {failure['number']} ({shape}, r = {failure['rank']}, k = {failure['k']})"
        lines.append(f"FAILED on {where}: {laws}")
        lines.append(f"  again: {failure['replay'] or 'no file was written; run with --out DIR'}")
    more = len(results["failures"]) - _SHOWN
    if more > 0:
        lines.append(f"and {more} more instances, listed by --json and in verify.json")
    checks, violations = (sum(family[key] for family in results["families"]) for key in ("checks", "violations"))
    sentence = f"{results['verdict'].upper()}: {violations} violations in {checks} checks"
    sentence += f" on {results['finished']} instances ({results['seconds']:.0f} s)"
    return [*lines, sentence + ("; interrupted, the rest was not run." if interrupted else ".")]


def _broken(law: dict[str, Any]) -> str:
    reason = law["raised"] or ("margin " + ("infinite" if law["margin"] is None else f"{law['margin']:.3g}"))
    return f"{law['name']} ({reason})"


def _family_row(n: int, family: dict[str, Any]) -> tuple[str, ...]:
    count = family["instances"]
    worst = max(family["laws"], key=lambda law: (law["violations"] > 0, _size(law)), default=None)
    shares = [f"{100 * family[key] / count:.0f} %" for key in ("strict", "crossed")]
    numbers = [str(family[key]) for key in ("instances", "checks", "violations")]
    return (str(n), family["name"], *numbers, *shares, "-" if worst is None else f"{_cell(worst)} {worst['name']}")


def _size(law: dict[str, Any]) -> float:
    return float("inf") if law["worst_margin"] is None else float(law["worst_margin"])


def _cell(law: dict[str, Any] | None) -> str:
    if law is None:
        return "-"
    margin = _size(law)
    if margin < 0.005:
        return "<0" if margin < 0 else "0"
    return f"{margin:.2f}" if margin < 10 else f"{margin:.0e}"
