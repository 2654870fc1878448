"""The three figures of the experiment, and its table as text."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from experiments.support.rows import Row
from rasa_theory.plotting import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HOW = ("as they are", "attention output transposed", "turned apart")
"""Ways to put layers into one stack. Transposed, all kinds face the residual stream with the same side."""
EACH, LAYER, LAYERS = "a pool for each kind", "a pool for each layer", "a pool over different layers"
LAYER_APART = "a pool for each layer, turned apart"
"""Ways to have several pools. In all but the first a pool has one matrix of each kind, and the attention output is
transposed; they are of the same layer, or of layers L // 4 apart, which is 1 of MiniLM's 6 and 3 of mpnet's 12."""
RUNS = {"all kinds": ("code", 0), "all kinds, second seed": ("code", 1), "all kinds, prose": ("prose", 0)}
"""Task and seed of the runs whose kinds are put into pools, by their name in the column `stack`."""
FIRST_RUN = next(iter(RUNS))
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


def plot_gain(rows: list[Row]) -> Figure:
    """Bars for every kind and k: the gain of unequal ranks, and the gain of sharing on top."""
    table = Results(rows)
    figure = style.new_figure(2.7, title="Unequal ranks or sharing: what beats LoRA?")
    ((ax,),) = style.panels(figure)
    x, ticks, null = 0.0, [], []
    for name in table.column("stack", part="pool", source="updates"):
        first = x
        for k in table.column("k", part="pool", source="updates", stack=name):
            where = {"part": "pool", "source": "updates", "stack": name, "k": k}
            low, high = (percent(1 - error) for error in both_errors(table, **where))
            ax.bar(x, low, 0.75, color=ALLOCATION)
            ax.bar(x, high - low, 0.75, low, color=SHARING)
            null += [(x, percent(1 - error)) for error in table.values("best_found", **(where | {"source": HOW[2]}))]
            ticks.append((x, k))
            x += 1
        under(ax, name.replace("_", "\n"), (first + x - 1) / 2, 15)
        x += 0.7
    ax.bar(0, 0, color=SHARING, label="sharing")
    ax.bar(0, 0, color=ALLOCATION, label="unequal ranks")
    if null:
        ax.plot(*zip(*null, strict=True), "_", color=style.INK, ms=9, mew=1.8, label="layers turned apart")
    ax.set_xticks([at for at, _ in ticks], [str(k) for _, k in ticks])
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    style.note(ax, "k", (0, 0), xycoords="axes fraction", xytext=(-4, -4), textcoords="offset points", ha="right",
               va="top")  # fmt: skip
    style.name(ax, y=f"gain, % of {E_LORA}")
    ax.set_xlabel("k of the 8 ranks of each layer go to the pool", fontsize=style.MEDIUM, labelpad=23)
    handles = sorted(zip(*ax.get_legend_handles_labels(), strict=True), key=lambda entry: "turned" in entry[1])
    style.legend(ax, *zip(*handles, strict=True), loc="upper right", handlelength=1.2, borderaxespad=0)
    return figure


OWNERS = {
    "updates": "updates",
    "second task": "updates,\nsecond task",
    "turned apart": "updates,\nturned apart",
    "weights": "pretrained\nweights",
    "hidden dyads": "updates with\n3 shared dyads",
    "shared bases": "layers with\nequal bases",
}
"""Sources of stacks, with the names of their rows."""


def plot_owners(rows: list[Row]) -> Figure:
    """A row of dots for each source of stacks: one dot for each pool term, k = 1."""
    table = Results(rows)
    figure = style.new_figure(3.0, title="How many layers does a pool term serve?")
    ((ax,),) = style.panels(figure)
    present = table.column("source", part="pool")
    shown = [source for source in OWNERS if source in present]
    beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (46, 0), "textcoords": "offset points"}
    beside |= {"ha": "right", "va": "center"}
    style.note(ax, "more than 2", (1, -0.75), weight="bold", **beside)
    for n, source in enumerate(shown):
        served = table.values("by_loss", part="pool", source=source, k=1)
        jitter = [n + 0.5 * ((i * 0.618) % 1 - 0.5) for i in range(len(served))]
        is_real = source in ("updates", "second task", "weights")
        ax.plot(served, jitter, "o", color=SHARING if is_real else style.BLUE, ms=3, alpha=0.6)
        many = sum(count > 2 for count in served)
        style.note(ax, f"{many} of {len(served)}", (1, n), **beside)
    ax.set_yticks(range(len(shown)), [OWNERS[source] for source in shown])
    ax.set_ylim(len(shown) - 0.5, -0.6)
    ax.set_xlim(0.8, 6.2)
    ax.set_xticks(range(1, 7))
    style.name(ax, "layers that a term serves, k = 1")
    return figure


def plot_scope(rows: list[Row]) -> Figure:
    """Bars for four kinds together, and for two tasks of each kind: several pools, one pool, one pool turned apart."""
    table = Results(rows)
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    measured = table.column("source", part="kinds", stack=FIRST_RUN)
    ways = {EACH: EACH, LAYER: LAYER, LAYERS: "over different layers", LAYER_APART: "for each, turned apart",
            HOW[1]: "one pool", HOW[2]: "one, turned apart"}  # fmt: skip
    here = {"part": "kinds", "stack": FIRST_RUN, "k": 1}
    if bars := {ways[way]: both_errors(table, source=way, **here) for way in ways if way in measured}:
        groups["four kinds"] = bars
    for name in table.column("stack", part="tasks"):
        groups[f"two tasks, {name.replace('_', ' ')}"] = {
            "two pools": separate_pools(table, [("updates", name), ("second task", name)], 1),
            "one pool": both_errors(table, part="tasks", source=HOW[0], stack=name, k=1),
            "one, turned apart": both_errors(table, part="tasks", source=HOW[2], stack=name, k=1),
        }
    figure = style.new_figure(1.2 + 0.68 * len(groups), title="Does a pool over more layers share more?")
    ((ax,),) = style.panels(figure)
    y, ticks = 0.0, []
    for group, bars in groups.items():
        style.note(ax, group, (0, y - 0.75), xytext=(3, 0), textcoords="offset points", va="center", weight="bold")
        for label, errors in bars.items():
            low, high = (percent(1 - error) for error in errors)
            ax.barh(y, low, 0.75, color=ALLOCATION)
            ax.barh(y, high - low, 0.75, low, color=SHARING)
            style.note(ax, f"{high:.2f}", (high, y), xytext=(3, 0), textcoords="offset points", va="center")
            ticks.append((y, label))
            y += 0.85
        y += 1.05
    ax.barh(0, 0, color=ALLOCATION, label="unequal ranks")
    ax.barh(0, 0, color=SHARING, label="sharing")
    ax.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(y - 1.4, -1.3)
    ax.margins(x=0.12)
    style.name(ax, f"gain at r = 8, k = 1, % of {E_LORA}")
    style.legend_above(ax, 2)
    return figure


def percent(x: float) -> float:
    return 100 * x


def under(ax: Axes, text: str, x: float, points: float) -> None:
    """Write text below the ticks."""
    style.note(ax, text, (x, 0), xycoords=("data", "axes fraction"), xytext=(0, -points), textcoords="offset points",
               ha="center", va="top", linespacing=0.95)  # fmt: skip


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


FIGURES = {"sharing_gain": plot_gain, "pool_owners": plot_owners, "pool_scope": plot_scope}


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
        if row["item"] == "one_sided":
            yield f"{row['source']:28} {row['stack']:17} one-sided {row['index']:18} {float(row['value']):.4f} e_lora"
