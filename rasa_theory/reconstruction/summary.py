"""The results of a study as text: the table and the verdict of the command, and the long CSV of histories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rasa_theory import linalg
from rasa_theory.bounds import PROBABLE
from rasa_theory.common import WIDTH, TextTable, columns_of, csv_text, wrapped
from rasa_theory.solvers import ITERATIONS

_NUMBERS = (
    "LoRA\nmisses", "RaSA\ngains", "by ranks\nalone", "certified\nlimit", "random starts\nbelow LoRA",
)  # fmt: skip
_WIDTHS = (8, 8, 8, 9)  # of those columns but the last
_SHOWN = 3
_EXPLANATION = (
    "Misses: share of ||M||^2. Gains: share of LoRA's error, never above the limit.",
    "By ranks alone: unequal ranks, nothing shared. In brackets: iterations needed.",
)
"""What the words of the table mean, in two lines."""
_EXPLANATION_WITHOUT_STARTS = (_EXPLANATION[0], "By ranks alone: unequal ranks, nothing shared.")


class StudyTable:
    """The table of a study, made row by row, so that each can be printed when its stack and k are finished.

    It is as wide as the longest name of a stack needs, but at most `width`. Where names do not fit beside the numbers,
    each stands on a line of its own, and then columns are drawn together. Below 56 characters lines are longer.

    - names: of all stacks.
    - seeds: the number of random starts.
    - verbose: a second line for each row says where its solution and its limit come from.
    """

    def __init__(self, names: Sequence[str], seeds: int, width: int = WIDTH, verbose: bool = False) -> None:
        self._width, self._verbose = width, verbose
        self._previous: str | None = None
        starts = len(f"{seeds} of {seeds} (10 to 60)")
        whole = TextTable(
            ("stack", "k", *_NUMBERS), (max(map(columns_of, names), default=0), 2, *_WIDTHS, starts), {0, 6}
        )
        self._names_apart = whole.width > width
        self._table = _without_names(width, starts) if self._names_apart else whole

    def head(self) -> list[str]:
        """The names of the columns, and a rule below."""
        return self._table.head()

    def rows(self, stack: dict[str, Any], run: dict[str, Any]) -> list[str]:
        """The lines of one k of a stack; the first k of each stack names it."""
        name = "" if stack["name"] == self._previous else stack["name"]
        self._previous = stack["name"]
        cells = _cells(stack, run)
        if self._names_apart:
            lines = [*([name] if name else []), *self._table.row(cells)]
        else:
            lines = self._table.row((name, *cells))
        if self._verbose:
            lines += wrapped(_origin(run), min(self._width, WIDTH), first="  ", later="  ")
        return lines


def _without_names(width: int, starts: int) -> TextTable:
    """A table whose first column is k; where there is little room, its columns are drawn together."""
    head = ("stack\nk", *_NUMBERS)
    wide = TextTable(head, (0, *_WIDTHS, starts), {5})
    if wide.width <= width:
        return wide
    close = TextTable(head, (0, *_WIDTHS, starts), {5}, gap=1)
    return TextTable(head, (0, *_WIDTHS, starts - max(0, close.width - width)), {5}, gap=1)


def table(results: dict[str, Any], width: int = WIDTH, verbose: bool = False) -> str:
    """Return the whole table of a study, with what its words mean, for lines of `width` characters."""
    stacks = results["stacks"]
    seeds = max((len(run["attempts"]) for row in stacks for run in row["runs"]), default=0)
    text = StudyTable([row["name"] for row in stacks], seeds, width, verbose)
    rows = [line for row in stacks for run in row["runs"] for line in text.rows(row, run)]
    return "\n".join([*text.head(), *rows, *explanation_lines(results, width)])


def explanation_lines(results: dict[str, Any], width: int = WIDTH) -> list[str]:
    """What the words of the table mean, and what its reader has to know of floors and searches."""
    runs = [(row, run) for row in results["stacks"] for run in row["runs"]]
    words = _EXPLANATION if any(run["attempts"] for _, run in runs) else _EXPLANATION_WITHOUT_STARTS
    sentences = [*words, *_next_rank(results)]
    if any(run.get("lower_bound_failure") for _, run in runs):  # files of earlier versions do not say it
        sentences.append(PROBABLE)
    lonely = [_point(row, run) for row, run in runs if run["search"] is not None and run["search"]["near_best"] == 1]
    if lonely:
        sentences.append(
            f"Only one start of the search came near the lowest on {_some(lonely)}; --effort thorough may find more."
        )
    return [line for sentence in sentences for line in wrapped(sentence, min(width, WIDTH))]


def _next_rank(results: dict[str, Any]) -> list[str]:
    """The sentence on what one more rank gains, to compare with; none without pools, or in files that do not say it."""
    rows = [row for row in results["stacks"] if row["e_lora"] > 0 and any(run["k"] > 0 for run in row["runs"])]
    if not rows or any("e_lora_next" not in row for row in rows):
        return []
    gains = [100 * (1 - row["e_lora_next"] / row["e_lora"]) for row in rows]
    low, high = f"{min(gains):.1f}", f"{max(gains):.1f}"
    return [f"One more rank: LoRA of rank {results['rank'] + 1} gains {low if low == high else f'{low} to {high}'} %."]


def _cells(stack: dict[str, Any], run: dict[str, Any]) -> tuple[str, ...]:
    e_lora, norm = stack["e_lora"], stack["norm_squared"]
    gains = ["-"] * 3
    if e_lora > 0:
        found, ranks = (1 - run[key] / e_lora for key in ("e_rasa", "e_allocation"))
        gains = [_per_cent(found), _per_cent(ranks), _per_cent(1 - run["lower_bound"] / e_lora, up=True)]
    misses = _per_cent(e_lora / norm) if norm > 0 else "-"
    return (str(run["k"]), misses, *gains, _below([attempt["iterations"] for attempt in run["attempts"]]))


def _per_cent(share: float, up: bool = False) -> str:
    """A share in per cent, rounded, or rounded up, to three decimals below 10 and to two from there on."""
    digits = 3 if abs(share) < 0.1 else 2
    scale = 10**digits
    value = math.ceil(100 * share * scale - 1e-6) / scale if up else 100 * share  # but not for the sake of rounding
    return f"{value if round(value, digits) else 0:.{digits}f} %"


def _below(counts: Sequence[int | None]) -> str:
    """How many random starts came below LoRA, and after how many iterations; None for a start that never did."""
    crossed = sorted(count for count in counts if count is not None)
    if not crossed:
        return f"none of {len(counts)}" if counts else "-"
    span = str(crossed[0]) if crossed[0] == crossed[-1] else f"{crossed[0]} to {crossed[-1]}"
    return f"{len(crossed)} of {len(counts)} ({span})"


def _origin(run: dict[str, Any]) -> str:
    """Where the solution and the floor of a run come from."""
    search = run["search"]
    near = "" if search is None else f"; starts near the lowest: {search['near_best']} of {search['starts']}"
    stop = run["stop_reason"].lower().replace("_", " ")
    return f"start: {run['start']}; stop: {stop}; limit by floor: {run['lower_bound_name']}{near}"


def _point(row: dict[str, Any], run: dict[str, Any]) -> str:
    return f"{row['name']} (k = {run['k']})"


def _some(names: Sequence[str]) -> str:
    """The first few names, and the number of others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def verdict_lines(results: dict[str, Any], interrupted: bool = False) -> list[str]:
    """Return every law that failed or could not be decided, then one sentence with the verdict on Theorem 3.1."""
    runs = [(row, run) for row in results["stacks"] for run in row["runs"]]
    failed: dict[str, list[str]] = {}
    undecided: dict[str, list[str]] = {}
    for row, run in runs:
        if run["theorem_3_1"] == "undecided":
            undecided.setdefault(run["start"], []).append(_point(row, run))
        else:
            for law in (law for law, holds in run["checks"].items() if not holds):
                failed.setdefault(law, []).append(_point(row, run))
    sentences = [
        f"On {_some(points)} the start {start} ended above e_lora, in a local minimum: nothing is decided."
        for start, points in undecided.items()
    ]
    sentences += [f"FAILED on {_some(points)}: {law.replace('_', ' ')}" for law, points in failed.items()]
    dtype = getattr(torch, (results["environment"] or {}).get("dtype", "float64"))
    zero = [row["name"] for row in results["stacks"] if row["norm_squared"] == 0]
    if zero:
        sentences.append(f"{_some(zero)}: all updates are zero; nothing to reconstruct.")
    if exact := [row["name"] for row in results["stacks"] if row["name"] not in zero and _is_exact(row, dtype)]:
        sentences.append(
            f"LoRA of rank {results['rank']} is exact on {_some(exact)}: the updates have no higher rank; "
            "ask for a lower --rank."
        )
    lines = [line for sentence in sentences for line in wrapped(sentence)]
    if results.get("warning"):
        lines += ["", *wrapped(results["warning"])]
    return [*lines, *wrapped(_verdict(results, interrupted))]


def _verdict(results: dict[str, Any], interrupted: bool) -> str:
    """The sentence on Theorem 3.1."""
    runs = [run for row in results["stacks"] for run in row["runs"]]
    counts = [attempt["iterations"] for run in runs for attempt in run["attempts"]]
    below = sum(count is not None for count in counts)
    positive = sum(run["mixing_drop"] > 0 for run in runs if run["k"] > 0)
    sentence = f"Theorem 3.1, e_rasa(k) <= e_lora: {results['theorem_3_1'].upper()}"
    sentence += f" ({len(runs)} {'pair' if len(runs) == 1 else 'pairs'} of stack and k, proved strict in {positive})"
    if counts:
        sentence += f"; {below} of {len(counts)} random starts came below LoRA within {ITERATIONS} iterations"
    return sentence + ("; interrupted, the rest was not run." if interrupted else ".")


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
