"""The report of an extraction as text: its notes, the long CSV, and the README.md of the adapter."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from typing import Any

from rasa_theory.bounds import PROBABLE
from rasa_theory.common import WIDTH, aligned, csv_text, wrapped
from rasa_theory.extraction.consumers import consumer_notes
from rasa_theory.extraction.error_table import (
    ErrorTable,
    kind_labels,
    ratio_text,
    relative_text,
    shape_text,
    totals,
)
from rasa_theory.formats import grouped

_CSV = (
    "stack", "kind", "module", "rank", "norm_squared", "e_lora", "e_rasa", "e_stored",
    "stable_rank", "entropy_rank", "rank_50", "rank_90", "rank_99",
)  # fmt: skip
_EXPLANATION = (
    "rel: ||tuned - base|| / ||base||; in the last line, of all tensors. LoRA, file: the share of ||M||^2 that the "
    "best LoRA of rank r misses, and the file as written. 90%: the rank that holds 90 % of ||M||^2, median over layers."
)
_POOL = (
    "gain: by how many per cent of that error RaSA of r - k private ranks and a pool of k a layer misses less. No RaSA "
    "of this size gains more than limit."
)
_DIFFERENCE = (
    "rel: ||tuned - base|| / ||base||. share: of the squared norm of all that changed. file: the share of ||M||^2 that "
    "rounding to the dtype of the file misses."
)
_DESCRIPTIONS = {
    "lora": "the best LoRA of every layer, of rank {rank}",
    "lora-exact-rasa": "RaSA of rank {rank} with k = {k}, written exactly as a LoRA of rank {written}",
    "rasa": "RaSA of rank {rank} with k = {k}, in the layout of its authors' fork of PEFT (github.com/zwhe99/{fork})",
    "kohya": "the best LoRA of every layer, of rank {rank}, in one file for ComfyUI and diffusers",
    "dense": "the best approximation of rank {rank} of every layer, as dense updates to add to the base weights",
    "diff": "dense differences to add to the base weights: {source}",
}


def extraction_table(report: dict[str, Any]) -> str:
    """The whole table of a report and its notes, 80 columns wide if names allow it."""
    if is_difference(report):
        return "\n".join([*difference_table(report), *report_notes(report)])
    settings = report["plan"]["settings"]
    table = ErrorTable(report["stacks"], settings["rank"], settings["k"] != 0)
    rows = [line for row in report["stacks"] for line in table.rows(row)]
    return "\n".join([*table.head(), *rows, *table.total(report), *report_notes(report, table.prefix)])


def is_difference(report: dict[str, Any]) -> bool:
    """True for format diff, which has no ranks."""
    return bool(report["plan"]["settings"]["format"] == "diff")


def difference_table(report: dict[str, Any]) -> list[str]:
    """The table of format diff: norms, their shares of the sum, and the errors of rounding."""
    changed = [row for row in report["stacks"] if row["norm_squared"] > 0]
    whole = math.fsum(row["norm_squared"] for row in [*changed, *report["whole"]])
    rows = [
        (label, str(row["layers"]), shape_text(row), relative_text(row), ratio_text(row["norm_squared"], whole),
         f"{row['e_stored'] / row['norm_squared']:.1e}")
        for label, row in zip(kind_labels(changed), changed, strict=True)
    ]  # fmt: skip
    return aligned([("kind", "L", "shape", "rel", "share", "file"), *rows], left={0}, gap=1, width=WIDTH)


def report_notes(report: dict[str, Any], prefix: str = "") -> list[str]:
    """What the words of the table mean, sizes, and what the file leaves out; `prefix` is that of the table."""
    is_diff, changed = is_difference(report), [row for row in report["stacks"] if row["norm_squared"] > 0]
    labels = zip(kind_labels(report["stacks"]), report["stacks"], strict=True)
    zero = [label for label, row in labels if row["norm_squared"] == 0]
    sentences = [
        *([f"All kinds begin with {prefix!r}, which is not shown."] if prefix else []),
        _DIFFERENCE if is_diff else _EXPLANATION,
        *([_POOL] if _has_pool(changed) else []),
        *([PROBABLE] if any(row.get("lower_bound_failure") for row in changed) else []),
        *_sizes(report, is_diff),
        *([] if is_diff else _equal_size(report)),
        *_of_base(report, is_diff),
        *consumer_notes(report),
        *([f"Unchanged, and not written: {', '.join(zero)}."] if zero else []),
        *_whole(report),
        *_left_out(report),
        *_unknown(report),
    ]
    return [*(line for sentence in sentences for line in wrapped(sentence)), *_warning(report)]


def _of_base(report: dict[str, Any], is_diff: bool) -> list[str]:
    """The sentence on the model that a pair's adapter belongs to."""
    if is_diff or "base_norm_squared" not in report:  # the updates do not come from a pair
        return []
    return [f"It belongs to {report['base']}; the numbers here would be the same if base and tuned were swapped."]


def _has_pool(rows: Sequence[dict[str, Any]]) -> bool:
    return any(row["k"] > 0 for row in rows)


