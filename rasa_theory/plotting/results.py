"""Figures of results, in the common `style`.

matplotlib is imported where a figure is drawn, so that the package can be imported without it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rasa_theory.plotting import style
from rasa_theory.plotting.style import BLUE, GREEN, GREY, INK, MEDIUM, ORANGE, PURPLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_CLAIMED = 10  # iterations within which the paper is below LoRA


def plot_iterations(results: dict[str, Any]) -> Figure:
    """Plot the error of the random attempts against their iterations, in units of e_lora.

    There is one panel per stack and k >= 1. Lines mark e_lora, the allocation bound, the best error and the certified
    floor. If the floor is far below, a note replaces its line. Dots mark the first iteration below e_lora, and the
    vertical line marks iteration 10, the number that the paper gives.

    Arguments:
        results: the results of `study`, or the contents of results.json.

    Returns:
        The figure; `figure.savefig(path)` writes it.
    """
    panels = [(row, run) for row in results["stacks"] for run in row["runs"] if run["attempts"] and row["e_lora"] > 0]
    columns = max(1, min(len(panels), 2 if len(panels) <= 4 else 4))
    lines = max(1, math.ceil(len(panels) / columns))
    title = f"Is RaSA below LoRA within {_CLAIMED} iterations?"
    figure = style.new_figure(1.1 + 1.5 * lines, style.WIDTH / 2 * max(columns, 2), title)
    axes = style.panels(figure, lines, columns)
    shows_floor = [_panel(ax, row, run) for ax, (row, run) in zip(axes.flat, panels, strict=False)]
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_axis_off()
    if not panels:
        axes[0, 0].text(0.5, 0.5, "no random attempts in these results", ha="center", va="center", fontsize=MEDIUM)
        return figure
    for n, ax in enumerate(axes.flat):
        if len(panels) - columns <= n < len(panels):  # the lowest panel of its column
            style.name(ax, x="iteration")
    figure.supylabel("squared error / $e_{\\mathrm{LoRA}}$", fontsize=MEDIUM)
    style.legend(figure, handles=_legend(any(shows_floor)), loc="outside lower left", ncols=2, columnspacing=1.0)
    return figure


def _panel(ax: Axes, row: dict[str, Any], run: dict[str, Any]) -> bool:
    """Draw the attempts of one run, in units of e_lora, with lines for the levels to compare with.

    Returns whether the line of the floor is within the panel.
    """
    from matplotlib.ticker import MaxNLocator

    unit = row["e_lora"]
    allocation, best, floor = (run[key] / unit for key in ("e_allocation", "e_rasa", "lower_bound"))
    ax.axvline(_CLAIMED, color=GREY, linewidth=0.8, zorder=0)
    ax.axhline(1.0, color=INK, linewidth=1.2)
    for level, color, dash in ((allocation, GREEN, "--"), (best, BLUE, "-."), (floor, PURPLE, ":")):
        ax.axhline(level, color=color, linestyle=dash, linewidth=1.3)
    for attempt in run["attempts"]:
        ratios = [error / unit for error in attempt["history"]]
        ax.plot(range(1, len(ratios)), ratios[1:], color=ORANGE, linewidth=0.9, alpha=0.9, zorder=3)
        if attempt["iterations"] is not None:
            crossing = attempt["iterations"]
            ax.plot(
                crossing,
                ratios[crossing],
                "o",
                color=ORANGE,
                markeredgecolor=INK,
                markersize=3.8,
                markeredgewidth=0.7,
                zorder=4,
            )
    last = [attempt["history"][-1] / unit for attempt in run["attempts"]]
    early = [attempt["history"][min(5, len(attempt["history"]) - 1)] / unit for attempt in run["attempts"]]
    low, high = min(allocation, best, *last, 1.0), max(1.0, *early)
    shows_floor = bool(floor >= 2 * low - high)  # otherwise the curves would fill less than half of the panel
    if shows_floor:
        low = min(low, floor)
    else:
        style.note(ax, f"↓ floor {floor:.3f}", (0.98, 0.02), xycoords="axes fraction", color=PURPLE, ha="right")
        low -= 0.2 * (high - low)
    ax.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    longest = max(len(attempt["history"]) - 1 for attempt in run["attempts"])
    if 1.7 * _CLAIMED < longest < 20 * _CLAIMED:
        ax.set_xticks([_CLAIMED, longest])
    else:
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    ax.set_title(_title(row, run), fontsize=style.SMALL, loc="right")
    return shows_floor


def _title(row: dict[str, Any], run: dict[str, Any]) -> str:
    """The name of a stack, k, and how many attempts beat LoRA by iteration `_CLAIMED` and in all."""
    counts = [attempt["iterations"] for attempt in run["attempts"] if attempt["iterations"] is not None]
    early = sum(count <= _CLAIMED for count in counts)
    count = f"{early} of {len(run['attempts'])} by {_CLAIMED}, {len(counts)} in all"
    name = row["name"] if len(row["name"]) <= 18 else "..." + row["name"][-15:]
    return f"{name}, k = {run['k']}\n{count}"


def _legend(shows_floor: bool) -> list[Line2D]:
    """One entry for each kind of line in `_panel`."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=ORANGE, marker="o", markeredgecolor=INK, label="random starts (dot: below)"),
        Line2D([], [], color=INK, label="LoRA's optimum"),
        Line2D([], [], color=GREEN, linestyle="--", label="unequal ranks"),
        Line2D([], [], color=BLUE, linestyle="-.", label="RaSA, best found"),
    ]
    return lines + [Line2D([], [], color=PURPLE, linestyle=":", label="certified floor")] * shows_floor
