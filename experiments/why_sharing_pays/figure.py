"""The figure of the experiment, seven panels, and its table as text."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from experiments.support.rows import Row
from rasa_theory.plotting import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HOW = ("as they are", "attention output transposed", "turned apart")
"""Ways to put layers into one stack. Transposed, all kinds face the residual stream with the same side."""
ALLOCATION, SHARING = style.BLUE, style.VERMILION
E_LORA = "$e_{\\mathrm{LoRA}}$"


class Results:
    """Look-ups in the rows of the table."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def column(self, name: str, **where: Any) -> list[Any]:
        """The different values of a column without None, in order."""
        values = dict.fromkeys(row[name] for row in self.rows if matches(row, where))
        return [value for value in values if value is not None]

    def values(self, item: str, **where: Any) -> list[float]:
        """All values of an item, in order."""
        return [float(row["value"]) for row in self.rows if row["item"] == item and matches(row, where)]

    def value(self, item: str, **where: Any) -> float:
        """The single value of an item."""
        (value,) = self.values(item, **where)
        return value


def matches(row: Row, where: dict[str, Any]) -> bool:
    return all(row[key] == value for key, value in where.items())


def plot(rows: list[Row]) -> Figure:
    """Seven panels, a to g."""
    table = Results(rows)
    heights = (2.7, 2.6, 3.0, 2.1, 2.4)
    figure = style.new_figure(sum(heights))
    lines: Any = figure.subfigures(5, 1, height_ratios=heights)
    ((a,),) = style.panels(lines[0])
    ((b, c),) = style.panels(lines[1], 1, 2, width_ratios=(3.5, 2))
    ((d, e),) = style.panels(lines[2], 1, 2, width_ratios=(2, 2.5))
    ((f,),) = style.panels(lines[3])
    draw_gain(a, table)
    draw_owners(b, table)
    draw_losses(c, table)
    draw_sides(d, table)
    draw_depth(e, table)
    draw_kinds(f, table)
    ((g,),) = style.panels(lines[4])
    draw_tasks(g, table)
    for ax, letter in zip((a, b, c, d, e, f, g), "abcdefg", strict=True):
        style.name(ax, title=f"{letter}  {ax.get_title()}")
    return figure


def percent(x: float) -> float:
    return 100 * x


def stems(ax: Axes, points: list[tuple[float, float, float]]) -> None:
    """Draw the gain of allocation at each x, and the gain of sharing on top, in per cent of e_lora."""
    x = [at for at, _, _ in points]
    low, high = ([percent(1 - error) for error in errors] for errors in list(zip(*points, strict=True))[1:])
    ax.vlines(x, 0, low, color=ALLOCATION, lw=3)
    ax.vlines(x, low, high, color=SHARING, lw=3)
    ax.plot(x, low, "s", color=ALLOCATION, ms=5, label="unequal allocation")
    ax.plot(x, high, "o", color=SHARING, ms=6, label="and sharing, best found")


def under(ax: Axes, text: str, x: float, points: float) -> None:
    """Write text below the ticks."""
    style.note(ax, text, (x, 0), xycoords=("data", "axes fraction"), xytext=(0, -points), textcoords="offset points",
               ha="center", va="top")  # fmt: skip


def draw_gain(ax: Axes, table: Results) -> None:
    x, ticks, points, null = 0.0, [], [], []
    for name in table.column("stack", part="pool", source="updates"):
        first = x
        for k in table.column("k", part="pool", source="updates", stack=name):
            where = {"part": "pool", "source": "updates", "stack": name, "k": k}
            allocation, best, floor = (table.value(item, **where) for item in ("allocation", "best_found", "floor"))
            points.append((x, allocation, best))
            style.note(ax, f"{percent(best - floor):.1f}", (x, percent(1 - best)), xytext=(0, 4),
                       textcoords="offset points", ha="center", color=style.GREY)  # fmt: skip
            null += [(x, percent(1 - error)) for error in table.values("best_found", **(where | {"source": HOW[2]}))]
            ticks.append((x, k))
            x += 1
        under(ax, name, (first + x - 1) / 2, 18)
        x += 0.6
    stems(ax, points)
    if null:
        ax.plot(*zip(*null, strict=True), "_", color=style.INK, ms=13, mew=2, label="the same, layers turned apart")
    ax.plot([], [], " ", color=style.GREY, label="grey: at most so much more")
    ax.set_xticks([at for at, _ in ticks], [str(k) for _, k in ticks])
    ax.set_ylim(0, 1.65 * max(percent(1 - best) for _, _, best in points))
    style.note(ax, "k =", (0, 0), xycoords="axes fraction", xytext=(-4, -5), textcoords="offset points", ha="right",
               va="top")  # fmt: skip
    style.name(ax, y=f"% of {E_LORA}", title="what the pool takes off LoRA's error")
    ax.set_xlabel("k of each layer's 8 ranks go to the pool", fontsize=style.MEDIUM, labelpad=18)
    style.legend(ax, loc="upper center", ncols=2, borderaxespad=0, columnspacing=1.2)