def _sizes(report: dict[str, Any], is_diff: bool) -> list[str]:
    counts = {key: sum(row["parameters"][key] for row in report["stacks"]) for key in ("lora", "rasa", "stored")}
    if is_diff:
        return ["Parameters: {stored:,} in the file, beside single tensors.".format(**counts)]
    rasa = ", RaSA {rasa:,}".format(**counts) if _has_pool(report["stacks"]) else ""
    return [f"Parameters: LoRA {counts['lora']:,}{rasa}, the file {counts['stored']:,}{_zeros(report)}."]


def _zeros(report: dict[str, Any]) -> str:
    """The number of zeros by which factors are padded to one rank, as text; empty if there are none."""
    if report["rank"] is None:
        return ""
    zeros = 0
    for row in report["stacks"]:
        matrices = row["layers"] if row["parameter"] else 1
        zeros += sum((report["rank"] - rank) * matrices * sum(row["shape"]) for rank in row["ranks"].values())
    return f" and {zeros:,} zeros that pad all to rank {report['rank']}" if zeros else ""


def _equal_size(report: dict[str, Any]) -> list[str]:
    """The sentence with the error of the best LoRA that takes no more parameters than the file, stack by stack.

    None where the file is such a LoRA itself.
    """
    rows = [row for row in report["stacks"] if row["norm_squared"] > 0]
    is_lora = report["plan"]["settings"]["format"] in ("lora", "kohya")
    if is_lora or not rows or any(row["equal_size"] is None for row in rows):
        return []
    norm = math.fsum(row["norm_squared"] for row in rows)
    missed = math.fsum(row["equal_size"]["e_lora"] for row in rows) / norm
    stored = math.fsum(row["e_stored"] for row in rows) / norm
    ranks = sorted({row["equal_size"]["rank"] for row in rows})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return [
        f"At equal file size the best LoRA, of rank {span}, would miss {missed:.2%} of the squared norm; this file "
        f"misses {stored:.2%}."
    ]


def _warning(report: dict[str, Any]) -> list[str]:
    """Return the warning that the source may be no pair, after a line without text; nothing if there is none."""
    warning = report.get("warning")
    return ["", *wrapped(warning)] if warning else []


def _whole(report: dict[str, Any]) -> list[str]:
    """The sentence on tensors that the file holds whole beside the stacks."""
    names = [one["name"] for one in report["whole"]]
    labels = ", ".join(group.label for group in grouped((name, "") for name in names))
    return [f"Written whole: {labels}."] if names else []


def _left_out(report: dict[str, Any]) -> list[str]:
    """Return the sentence with the share of what is left out in the whole squared norm, in groups, largest first."""
    changed = [one for one in report["left_out"] if one.get("norm_squared", 0) > 0]
    if not changed:
        return []
    norm_of = {one["name"]: one["norm_squared"] for one in changed}
    whole = math.fsum(one["norm_squared"] for one in [*report["stacks"], *report["whole"], *changed])
    share_of = {
        group.label: math.fsum(norm_of[name] for name in group.names)
        for group in grouped((one["name"], one["reason"]) for one in changed)
    }
    ranked = sorted(share_of, key=lambda label: -share_of[label])
    shares = ", ".join(f"{label.replace('.weight', '')} {100 * share_of[label] / whole:.3g}%" for label in ranked)
    return [f"Left out, by share of the squared norm: {shares}."]


def _unknown(report: dict[str, Any]) -> list[str]:
    """Return the sentence on what is left out and counts in no share, since its update is not known."""
    unknown = [(one["name"], one["reason"]) for one in report["left_out"] if one.get("unknown")]
    labels = ", ".join(group.label.replace(".weight", "") for group in grouped(unknown))
    return [f"Left out, and in no share, since the change is not known: {labels}."] if labels else []


def _setting(number: int | None, unit: str) -> str:
    return f"chosen for each {unit}" if number is None else str(number)


def extraction_csv(report: dict[str, Any]) -> str:
    """Return the report as CSV with one line per module."""
    rows = [
        {"stack": row["name"], "kind": row["kind"], **module} for row in report["stacks"] for module in row["modules"]
    ]
    return csv_text(_CSV, [[row[column] for column in _CSV] for row in rows])


def model_card(report: dict[str, Any]) -> str:
    """Return the README.md of the adapter's folder, with the header that a model hub reads."""
    settings, total = report["plan"]["settings"], totals(report["stacks"])
    written = sorted({rank for row in report["stacks"] for rank in row["ranks"].values()})
    named = {
        "rank": _setting(settings["rank"], "layer"),
        "k": _setting(settings["k"], "kind of module"),
        "written": " or ".join(map(str, written)),
        "fork": "RaSA" if settings["layout"] == "mixing" else "peft",
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
    share = (total["e_stored"] or 0.0) / total["norm_squared"] if total["norm_squared"] else 0.0
    modules = sum(module["norm_squared"] > 0 for row in report["stacks"] for module in row["modules"])
    lost = len(report["left_out"])
    left_out = f" {lost} tensors or stacks of the source are left out, see `report.json`." if lost else ""
    return f"""---
{chr(10).join(header)}
---

# Adapter extracted from {report["source"]}

This is {description}, stored in {settings["dtype"]}. It misses {share:.2%} of
the squared norm of the updates of {modules} modules.{left_out}
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
