"""The figure of an inspection: relative norms and missed energy of every layer, and error against rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rasa_theory.common import shortened
from rasa_theory.plotting import style
from rasa_theory.plotting.heat_map import LINE, LONGEST, heat_map, width_beside
from rasa_theory.plotting.style import BLUE, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN_RANK = 16
_MOST_KINDS = 40


def plot_inspection(report: dict[str, Any], kinds: Sequence[dict[str, Any]]) -> Figure:
    """Plot an inspection: two heat maps, layers by kinds, and the error of all modules against the rank.

    The first map shows ||M_i|| / ||W_i||, or the share of ||M||^2 without a base. The second shows the share of
    ||M_i||^2 that the rank nearest to 16 misses at most. The band around the curve lies between the certified bounds.

    Arguments:
        report: the contents of inspect.json.
        kinds: kinds of module with `kind`, `norm_squared` and `modules`, each with the `layer` of every module.

    Returns:
        A matplotlib `Figure`.
    """
    shown = [kind for kind in kinds if kind["norm_squared"] > 0][:_MOST_KINDS]
    height = max(1.2, 0.7 + LINE * len(shown))
    names = shortened([kind["kind"] for kind in shown], LONGEST)
    figure = style.new_figure(2 * height + 2.5, width_beside(names), title="Which rank do the updates need?")
    axes = figure.subplots(3, 1, gridspec_kw={"height_ratios": [height, height, 2.1]})
    if not shown:
        for ax in axes:
            ax.set_axis_off()
        style.note(axes[0], "nothing has changed", (0.5, 0.5), xycoords="axes fraction", ha="center")
        return figure
    n = min(range(len(report["ranks"])), key=lambda i: abs(report["ranks"][i] - _SHOWN_RANK))
    if report["relative_norm"] is not None:
        heat_map(axes[0], _cells(shown, _relative), names, r"$\|M_i\| / \|W_i\|$", log=True)
    else:
        total = report["norm_squared"]
        shares = _cells(shown, lambda modules: math.fsum(m["norm_squared"] for m in modules) / total)
        heat_map(axes[0], shares, names, r"share of $\|M\|^2$")
    title = f"share missed by LoRA({report['ranks'][n]})"
    heat_map(axes[1], _cells(shown, lambda modules: _missed(modules, n)), names, title)
    style.name(axes[1], x="layer")
    _curve(axes[2], report)
    return figure


def _cells(kinds: Sequence[dict[str, Any]], value: Any) -> list[list[float | None]]:
    """The value of the modules of each kind and layer; None where there are none, or they are zero."""
    rows: list[list[float | None]] = []
    for kind in kinds:
        together: dict[int, list[dict[str, Any]]] = {}
        for module in kind["modules"]:
            together.setdefault(module["layer"], []).append(module)
        rows.append([value(together[i]) if i in together else None for i in range(max(together) + 1)])
    return rows


def _relative(modules: Sequence[dict[str, Any]]) -> float | None:
    base = math.fsum(module["base_norm_squared"] for module in modules)
    return math.sqrt(math.fsum(module["norm_squared"] for module in modules) / base) if base > 0 else None


def _missed(modules: Sequence[dict[str, Any]], n: int) -> float | None:
    norm = math.fsum(module["norm_squared"] for module in modules)
    held = math.fsum(m["norm_squared"] * m["energy"][n][0] for m in modules if m["norm_squared"] > 0)
    return 1 - held / norm if norm > 0 else None


def _curve(ax: Axes, report: dict[str, Any]) -> None:
    """The error of all modules together against the rank, on a logarithmic axis of ranks."""
    style.dress(ax)
    style.grid(ax)
    ranks = [point["rank"] for point in report["curve"]]
    low, high = ([point["error"][bound] for point in report["curve"]] for bound in (0, 1))
    ax.fill_between(ranks, low, high, color=BLUE, alpha=0.3, linewidth=0)
    ax.plot(ranks, high, color=BLUE)
    ax.set_xscale("log", base=2)
    ax.set_xticks(report["ranks"], [str(rank) for rank in report["ranks"]], rotation=90)
    ax.set_ylim(0, 1.05 * max(high))
    found = (report["recommendation"] or {}).get("one_rank")
    title = "all modules together" if found is None else f"all modules; recommended: {found['rank']}"
    style.name(ax, x="rank of every module", y=r"missed share of $\|M\|^2$", title=title)
    if found is not None:
        ax.axvline(found["rank"], color=ORANGE, linestyle="--")
