"""The results as text: two tables and a verdict. Also the list of families and laws."""

from __future__ import annotations

from typing import Any

from rasa_theory.common import aligned, wrapped
from rasa_theory.verification.instances import FAMILIES
from rasa_theory.verification.laws import LAWS

_SHOWN = 10
_WIDTH = 80
_INDENT = 28  # of what a family or a law is, beside its name
_EXPLANATION = (
    "strict: mixing_drop > 0 at LoRA's optimum, hence e_rasa(k) < e_lora; crossed: 30 iterations of the paper "
    "from a random start came below e_lora."
)
_LEGEND = (
    "margin: the worst one, in units of the law's tolerance, and the family it is in: a law fails above 1, and below 0 "
    "it is a strict inequality."
)


def describe() -> str:
    """The list of all families and laws, in lines of 80 characters."""
    families = {name: family.what for name, family in FAMILIES.items()}
    laws = {name: law.statement for name, law in LAWS.items()}
    parts = (("Families:", families), ("Laws, each to rounding (10 max(b, a) eps ||M|| in norm):", laws))
    lines = []
    for title, names in parts:
        lines.append(title)
        for name, what in names.items():
            lines += wrapped(what, first=f"  {name:<{_INDENT - 2}}", later=" " * _INDENT)
    return "\n".join(lines)


def table(results: dict[str, Any]) -> str:
    """Two tables: a line per family, then a line per law with its worst margin over all families."""
    families = results["families"]
    by_family = [("family", "instances", "checks", "violations", "strict", "crossed"), *map(_family_row, families)]
    by_law = [("law", "checks", "violations", "margin", "in family")]
    for law in results["statements"]:
        tried = {family["name"]: one for family in families for one in family["laws"] if one["name"] == law}
        if tried:
            worst = max(tried, key=lambda name: _size(tried[name]))
            counts = [str(sum(one[key] for one in tried.values())) for key in ("checked", "violations")]
            by_law.append((law, *counts, _margin(tried[worst]), worst))
    lines = [*aligned(by_family, left={0}), *wrapped(_EXPLANATION), "", *aligned(by_law, left={0, 4})]
    return "\n".join([*lines, *wrapped(_LEGEND)])


def verdict_lines(results: dict[str, Any], interrupted: bool = False) -> list[str]:
    """The failures, each with the command that tries it again, and one sentence on the whole run."""
    lines = []
    for failure in results["failures"][:_SHOWN]:
        shape = " x ".join(map(str, failure["shape"]))
        laws = ", ".join(_broken(law) for law in failure["laws"])
        where = f"{failure['family']} {failure['number']} ({shape}, r = {failure['rank']}, k = {failure['k']})"
        lines += wrapped(f"FAILED on {where}: {laws}")
        lines.append(f"  again: {failure['replay'] or 'no file was written; run with --out DIR'}")
    more = len(results["failures"]) - _SHOWN
    if more > 0:
        lines.append(f"and {more} more instances, listed by --json and in verify.json")
    checks, violations = (sum(family[key] for family in results["families"]) for key in ("checks", "violations"))
    sentence = f"{results['verdict'].upper()}: {violations} violations in {checks} checks"
    sentence += f" on {results['finished']} instances ({results['seconds']:.0f} s)"
    return [*lines, *wrapped(sentence + ("; interrupted, the rest was not run." if interrupted else "."))]


def _broken(law: dict[str, Any]) -> str:
    reason = law["raised"] or ("margin " + ("infinite" if law["margin"] is None else f"{law['margin']:.3g}"))
    return f"{law['name']} ({reason})"


def _family_row(family: dict[str, Any]) -> tuple[str, ...]:
    numbers = [str(family[key]) for key in ("instances", "checks", "violations")]
    shares = [f"{100 * family[key] / family['instances']:.0f} %" for key in ("strict", "crossed")]
    return (family["name"], *numbers, *shares)


def _size(law: dict[str, Any]) -> float:
    return float("inf") if law["worst_margin"] is None else float(law["worst_margin"])


def _margin(law: dict[str, Any]) -> str:
    margin = _size(law)
    if margin < 0.005:
        return "<0" if margin < 0 else "0"
    return f"{margin:.2f}" if margin < 10 else f"{margin:.0e}"
