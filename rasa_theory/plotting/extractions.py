"""The figure of an extraction: a heat map of what the file misses, single matrices as points, and error against rank.

matplotlib is imported where a figure is drawn, so that the package can be imported without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rasa_theory.common import shortened, unique_labels
from rasa_theory.plotting import style
from rasa_theory.plotting.heat_map import LINE, LONGEST, heat_map, width_beside
from rasa_theory.plotting.style import BLUE, COLOURS, GREY, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TALLEST = 40  # rows of the heat map that have a name each; of more, every second or third has one
_POINTS = 30  # single matrices that are shown, the worst of them
_CURVES = len(COLOURS)  # kinds with a curve of their own
_TICKS = 6  # at most, of ranks


def plot_extraction(report: dict[str, Any]) -> Figure:
    """Plot what the file of `python -m rasa_theory.extract` misses, as shares of the squared norm of each update.

    - A heat map: kinds of module by layers. Where several adapters were compressed together: modules by adapters.
    - Points with a name: matrices that are the only layer of their kind.
    - Curves: the error of the best LoRA against its rank, of the kinds with the largest updates and of all together.

    Format diff misses nothing but rounding: it has the size of the updates in the heat map instead.
    """
    settings = report["plan"]["settings"]
    rows = [row for row in report["stacks"] if row["norm_squared"] > 0]
    labels = unique_labels([row["kind"] for row in rows], [row["name"].replace(".weight", "") for row in rows])
    rows = [row | {"label": label} for row, label in zip(rows, shortened(labels, LONGEST), strict=True)]
    many = [row for row in rows if len(row["modules"]) > 1]
    single = [row for row in rows if len(row["modules"]) == 1]
    curves = [row for row in rows if len(row["error_at_rank"]) > 1]
    heights = {
        "map": 1.0 + LINE * min(len(many), 2 * _TALLEST) if many else 0.0,
        "points": 1.0 + LINE * min(len(single), _POINTS) if single else 0.0,
        "curves": 2.4 if curves else 0.0,
    }
    legend = 0.3 + LINE * min(len(curves) + 1, _CURVES) if curves else 0.0
    shown = {name: height for name, height in heights.items() if height > 0}
    title = "How large are the updates?" if settings["format"] == "diff" else "What does the adapter miss?"
    figure = style.new_figure(
        max(sum(shown.values()) + legend + 0.2, 2.0), width_beside([row["label"] for row in rows]), title=title
    )
    if not shown:
        return figure
    axes = style.panels(figure, len(shown), 1, height_ratios=list(shown.values()))
    panel_of = dict(zip(shown, axes.flat, strict=True))
    value = "norm_squared" if settings["format"] == "diff" else "e_stored"
    if many:
        _heat_map(panel_of["map"], many, value, "adapter" if settings["tasks"] else "layer")
    if single:
        _points(panel_of["points"], single, value)
    if curves:
        _curves(panel_of["curves"], curves)
        lines = panel_of["curves"].get_legend_handles_labels()[0]
        style.legend(figure, handles=lines, loc="outside lower left")
    return figure


def _shares(row: dict[str, Any], value: str) -> list[float | None]:
    """What the file misses of each module, relative to its update; for format diff, its share of its stack."""
    if value == "norm_squared":
        return [module["norm_squared"] / row["norm_squared"] for module in row["modules"]]
    return [m[value] / m["norm_squared"] if m["norm_squared"] > 0 else None for m in row["modules"]]


def _meaning(value: str) -> str:
    return "share of the kind's squared norm" if value == "norm_squared" else "missed share of the update"


def _heat_map(ax: Axes, rows: Sequence[dict[str, Any]], value: str, across: str) -> None:
    """Kinds of module downwards, layers or adapters across; what is not there stays white."""
    grid: list[list[float | None]] = []
    for row in rows:
        places = [i if module["layer"] is None else module["layer"] for i, module in enumerate(row["modules"])]
        share_at = dict(zip(places, _shares(row, value), strict=True))
        grid.append([share_at.get(place) for place in range(max(places) + 1)])
    heat_map(ax, grid, [row["label"] for row in rows], _meaning(value))
    step = -(-len(rows) // _TALLEST)
    ax.set_yticks(range(0, len(rows), step), [row["label"] for row in rows[::step]])
    style.name(ax, x=across)


def _points(ax: Axes, rows: Sequence[dict[str, Any]], value: str) -> None:
    """One line with a name and a point for every matrix that is alone, the worst above."""
    ranked = sorted(rows, key=lambda row: -(_shares(row, value)[0] or 0.0))[:_POINTS]
    heights = range(len(ranked))
    ax.plot([_shares(row, value)[0] or 0.0 for row in ranked], heights, "o", color=BLUE)
    ax.set_yticks(heights, [row["label"] for row in ranked])
    ax.set_ylim(len(ranked) - 0.5, -0.5)
    ax.set_xlim(left=0.0)
    style.grid(ax)
    more = f" (the worst {_POINTS} of {len(rows)})" if len(rows) > _POINTS else ""
    style.name(ax, x=f"{_meaning(value)}{more}")


def _curves(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """The squared error of the best LoRA against its rank, relative to the squared norm."""
    ranked = sorted(rows, key=lambda row: -row["norm_squared"])[: _CURVES - 1]
    for row, colour, marker in zip(ranked, COLOURS, style.MARKERS, strict=False):
        ranks = [int(rank) for rank in row["error_at_rank"]]
        errors = [error / row["norm_squared"] for error in row["error_at_rank"].values()]
        ax.plot(ranks, errors, color=colour, marker=marker, markersize=4, linewidth=1.2, label=row["label"])
    common = [rank for rank in rows[0]["error_at_rank"] if all(rank in row["error_at_rank"] for row in rows)]
    norm = sum(row["norm_squared"] for row in rows)
    whole = [sum(row["error_at_rank"][rank] for row in rows) / norm for rank in common]
    ax.plot([int(rank) for rank in common], whole, color=INK, linewidth=2.2, label="all")
    ax.axhline(0.0, color=GREY, linewidth=0.8)
    ax.set_xscale("symlog", base=2, linthresh=1)
    ticks = sorted({int(rank) for row in rows for rank in row["error_at_rank"] if int(rank) & (int(rank) - 1) == 0})
    ticks = ticks[:: -(-len(ticks) // _TICKS)]
    ax.set_xticks(ticks, [str(rank) for rank in ticks], minor=False)
    ax.set_xlim(left=0)
    ax.set_ylim(-0.02, 1.02)
    style.name(ax, x="rank of the best LoRA", y="missed share")
