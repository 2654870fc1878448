"""The report of an extraction as text: the table of the command, the long CSV, and the README.md of the adapter."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from rasa_theory.bounds import PROBABLE
from rasa_theory.common import aligned, csv_text

_CSV = (
    "stack", "kind", "module", "rank", "norm_squared", "e_lora", "e_rasa", "e_stored",
    "stable_rank", "entropy_rank", "rank_50", "rank_90", "rank_99",
)  # fmt: skip
_HEAD = ("kind", "L", "shape", "M/W", "r", "k", "LoRA/||M||^2", "RaSA/LoRA", "floor/LoRA", "file/||M||^2", "90%")
_WIDTH = 100
_EXPLANATION = (
    "Squared errors. L: layers. M/W: the norm of the update over that of the weights before, not squared;\n"
    "in the last line, of all tensors. LoRA: the best of rank r. RaSA: r - k private ranks and a pool, at\n"
    "the same number of parameters but for the mixing. floor: no RaSA of this budget is below. file: the\n"
    "adapter as written. 90%: the rank that this share of the energy needs, median over layers."
)
_DESCRIPTIONS = {
    "lora": "the best LoRA of every layer, of rank {rank}",
    "lora-exact-rasa": "RaSA of rank {rank} with k = {k}, written exactly as a LoRA of rank {written}",
    "rasa": "RaSA of rank {rank} with k = {k}, in the layout of its authors' fork of PEFT (github.com/zwhe99/RaSA)",
    "diff": "dense differences to add to the base weights: {source}",
}


def totals(report: dict[str, Any]) -> dict[str, float]:
    """Return squared norms and squared errors, summed over all stacks."""
    return {
        key: math.fsum(row[key] for row in report["stacks"]) for key in ("norm_squared", "e_lora", "e_rasa", "e_stored")
    }


def extraction_table(report: dict[str, Any]) -> str:
    """Return a table with one line per stack and one for their sum, at most 100 characters wide."""
    lines = [_HEAD]
    changed = [row for row in report["stacks"] if row["norm_squared"] > 0]
    for row in changed:
        floor = "-" if row["k"] == 0 else _ratio(row["lower_bound"], row["e_lora"])
        ranks = [m["rank_90"] for m in row["modules"]]
        median = "-" if None in ranks else str(int(statistics.median_low(ranks)))
        lines.append(
            (row["kind"], str(row["layers"]), "{}x{}".format(*row["shape"]), _relative(row), _ranks(row), str(row["k"]),
             *_errors(row), floor, _ratio(row["e_stored"], row["norm_squared"]), median)
        )  # fmt: skip
    total = totals(report) | {"k": max(row["k"] for row in report["stacks"])}
    lines.append(
        (
            "all",
            "",
            "",
            _relative(report),
            "",
            "",
            *_errors(total),
            "",
            _ratio(total["e_stored"], total["norm_squared"]),
            "",
        )
    )
    is_too_wide = max(map(len, aligned(lines))) > _WIDTH
    prefix = _common_prefix([row["kind"] for row in changed]) if is_too_wide else ""
    text = aligned([(line[0].removeprefix(prefix), *line[1:]) for line in lines], width=_WIDTH)
    counts = {key: sum(row["parameters"][key] for row in report["stacks"]) for key in ("lora", "rasa", "stored")}
    sizes = "Numbers: LoRA {lora:,}, RaSA {rasa:,}, the file {stored:,}.".format(**counts)
    zero = [row["kind"] for row in report["stacks"] if row["norm_squared"] == 0]
    unchanged = textwrap.wrap(f"Unchanged, and not written: {', '.join(zero)}.", _WIDTH) if zero else []
    note = [f"All kinds begin with {prefix!r}, which is not shown."] if prefix else []
    probable = [PROBABLE] if any(row.get("lower_bound_failure") for row in changed) else []
    return "\n".join([*text, *note, _EXPLANATION, *probable, sizes, *unchanged, *_left_out(report), *_warning(report)])


def _warning(report: dict[str, Any]) -> list[str]:
    """Return the warning that the source may be no pair, after a line without text; nothing if there is none."""
    warning = report.get("warning")
    return ["", *textwrap.wrap(warning, _WIDTH, break_on_hyphens=False, break_long_words=False)] if warning else []


def _common_prefix(kinds: Sequence[str]) -> str:
    """Return the leading components that all kinds share, each with its dot; the last component is never one."""
    columns = zip(*(kind.split(".")[:-1] for kind in kinds), strict=False)
    return "".join(f"{column[0]}." for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _left_out(report: dict[str, Any]) -> list[str]:
    """Return lines with the share of every left-out tensor in the squared norm of the whole source, largest first."""
    norms = {entry["name"]: entry["norm_squared"] for entry in report["left_out"] if entry.get("norm_squared", 0) > 0}
    if not norms:
        return []
    whole = totals(report)["norm_squared"] + math.fsum(norms.values())
    ranked = sorted(norms, key=lambda name: -norms[name])
    shares = ", ".join(f"{name.removesuffix('.weight')} {100 * norms[name] / whole:.3g} %" for name in ranked)
    return textwrap.wrap(f"Left out, by share of the squared norm: {shares}.", _WIDTH, break_on_hyphens=False)


def _setting(number: int | None, unit: str) -> str:
    return f"chosen for each {unit}" if number is None else str(number)


def _ranks(row: dict[str, Any]) -> str:
    """Return the rank of the layers, or their range, as text."""
    if row["rank"] is not None:
        return str(row["rank"])
    ranks = [module["rank"] for module in row["modules"]]
    return f"{min(ranks)}..{max(ranks)}"


def _relative(row: dict[str, Any]) -> str:
    """Return the norm of the update divided by that of the weights before, as text."""
    relative = row.get("relative_norm")
    return "-" if relative is None else f"{relative:.2g}"


def _errors(row: dict[str, Any]) -> tuple[str, str]:
    rasa = "-" if row["k"] == 0 else _ratio(row["e_rasa"], row["e_lora"])
    return _ratio(row["e_lora"], row["norm_squared"]), rasa


def _ratio(x: float, y: float) -> str:
    return f"{x / y:.4f}" if y > 0 else "-"


def extraction_csv(report: dict[str, Any]) -> str:
    """Return the report as CSV with one line per module."""
    rows = [
        {"stack": row["name"], "kind": row["kind"], **module} for row in report["stacks"] for module in row["modules"]
    ]
    return csv_text(_CSV, [[row[column] for column in _CSV] for row in rows])


def model_card(report: dict[str, Any]) -> str:
    """Return the README.md of the adapter's folder, with the header that a model hub reads."""
    settings, total = report["plan"]["settings"], totals(report)
    written = sorted({rank for row in report["stacks"] for rank in row["ranks"].values()})
    named = {
        "rank": _setting(settings["rank"], "layer"),
        "k": _setting(settings["k"], "kind of module"),
        "written": " or ".join(map(str, written)),
    }
    description = _DESCRIPTIONS[settings["format"]].format(**named, source=report["source"])
    peft = settings["format"].startswith("lora")
    header = ["library_name: peft"] if peft else []
    if report["base"]:
        header.append(f"base_model: {json.dumps(report['base'])}")
    header += ["tags:", "- lora", "- rasa", "- extracted"]
    place = "one of its folders" if settings["tasks"] else "this folder"
    load = f'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, "{place}")'
    use = f"\n```python\n{load}\n```\n" if peft else ""
    covered = f"{sum(row['layers'] for row in report['stacks'])} in number"
    if report["left_out"]:
        covered += f" ({len(report['left_out'])} tensors or stacks of the source are left out, see `report.json`)"
    share = total["e_stored"] / total["norm_squared"] if total["norm_squared"] > 0 else 0.0
    return f"""---
{chr(10).join(header)}
---

# Adapter extracted from {report["source"]}

This is {description}, stored in {settings["dtype"]}. Of the squared norm of the updates of
the modules below, {covered}, it misses {share:.2%}.
{use}
```
{extraction_table(report)}
```

Every layer is in `report.csv` and `report.json`, drawn in `report.png`. Made by

```
{shlex.join(report["command"])}
```

with rasa_theory {report["environment"]["rasa_theory"]}.
"""
