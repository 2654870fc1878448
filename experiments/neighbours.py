"""RaSA beside its neighbours at equal parameters, on the bundled updates.

    python -m experiments.neighbours

For every bundled stack and r, each method of `rasa_theory.methods` at its best within the number of parameters of LoRA
of rank r (and 0.8 % more, since RaSA's mixing comes on top). Written to --out:

    neighbours.csv    one row per stack, r and method, as each is done; an interrupted run goes on from there. Columns:
                      settings, parameters, error and certified floor in units of ||M||^2, evidence, and the seconds of
                      all configurations
    neighbours.png    error in units of LoRA's, at the parameters of LoRA of rank 8
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

import rasa_theory as rt
from experiments.support import looks
from experiments.support.rows import Row, Table
from rasa_theory import methods
from rasa_theory.plotting import style

COLUMNS = (
    "stack", "r", "method", "settings", "parameters", "error", "floor", "evidence", "seconds",
)  # fmt: skip
KEY = ("stack", "r", "method")
SHOWN = 8
"""The rank of the LoRA whose parameters the methods in the figure have."""
FARTHEST = 1.19
"""The largest error that the figure shows, in units of LoRA's. Of a method above it the range is written."""


def bundled(smoke: bool) -> list[rt.LayerStack]:
    """The bundled stacks, or a corner of the first two."""
    stacks = rt.load("minilm-code")[0]
    return [rt.LayerStack(s.values[:3, :24, :16], s.name) for s in stacks[:2]] if smoke else stacks


def compared(stacks: list[rt.LayerStack], ranks: list[int], done: Table) -> Iterator[Row]:
    """Yield the rows that are not in `done`; equal configurations of a stack are solved once for all r."""
    solved: dict[tuple[str, str, str], Row] = {}
    for r, stack in itertools.product(ranks, stacks):
        parameters = methods.lora_parameters(stack.layers, stack.shape, r)
        for name, method in methods.METHODS.items():
            identity = {"stack": stack.name, "r": r, "method": name}
            if identity in done:
                continue
            tried = str(method.configurations(stack, methods.allowed(stack, parameters)))
            key = (stack.name, name, tried)
            if key not in solved:
                began = time.perf_counter()
                fit = methods.at_parameters(stack, parameters, [name]).get(name)
                if fit is None:
                    continue
                solved[key] = row_of(stack, fit) | {"seconds": round(time.perf_counter() - began, 2)}
            yield solved[key] | identity


def row_of(stack: rt.LayerStack, fit: methods.Fit) -> Row:
    """The facts of a fit, errors in units of ||M||^2."""
    return {
        "settings": " ".join(f"{key}={value}" for key, value in fit.settings.items()),
        "parameters": fit.parameters,
        "error": fit.error / stack.norm_squared,
        "floor": "" if fit.floor is None else fit.floor / stack.norm_squared,
        "evidence": fit.evidence.name.lower().replace("_", " "),
    }


def plot(rows: list[Row]) -> Figure:
    """A row for each method, a point for each stack: error over LoRA's at the same parameters, r = 8."""
    r = SHOWN if any(row["r"] == SHOWN for row in rows) else max(row["r"] for row in rows)
    own = [row for row in rows if row["r"] == r]
    lora = {row["stack"]: row["error"] for row in own if row["method"] == "lora"}
    ratios = {
        method: [row["error"] / lora[row["stack"]] for row in own if row["method"] == method]
        for method in looks.METHODS
        if any(row["method"] == method for row in own)
    }
    order = sorted(ratios, key=lambda method: statistics.fmean(ratios[method]))
    figure = style.new_figure(0.9 + 0.19 * len(order), title="Which methods beat LoRA at equal parameters?")
    ((ax,),) = style.panels(figure)
    ax.axvline(1, color=style.INK, linewidth=1, zorder=1)
    for y, method in enumerate(order):
        look, inside = looks.METHODS[method], [x for x in ratios[method] if x <= FARTHEST]
        ax.plot(inside, [y] * len(inside), look.marker, color=look.color, ms=4.5)
        if len(inside) < len(ratios[method]):
            text = f"{min(ratios[method]):.2f} to {max(ratios[method]):.2f} →"
            style.note(ax, text, (FARTHEST, y), color=look.color, ha="right", va="center")
    ax.set_yticks(range(len(order)), [looks.METHODS[method].name for method in order])
    for label, method in zip(ax.get_yticklabels(), order, strict=True):
        label.set(color=looks.METHODS[method].color, weight="bold" if method == "rasa" else "normal")
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_xlim(right=FARTHEST)
    ax.grid(axis="y", color=style.PALE, linewidth=0.5)
    ax.set_axisbelow(True)
    style.name(ax, f"error / LoRA's, {len(lora)} kinds of layers, r = {r}")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--smoke", action="store_true", help="a corner of two stacks at ranks 1 and 2, in seconds")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)
    ranks, stacks = ([1, 2] if options.smoke else options.ranks), bundled(options.smoke)

    table = Table(options.out / "neighbours.csv", COLUMNS, KEY)
    with tqdm(total=len(stacks) * len(ranks) * len(methods.METHODS)) as bar:
        bar.update(len(table.rows))
        for row in compared(stacks, ranks, table):
            table.add([row])
            bar.set_description(f"{row['stack']}, r = {row['r']}, {row['method']}")
            bar.update()
    rows = table.rows
    style.save(plot(rows), options.out / "neighbours.png")
    for r in ranks:
        print(f"\nr = {r}: error / ||M||^2 at LoRA's parameters")
        print(f"{'':16}" + "".join(f"{stack.name:>18}" for stack in stacks))
        for name in methods.METHODS:
            values = {row["stack"]: row["error"] for row in rows if (row["method"], row["r"]) == (name, r)}
            print(f"{name:16}" + "".join(f"{values.get(stack.name, math.nan):18.4f}" for stack in stacks))


if __name__ == "__main__":
    main()
