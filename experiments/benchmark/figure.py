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
    "L": ("layers L (R = {k} L)", lambda row: row["layers"]),
    "b": ("rows b", lambda row: row["b"]),
    "R": ("ranks of the pool R (q = {q})", lambda row: row["layers"] * row["k"]),
    "k": ("shared ranks k (r = {rank})", lambda row: row["k"]),
}
"""What an axis of growth is called, and its value in a row."""
TRACED = {
    **{f"{name} sweeps": looks.SWEEPS[name] for name in ("joint", "core", "paper")},
    **{name: looks.CODES[name] for name in ("tensorly parafac", "pyttb cp_als")},
}


def plot_growth(rows: list[Row]) -> Figure:
    """Seconds of a joint sweep and of its products, one panel per axis."""
    base = next(row for row in rows if row["axis"] == "R")
    figure = style.new_figure(5.4)
    axes = style.panels(figure, 2, 2, sharey=True)
    for n, (panel, (axis, (label, value))) in enumerate(zip(axes.flat, AXES.items(), strict=True)):
        for method, look in (("joint", looks.SWEEPS["joint"]), ("its two products", looks.SWEEPS["products"])):
            points = [row for row in rows if row["axis"] == axis and row["method"] == method]
            x, y = [value(p) for p in points], [p["seconds_min"] for p in points]
            panel.loglog(x, y, look.line, color=look.color, label=look.name)
            if n == 0:
                at = {"ha": "right", "xytext": (0, 9)} if method == "joint" else {"va": "top", "xytext": (8, -3)}
                style.note(panel, look.name, (x[1], y[1]), textcoords="offset points", color=look.color, **at)
        panel.set_xticks(x, [str(t) for t in x])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.tick_params(axis="x", which="minor", length=0)
        style.grid(panel)
        first = points[0]
        style.name(panel, label.format(**first, q=first["rank"] - first["k"]), "seconds" if n % 2 == 0 else "")
    shape = "{layers} x {b} x {a}, {dtype}".format(**base)
    figure.suptitle(f"One joint sweep around {shape}", fontsize=style.MEDIUM)
    return figure


def plot_cost(rows: list[Row]) -> Figure:
    """Seconds of a sweep over those of the two products of a joint one, against the operations of these."""
    figure = style.new_figure(4.2)
    panel = style.panels(figure)[0, 0]
    ends = []
    for (method, dtype), values in sorted(costs(rows).items()):
        look = looks.SWEEPS["joint"] if method == "joint" else looks.CODES[method]
        face = "none" if dtype == "float32" else look.color
        panel.loglog(*zip(*values, strict=True), look.marker, color=look.color, markersize=6, markerfacecolor=face)
        ends.append((*max(values), f"{look.name.removesuffix(' sweep')}, {dtype}", look.color))
    panel.axhline(1.0, color=style.INK, linewidth=1)
    panel.set_ylim(bottom=min(0.8, panel.get_ylim()[0]))
    panel.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    panel.yaxis.set_minor_formatter(NullFormatter())
    style.name(panel, "operations of the two products, 4 L b a (q + R)", "seconds of a sweep / of the products")
    style.grid(panel)
    style.label_ends(panel, ends, 0.075)
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
    """Error against passes and against seconds, one line of panels per k; the start is drawn at one pass."""
    ks = sorted({row["k"] for row in traces})
    figure = style.new_figure(1.0 + 2.1 * len(ks))
    axes = style.panels(figure, len(ks), 2, sharex="col", sharey="row")
    for (left, right), k in zip(axes, ks, strict=True):
        for method, look in TRACED.items():
            run = [row for row in traces if row["k"] == k and row["method"] == method]
            passes, seconds, errors = ([row[key] for row in run] for key in ("passes", "seconds", "error"))
            if run:
                settings = {"color": look.color, "markersize": 4, "linewidth": 1, "label": method}
                left.semilogx([max(p, 1) for p in passes], errors, look.line, **settings)
                right.semilogx(seconds[1:], errors[1:], look.line, **settings)
        for panel in (left, right):
            style.grid(panel)
        style.name(left, y=f"k = {k}:\nerror / $e_{{\\mathrm{{LoRA}}}}$")
    style.name(axes[-1, 0], "passes over M")
    style.name(axes[-1, 1], "seconds")
    style.legend(figure, *axes[-1, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
