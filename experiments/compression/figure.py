"""Errors pooled over the stacks of a set, as tables, and four of them as a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from experiments.compression.approaches import OF_CHANCE
from experiments.compression.collections import EVERY
from experiments.support import looks
from experiments.support.looks import Look
from experiments.support.rows import Row
from rasa_theory.plotting import style

CLAIMED = (0.03, 0.0776, 0.125, 0.5)
"""Sizes that are claimed to be enough, as shares of LoRA's parameters."""
LINES = {
    ("allocated", "trained"): Look("largest terms", style.INK, "s-"),
    ("joint_diagonal", "trained"): looks.METHODS["joint_diagonal"],
    ("joint_diagonal", "random"): Look("joint, CP,\nrandom LoRAs", style.GREY, "v:"),
    ("share_columns", "trained"): Look("SHARE", style.BLUE, "h-"),
}
"""What the figure shows: method and source, and the look of its line."""


def pooled(
    rows: Sequence[Row], name: str, over_layers: bool, source: str = "trained"
) -> dict[tuple[str, float | None], float]:
    """(method, share) -> error / ||M||^2, the mean over the kinds (and layers) of a set, and over draws.

    Only where every stack has room for the method.
    """
    own = [row for row in rows
           if row["set"] == name and row["source"] == source and (row["layer"] == EVERY) == over_layers]  # fmt: skip
    stacks = {(row["kind"], row["layer"]) for row in own}
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in own:
        groups.setdefault((row["method"], row["share"]), []).append(row)
    return {
        key: statistics.fmean(row["error"] for row in group)
        for key, group in groups.items()
        if {(row["kind"], row["layer"]) for row in group} == stacks
    }


def needed(errors: dict[tuple[str, float | None], float], method: str, most: float) -> float | None:
    """The least computed share at which a method has an error of at most `most`."""
    return min((share for (name, share), error in errors.items()
                if name == method and share is not None and error <= most), default=None)  # fmt: skip


def plot(rows: list[Row]) -> Figure:
    """Four lines for the first set, over adapters and layers: error against the share of the parameters."""
    name = rows[0]["set"]
    figure = style.new_figure(2.6, title="Do trained LoRAs have terms in common?")
    ((ax,),) = style.panels(figure)
    ends = []
    for (method, source), look in LINES.items():
        errors = pooled(rows, name, True, source)
        points = sorted((share, error) for (m, share), error in errors.items() if m == method and share is not None)
        if points:
            x, y = [100 * share for share, _ in points], [error for _, error in points]
            ax.plot(x, y, look.line, color=look.color, ms=4, lw=1.3)
            ends.append((x[-1], y[-1], look.name, look.color))
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set_xticks([100 * share for share in CLAIMED], [f"{100 * share:.3g}" for share in CLAIMED])
    ax.set_ylim(0, 1.05)
    style.grid(ax)
    style.label_ends(ax, ends, 0.1)
    count = max(row["adapters"] for row in rows if row["set"] == name)
    style.name(ax, f"parameters, % of the {count} LoRAs", "error / $\\|M\\|^2$")
    return figure


def report(rows: list[Row]) -> Iterator[str]:
    """Yield the tables as text."""
    for name in dict.fromkeys(row["set"] for row in rows):
        for over_layers in (True, False):
            errors, chance = (pooled(rows, name, over_layers, source) for source in ("trained", "random"))
            shares = sorted({share for _, share in errors if share is not None})
            if not shares:
                continue
            where = "adapters x layers" if over_layers else "adapters, layer by layer"
            yield f"\n{name}, over {where}: error / ||M||^2, all kinds"
            yield f"{'':24}" + "".join(f"{100 * share:8.4g}%" for share in shares) + "    50 % left at, 10 % left at"
            for method in dict.fromkeys(method for method, share in errors if share is not None):
                line = "".join(f"{errors.get((method, share), math.nan):9.4f}" for share in shares)
                at = ", ".join("-" if x is None else f"{100 * x:g} %" for x in
                               (needed(errors, method, most) for most in (0.5, 0.1)))  # fmt: skip
                yield f"{method:24}{line}    {at}"
            for method in OF_CHANCE:
                line = "".join(f"{chance.get((method, share), math.nan):9.4f}" for share in shares)
                yield f"{method + ', random':24}{line}"
            for side in ("side_columns", "side_rows"):
                error, null = errors.get((side, None), math.nan), chance.get((side, None), math.nan)
                yield f"kept by one {side[5:-1]} space of r dimensions: {1 - error:.4f}, of random LoRAs {1 - null:.4f}"
