"""The three figures of the experiment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.support import looks
from experiments.support.rows import Row
from rasa_theory.plotting import style

AXES: dict[str, tuple[str, Callable[[Row], Any]]] = {
    "L": ("layers L", lambda row: row["layers"]),
    "b": ("rows b", lambda row: row["b"]),
    "R": ("pool's rank R", lambda row: row["layers"] * row["k"]),
    "k": ("shared ranks k", lambda row: row["k"]),
}
"""What an axis of growth is called, and its value in a row."""
TRACED = {
    **{f"{name} sweeps": looks.SWEEPS[name] for name in ("joint", "core", "paper")},
    **{name: looks.CODES[name] for name in ("tensorly parafac", "pyttb cp_als")},
}


def plot_growth(rows: list[Row]) -> Figure:
    """Seconds of a joint sweep and of its products, one panel per axis."""
    base = next(row for row in rows if row["axis"] == "R")
    figure = style.new_figure(3.6, title="What makes a joint sweep slower?")
    axes = style.panels(figure, 2, 2, sharey=True)
    for n, (panel, (axis, (label, value))) in enumerate(zip(axes.flat, AXES.items(), strict=True)):
        for method, look in (("joint", looks.SWEEPS["joint"]), ("its two products", looks.SWEEPS["products"])):
            points = [row for row in rows if row["axis"] == axis and row["method"] == method]
            x, y = [value(p) for p in points], [p["seconds_min"] for p in points]
            panel.loglog(x, y, look.line, color=look.color, ms=4, label=look.name)
            if n == 1:
                at: dict[str, Any] = {"xy": (0.03, 0.62)} if method == "joint" else {"xy": (0.97, 0.06), "ha": "right"}
                style.note(panel, look.name, at.pop("xy"), xycoords="axes fraction", color=look.color, **at)
        panel.set_xticks(x, [str(t) for t in x])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.tick_params(axis="x", which="minor", length=0)
        style.grid(panel)
        style.name(panel, label, "seconds" if n % 2 == 0 else "")
    figure.supxlabel("one value changed of {layers} × {b} × {a}, {dtype}".format(**base), fontsize=style.MEDIUM)
    return figure


def plot_cost(rows: list[Row]) -> Figure:
    """Seconds of a sweep over those of the two products of a joint one, against the operations of these."""
    figure = style.new_figure(2.9, title="What does a sweep cost beyond its products?")
    panel = style.panels(figure)[0, 0]
    ends = []
    for (method, dtype), values in sorted(costs(rows).items()):
        look = looks.SWEEPS["joint"] if method == "joint" else looks.CODES[method]
        face = "none" if dtype == "float32" else look.color
        panel.loglog(*zip(*values, strict=True), look.marker, color=look.color, markersize=4, markerfacecolor=face)
        ends.append((*max(values), f"{look.name.removesuffix(' sweep')}, {dtype}", look.color))
    panel.axhline(1.0, color=style.INK, linewidth=1)
    panel.set_ylim(bottom=min(0.8, panel.get_ylim()[0]))
    panel.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    panel.yaxis.set_minor_formatter(NullFormatter())
    style.name(panel, "operations of the products", "seconds of a sweep\n/ of its two products")
    style.grid(panel)
    style.label_ends(panel, ends, 0.1)
    return figure


def costs(rows: list[Row]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """By method and dtype: operations of the two products of a joint sweep, and seconds over theirs."""
    points: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["part"] in ("sweep", "growth"):
            point = tuple(row[name] for name in ("part", "layers", "b", "a", "rank", "k", "dtype"))
            points.setdefault(point, {})[row["method"]] = row["seconds_min"]
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (_, L, b, a, rank, k, dtype), seconds in points.items():
        products, operations = seconds["its two products"], 4 * L * b * a * (rank - k + L * k)
        for method, least in seconds.items():
            if method != "its two products":
                series.setdefault((method, dtype), []).append((operations, least / products))
    return series


def plot_passes(traces: list[Row]) -> Figure:
    """Error against passes and seconds, for the least and the largest k; the start is drawn at one pass."""
    ks = sorted({row["k"] for row in traces})
    ks = [ks[0], ks[-1]] if len(ks) > 1 else ks
    figure = style.new_figure(1.3 + 1.35 * len(ks), title="Which sweep is the fastest?")
    axes = style.panels(figure, len(ks), 2, sharex="col", sharey="row")
    for (left, right), k in zip(axes, ks, strict=True):
        for method, look in TRACED.items():
            run = [row for row in traces if row["k"] == k and row["method"] == method]
            passes, seconds, errors = ([row[key] for row in run] for key in ("passes", "seconds", "error"))
            if run:
                settings = {"color": look.color, "markersize": 2.5, "linewidth": 1, "label": look.name}
                left.semilogx([max(p, 1) for p in passes], errors, look.line, **settings)
                right.semilogx(seconds[1:], errors[1:], look.line, **settings)
        for panel in (left, right):
            style.grid(panel)
        style.name(left, y=f"k = {k}: error / $e_{{\\mathrm{{LoRA}}}}$")
    style.name(axes[-1, 0], "passes over M")
    style.name(axes[-1, 1], "seconds")
    style.legend(figure, *axes[-1, 0].get_legend_handles_labels(), loc="outside lower left", ncols=3, columnspacing=1.0)
    return figure