def draw_owners(ax: Axes, table: Results) -> None:
    """Draw one dot for each pool term, k = 1."""
    sources = table.column("source", part="pool")
    looks: tuple[tuple[float, str, str, dict[str, Any]], ...] = (
        (-0.19, "by_loss", "by loss without it", {"marker": "o", "color": SHARING}),
        (0.19, "by_weight", "by weight $d^2$", {"marker": "D", "color": style.GREY, "mfc": "none"}),
    )
    for shift, item, label, look in looks:
        x, y = [], []
        for n, source in enumerate(sources):
            ratios = table.values(item, part="pool", source=source, k=1)
            x += [n + shift + 0.24 * ((i * 0.618) % 1 - 0.5) for i in range(len(ratios))]
            y += ratios
        ax.plot(x, y, linestyle="none", ms=4, label=label, **look)
    ax.set_xticks(range(len(sources)), [source.replace(" ", "\n") for source in sources])
    style.name(ax, "stacks, four kinds of each", "participation ratio", "layers that a term serves, k = 1")
    style.legend(ax, loc="center right", bbox_to_anchor=(1.0, 0.68), borderaxespad=0, handletextpad=0.2)


def draw_losses(ax: Axes, table: Results) -> None:
    """Draw layers against pool terms: updates on the left, with hidden dyads on the right."""
    ticks, start = [], 0
    for source in ("updates", "hidden dyads"):
        values = table.values("loss_share", part="pool", source=source, stack="query", k=1)
        L = round(len(values) ** 0.5)
        grid = torch.tensor(values).reshape(L, L)
        grid = grid[grid.max(1).values.argsort(descending=True)]
        terms, layers = torch.meshgrid(torch.arange(L) + start, torch.arange(L), indexing="ij")
        ax.scatter(terms.flatten().tolist(), layers.flatten().tolist(), (75 * grid.flatten()).tolist(),
                   color=style.BLUE, linewidths=0)  # fmt: skip
        ticks.append((start + (L - 1) / 2, source.replace(" ", "\n")))
        ax.set_yticks(range(L))
        start += L + 1
    ax.axvline(start / 2 - 1, color=style.PALE, lw=0.8)
    ax.set_xlim(-0.8, start - 1.2)
    ax.set_ylim(start / 2 - 1.3, -0.7)
    ax.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
    style.name(ax, "terms (area: share)", "layer", "who loses, query")


def draw_sides(ax: Axes, table: Results) -> None:
    for source, line in (("updates", "-"), ("second task", "-."), ("weights", "--")):
        for name in table.column("stack", part="side", source=source):
            for side in ("columns", "rows"):
                faces = side == ("columns" if name == "attention_output" else "rows")
                y = table.values(f"projector_{side}", part="side", source=source, stack=name)
                ax.plot(range(1, len(y) + 1), y, line, color=SHARING if faces else style.GREY, lw=1.2)
    level = max(table.values("unrelated_rows", part="side"))
    ax.axhline(level, color=style.INK, lw=1, ls=":")
    for line, color, label in (
        ("-", SHARING, "stream side"), ("-", style.GREY, "other side"),
        ("-.", style.INK, "second task"), ("--", style.INK, "weights"), (":", style.INK, "unrelated, most"),
    ):  # fmt: skip
        ax.plot([], [], line, color=color, lw=1.2, label=label)
    ax.set_xticks((1, 4, 8, 12, 16))
    ax.set_ylim(0, 1.1)
    style.name(ax, "number of eigenvalue", "eigenvalue of the\nmean projector", "what layers share")
    style.legend(ax, loc="upper right", borderaxespad=0, labelspacing=0.2)


def draw_depth(ax: Axes, table: Results) -> None:
    x, ticks, points = 0.0, [], []
    for source in table.column("source", part="depth"):
        first = x
        for name in table.column("stack", part="depth", source=source):
            ks = table.column("k", part="depth", source=source, stack=name)
            for n, k in enumerate(ks):
                where = {"part": "depth", "source": source, "stack": name, "k": k}
                points.append((x + n, table.value("allocation", **where), table.value("best_found", **where)))
            ticks.append((x + (len(ks) - 1) / 2, name.removeprefix("L = ")))
            x += len(ks) + 0.3
        words = {"independent": "inde-\npendent"}.get(source, "\n".join(source.rsplit(" ", 1)))
        under(ax, words, (first + x - 1.3) / 2, 18)
        x += 0.5
    stems(ax, points)
    ax.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
    ax.set_ylim(0, None)
    every_k = ", ".join(map(str, table.column("k", part="depth")))
    style.name(ax, y=f"% of {E_LORA}", title="query's spectra, L layers")
    ax.set_xlabel(f"L (k = {every_k} each); bases", fontsize=style.MEDIUM, labelpad=29)


