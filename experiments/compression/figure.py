"""Errors pooled over the stacks of a set, as a figure and as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.compression.approaches import OF_CHANCE
from experiments.compression.collections import EVERY
from experiments.support import looks
from experiments.support.looks import Look
from experiments.support.rows import Row
from rasa_theory.plotting import style

CLAIMED = (0.03, 0.0776, 0.125, 0.5)
"""Sizes that are claimed to be enough, as shares of LoRA's parameters."""
CHANCE = Look("CP of random LoRAs", style.INK, "v:")


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


def shown(rows: Sequence[Row]) -> list[str]:
    """The sets in the figure: of the parts of a larger set the first, and all others."""
    names = list(dict.fromkeys(row["set"] for row in rows))
    parts = [name.split(" + ") for name in names if " + " in name]
    return [name for name in names if not any(name in part[1:] for part in parts)]


def plot(rows: list[Row]) -> Figure:
    """A line of two panels for each set of `shown`: over adapters and layers, and over adapters alone."""
    names = shown(rows)
    figure = style.new_figure(1.5 + 2.6 * len(names))
    axes = style.panels(figure, len(names), 2, sharey=True, sharex=True)
    for name, line in zip(names, axes, strict=True):
        count = max(row["adapters"] for row in rows if row["set"] == name)
        for over_layers, ax in zip((True, False), line, strict=True):
            if not pooled(rows, name, over_layers):
                ax.set_axis_off()
                continue
            draw(ax, rows, name, over_layers)
            axis = "adapters x layers" if over_layers else "adapters, layer by layer"
            style.name(ax, title=f"{name}\n{count} {axis}")
    for ax in axes[-1]:
        style.name(ax, "parameters, % of the LoRAs")
    for ax in axes[:, 0]:
        style.name(ax, y="error / $\\|M\\|^2$")
    handles = {line.get_label(): line for ax in axes.flat for line in ax.get_lines()}
    labels = [look.name for look in (*looks.METHODS.values(), CHANCE) if look.name in handles]
    style.legend(figure, [handles[label] for label in labels], labels, loc="outside lower center", ncols=3)
    return figure


def draw(ax: Axes, rows: Sequence[Row], name: str, over_layers: bool) -> None:
    errors = pooled(rows, name, over_layers)
    chance = pooled(rows, name, over_layers, "random")
    lines = [(look, method, errors) for method, look in looks.METHODS.items()]
    for look, method, of in [*lines, (CHANCE, "joint_diagonal", chance)]:
        points = sorted((share, error) for (m, share), error in of.items() if m == method and share is not None)
        if points:
            ax.plot([100 * share for share, _ in points], [error for _, error in points], look.line, color=look.color,
                    ms=4, lw=1.2, label=look.name)  # fmt: skip
    for share in CLAIMED:
        ax.axvline(100 * share, color=style.PALE, linewidth=0.8, zorder=0)
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set_xticks([100 * share for share in CLAIMED], [f"{100 * share:g}" for share in CLAIMED])
    ax.set_ylim(0, 1.05)


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
