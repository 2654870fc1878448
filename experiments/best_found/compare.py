"""Errors beside the reference: in numbers, in lines of text, and in a figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from experiments.support.rows import Row
from rasa_theory.plotting import style

CODES = ("tensorly", "pyttb")
LIMIT = 8.0


def rounding(row: Row) -> float:
    """The size of errors that count as 0: a millionth of e_lora, where plain descent ends on planted factors."""
    return max(1e-6 * float(row["e_lora"]), 1e-12)


def lowest(row: Row) -> float:
    """The reference: the lowest error of the plain search, and of CP codes whose results keep the bound on terms."""
    return float(min(row[name] for name in ("reference", *CODES) if row[name] is not None))


def excess(row: Row, column: str = "error") -> float:
    """An error less the reference, in units of e_lora; errors below `rounding` count as equal."""
    nothing = rounding(row)
    return float((max(row[column], nothing) - max(lowest(row), nothing)) / max(row["e_lora"], nothing))


def efforts(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each effort of the solver, in order of appearance."""
    names = dict.fromkeys(row["effort"] for row in rows)
    return {name: [row for row in rows if row["effort"] == name] for name in names}


def counts(label: str, rows: list[Row], column: str, seconds: list[float]) -> str:
    """The number of problems above and below the reference, the largest excess, and the median of the seconds."""
    over = [excess(row, column) for row in rows]
    above, far, below = (sum(one) for one in zip(*((x > 1e-3, x > 1e-2, x < -1e-3) for x in over), strict=True))
    median = statistics.median(seconds)
    return f"{label:30} {len(rows):4} {above:6} {far:5} {below:6} {100 * max(over):+8.3f}% {median:9.2f}"


def lines(rows: list[Row]) -> Iterator[str]:
    """For each effort a line per kind, one for all, and one for the first 24 starts of the plain search.

    Seconds of the latter are 24 / 50 of those of the reference, for the problems that have 50 starts.
    """
    for effort, group in efforts(rows).items():
        yield f"effort {effort}, errors less the reference, in % of e_lora"
        yield f"{'kind':30} {'n':>4} {'>0.1%':>6} {'>1%':>5} {'<-0.1%':>6} {'worst':>9} {'median s':>9}"
        for kind in (*sorted({row["kind"] for row in group}), "all"):
            own = [row for row in group if kind in (row["kind"], "all")]
            yield counts(kind, own, "error", [row["seconds"] for row in own])
        yield counts("24 plain starts", group, "best_of_24", [24 / 50 * row["reference_seconds"] for row in group])
        price = [100 * (excess(row, "reference") - excess(row, "unbounded")) for row in group]
        yield (
            f"the bound costs the plain search {statistics.median(price):.4f} % of e_lora (median), "
            f"{max(price):.2f} % at most, above 0.1 % in {sum(x > 0.1 for x in price)}"
        )
        outside = sum(row["cancellation"] > LIMIT * (1 + 1e-6) for row in group)
        yield f"answers outside the bound on terms: {outside}"


def plot(rows: list[Row]) -> Figure:
    """Errors less the reference in rising order: of the solver at each effort, and of 24 plain starts."""
    figure = style.new_figure(2.8, title="Do more starts find lower errors?")
    ax = style.panels(figure)[0, 0]
    groups = efforts(rows)
    curves = {f"solver, effort {name}": (group, "error") for name, group in groups.items()}
    curves["24 starts of the plain search"] = (next(iter(groups.values())), "best_of_24")
    for (label, (group, column)), color in zip(curves.items(), style.COLOURS, strict=False):
        heights = sorted(100 * excess(row, column) for row in group)
        ax.plot(np.linspace(0, 1, len(heights)), heights, color=color, label=label)
    ax.axhline(0, color=style.GREY, linewidth=0.8, zorder=0)
    ax.set_yscale("symlog", linthresh=0.01)
    ax.set_xlim(0, 1)
    style.grid(ax)
    style.name(
        ax, "share of the problems, in rising order", "error less the lowest of\n50 starts, % of $e_{\\mathrm{LoRA}}$"
    )
    style.legend(ax, loc="upper left")
    return figure
