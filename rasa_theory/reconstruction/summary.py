"""The results of a study as text: the table and the verdict of the command, and the long CSV of histories."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import torch

from rasa_theory import linalg
from rasa_theory.bounds import PROBABLE
from rasa_theory.common import aligned, csv_text

_COLUMNS = (
    "stack", "k", "e_lora/||M||^2", "best found", "allocation", "floor", "iterations to beat LoRA", "start", "stop",
)  # fmt: skip
_SHOWN = 3
_WIDTH = 100
_EXPLANATION = (
    "best found, allocation and floor are in units of e_lora: 1 is LoRA's optimum; e_rasa(k) lies between floor "
    "and best found."
)


def table(results: dict[str, Any]) -> str:
    """Return a table with one line per stack and k; errors are divided by e_lora, so that 1 is LoRA's optimum."""
    rows = [_COLUMNS]
    for row in results["stacks"]:
        share = f"{row['e_lora'] / row['norm_squared']:.4f}" if row["norm_squared"] > 0 else "-"
        for run in row["runs"]:
            values = [_ratio(run[key], row["e_lora"]) for key in ("e_rasa", "e_allocation", "lower_bound")]
            floor = f"{values[2]} {run['lower_bound_name']}"
            stop = run["stop_reason"].lower().replace("_", " ")
            rows.append((row["name"], str(run["k"]), share, *values[:2], floor, _iterations(run), run["start"], stop))
    failures = [run.get("lower_bound_failure", 0.0) for row in results["stacks"] for run in row["runs"]]
    probable = [PROBABLE] if any(failures) else []  # files of earlier versions do not say it
    return "\n".join([*aligned(rows), _EXPLANATION, *probable, *_search_lines(results)])


def _search_lines(results: dict[str, Any]) -> list[str]:
    """The number of starts of every search that came near the lowest of them; no line where nothing was searched."""
    ks = {run["k"] for row in results["stacks"] for run in row["runs"] if run["search"] is not None}
    stacks = []
    for row in results["stacks"]:
        counts = [
            f"{run['search']['near_best']} of {run['search']['starts']}" + (f" (k = {run['k']})" if len(ks) > 1 else "")
            for run in row["runs"]
            if run["search"] is not None
        ]
        if counts:
            stacks.append(f"{row['name']} {', '.join(counts)}")
    if not stacks:
        return []
    text = f"Starts of the search within 0.1 % of e_lora of the lowest of them: {'; '.join(stacks)}."
    return textwrap.wrap(text, _WIDTH, break_on_hyphens=False, break_long_words=False)


def _ratio(error: float, e_lora: float) -> str:
    return f"{error / e_lora:.5f}" if e_lora > 0 else "-"


def _iterations(run: dict[str, Any]) -> str:
    counts = [attempt["iterations"] for attempt in run["attempts"]]
    if not counts:
        return "-"
    successes = sorted(count for count in counts if count is not None)
    median = run["iterations_to_beat_lora"]
    limits = f"{successes[0]}..{successes[-1]}" if successes else "none"
    return f"{'never' if median is None else median} ({limits}; {len(successes)} of {len(counts)})"


def verdict_lines(results: dict[str, Any], interrupted: bool = False) -> list[str]:
    """Return every law that failed or could not be decided, then one sentence with the verdict on Theorem 3.1."""
    runs = [(row, run) for row in results["stacks"] for run in row["runs"]]
    lines = []
    for row, run in runs:
        where = f"{row['name']}, k = {run['k']}"
        if run["theorem_3_1"] == "undecided":
            lines.append(
                f"On {where} the start {run['start']} ended above e_lora, in a local minimum: nothing is decided"
            )
        else:
            laws = [law.replace("_", " ") for law, holds in run["checks"].items() if not holds]
            lines += [f"FAILED on {where}: {law}" for law in laws]
    counts = [attempt["iterations"] for _, run in runs for attempt in run["attempts"]]
    below = sum(count is not None for count in counts)
    positive = sum(run["mixing_drop"] > 0 for _, run in runs if run["k"] > 0)
    dtype = getattr(torch, (results["environment"] or {}).get("dtype", "float64"))
    zero = [row["name"] for row in results["stacks"] if row["norm_squared"] == 0]
    lines += [f"{name}: all updates are zero; nothing to reconstruct" for name in zero]
    if exact := [row["name"] for row in results["stacks"] if row["name"] not in zero and _is_exact(row, dtype)]:
        names = ", ".join(exact[:_SHOWN]) + (f" and {len(exact) - _SHOWN} more" if len(exact) > _SHOWN else "")
        lines.append(
            f"LoRA of rank {results['rank']} is exact on {names}: the updates have no higher rank; "
            "ask for a lower --rank"
        )
    sentence = f"Theorem 3.1, e_rasa(k) <= e_lora: {results['theorem_3_1'].upper()}"
    sentence += f" ({len(runs)} {'pair' if len(runs) == 1 else 'pairs'} of stack and k, proved strict in {positive})"
    if counts:
        sentence += f"; {below} of {len(counts)} random attempts came below LoRA by themselves"
    if results.get("warning"):
        lines += ["", *textwrap.wrap(results["warning"], _WIDTH, break_on_hyphens=False, break_long_words=False)]
    return [*lines, sentence + ("; interrupted, the rest was not run." if interrupted else ".")]


def _is_exact(row: dict[str, Any], dtype: torch.dtype) -> bool:
    """True if e_lora is 0 within the rounding of comparisons between errors in the dtype of the run."""
    tolerance = linalg.rounding(math.sqrt(row["norm_squared"]), row["shape"], torch.finfo(dtype).eps)
    return math.sqrt(row["e_lora"]) <= tolerance


def history_csv(results: dict[str, Any]) -> str:
    """Return the histories as CSV with one line per iteration: squared errors, and no seed for the solver's runs."""
    rows = [
        (row["name"], run["k"], curve["start"], curve["seed"], curve["sweep"], iteration, error)
        for row in results["stacks"]
        for run in row["runs"]
        for curve in ({**run, "seed": None}, *run["attempts"])
        for iteration, error in enumerate(curve["history"])
    ]
    return csv_text(("stack", "k", "start", "seed", "sweep", "iteration", "error"), rows)