def draw_kinds(ax: Axes, table: Results) -> None:
    kinds = [("updates", name) for name in table.column("stack", part="pool", source="updates")]
    groups = {}
    for k in table.column("k", part="kinds"):
        bars = {"a pool\neach": separate_pools(table, kinds, k)}
        for source, label in zip(HOW, ("one for\nall", "output\nflipped", "turned\napart"), strict=True):
            bars[label] = both_errors(table, part="kinds", source=source, k=k)
        groups[k] = bars
    for k, (first, _) in zip(groups, draw_pools(ax, list(groups.values())), strict=True):
        style.note(ax, f"k = {k}", (first, 1), xycoords=("data", "axes fraction"), ha="center", va="top")
    style.name(ax, y=f"% of {E_LORA}", title="a pool for each of four kinds, or one over all")


def draw_tasks(ax: Axes, table: Results) -> None:
    groups = {}
    for name in table.column("stack", part="tasks"):
        bars = {"each": separate_pools(table, [("updates", name), ("second task", name)], 1)}
        for source, label in ((HOW[0], "one"), (HOW[2], "apart")):
            bars[label] = both_errors(table, part="tasks", source=source, stack=name, k=1)
        groups[name] = bars
    for name, ends in zip(groups, draw_pools(ax, list(groups.values())), strict=True):
        under(ax, name, sum(ends) / 2, 18)
    style.name(ax, y=f"% of {E_LORA}", title="two tasks, k = 1: a pool each, one over both, turned apart")
    ax.set_xlabel("pools over the layers of two tasks", fontsize=style.MEDIUM, labelpad=18)


def draw_pools(ax: Axes, groups: list[dict[str, tuple[float, float]]]) -> list[tuple[float, float]]:
    """Draw groups of stems, label -> (allocation, best error); returns the x at which each group begins and ends."""
    points, ticks, ends, x = [], [], [], 0.0
    for bars in groups:
        ends.append((x, x + len(bars) - 1))
        for label, (allocation, best) in bars.items():
            points.append((x, allocation, best))
            ticks.append((x, label))
            style.note(ax, f"{percent(1 - best):.2f}", (x, percent(1 - best)), xytext=(0, 5),
                       textcoords="offset points", ha="center", color=style.GREY)  # fmt: skip
            x += 1
        x += 0.4
    stems(ax, points)
    ax.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
    ax.set_ylim(0, 1.2 * max(percent(1 - best) for _, _, best in points))
    return ends


def both_errors(table: Results, **where: Any) -> tuple[float, float]:
    """Allocation bound and best error of one pool, in units of e_lora."""
    return table.value("allocation", **where), table.value("best_found", **where)


def separate_pools(table: Results, stacks: list[tuple[str, str]], k: int) -> tuple[float, float]:
    """Allocation bound and best error of one pool for each (source, stack), summed, in units of their e_lora."""
    pools = [{"part": "pool", "source": source, "stack": name} for source, name in stacks]
    e_lora = [table.value("e_lora", **where) for where in pools]
    errors = []
    for item in ("allocation", "best_found"):
        ratios = [table.value(item, k=k, **where) for where in pools]
        errors.append(sum(e * ratio for e, ratio in zip(e_lora, ratios, strict=True)) / sum(e_lora))
    return errors[0], errors[1]


def summary(table: Results) -> Iterator[str]:
    """Yield one line for each solution, with the least, the median and the largest ratio of its terms."""
    for part in ("pool", "depth", "width", "kinds", "tasks"):
        for source in table.column("source", part=part):
            for name in table.column("stack", part=part, source=source):
                for k in table.column("k", part=part, source=source, stack=name):
                    where = {"part": part, "source": source, "stack": name, "k": k}
                    allocation, best, floor = (table.value(i, **where) for i in ("allocation", "best_found", "floor"))
                    gains = [percent(x) for x in (1 - allocation, allocation - best, best - floor)]
                    terms = "".join(
                        f"  {item} {min(y):.2f} {statistics.median(y):.2f} {max(y):.2f}"
                        for item in ("by_loss", "by_weight")
                        for y in [table.values(item, **where)]
                    )
                    yield (
                        f"{source:28} {name:17} k = {k}  allocation {gains[0]:6.3f} %  sharing {gains[1]:6.3f} %"
                        f"  unknown {gains[2]:6.3f} %{terms}"
                    )
    for row in table.rows:
        if row["item"].startswith("overlap"):
            yield f"{row['stack']:17} {row['item']} {row['index']} {float(row['value']):.4f}"
        if row["item"] == "one_sided":
            yield f"{row['source']:28} {row['stack']:17} one-sided {row['index']:18} {float(row['value']):.4f} e_lora"
