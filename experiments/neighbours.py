"""RaSA beside its neighbours at equal parameters, on the bundled updates.

    python -m experiments.neighbours

For every bundled stack and r, each method of `rasa_theory.methods` at its best within the number of parameters of LoRA
of rank r (and 0.8 % more, since RaSA's mixing comes on top). Written to --out:

    neighbours.csv    one row per stack, r and method, as each is done; an interrupted run goes on from there. Columns:
                      settings, parameters, error and certified floor in units of ||M||^2, evidence, and the seconds of
                      all configurations
    neighbours.png    above: error against parameters; below: the same in units of LoRA's error
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
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
NEAR = (0.94, 1.18)
"""Errors that the panels in units of LoRA's error show."""


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
    """Above: error of all methods against parameters. Below: the same over LoRA's error at the same r, with names."""
    names = list(dict.fromkeys(row["stack"] for row in rows))
    lines, tall, each = math.ceil(len(names) / 2), 1.9, 3.3
    figure = style.new_figure(tall + each * lines)
    parts: Any = figure.subfigures(2, 1, height_ratios=[tall, each * lines])
    above, below = parts
    small = style.panels(above, 1, len(names), sharey=True)[0]
    large = style.panels(below, lines, 2)
    for ax in large.flat[len(names) :]:
        ax.set_axis_off()
    for n, (name, ax) in enumerate(zip(names, small, strict=True)):
        own = [row for row in rows if row["stack"] == name]
        draw(ax, own, dict.fromkeys({row["r"] for row in own}, 1.0), 3)
        for row in [row for row in own if row["method"] == "vera"][:1]:
            at = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "color": looks.METHODS["vera"].color}
            style.note(ax, "VeRA", (row["parameters"], row["error"]), **at)
        style.name(ax, "r of LoRA", "error / $\\|M\\|^2$" if n == 0 else "", name)
        ticks = {row["parameters"]: str(row["r"]) for row in own if row["method"] == "lora"}
        ax.set_xticks(list(ticks), list(ticks.values()))
    for n, (name, ax) in enumerate(zip(names, large.flat, strict=False)):
        own = [row for row in rows if row["stack"] == name]
        lora = [row for row in own if row["method"] == "lora"]
        grown = [row for row in own if row["method"] != "vera"]  # whose parameters hardly grow with r
        draw(ax, grown, {row["r"]: row["error"] for row in lora}, 5)
        ax.axhline(1, color=style.INK, linewidth=0.8, zorder=1)
        ax.set_ylim(*NEAR)
        ax.set_xticks([row["parameters"] for row in lora],
                      [f"{row['parameters'] / 1000:.0f}k\n{row['r']}" for row in lora])  # fmt: skip
        style.name(ax, "" if n + 2 < len(names) else "parameters; r of LoRA")
        ax.set_title(name, fontsize=style.MEDIUM, pad=16)
        if n % 2 == 0:
            style.name(ax, y="error / LoRA's")
        name_lines(ax)
    return figure


def draw(ax: Axes, rows: list[Row], unit: dict[int, float], size: float) -> None:
    """Draw each method's error over `unit` at its r, against its parameters."""
    for method, look in looks.METHODS.items():
        points = sorted((row["r"], row["parameters"], row["error"] / unit[row["r"]]) for row in rows
                        if row["method"] == method)  # fmt: skip
        if points:
            _, x, y = zip(*points, strict=True)
            width, order = (2.2, 3) if method == "rasa" else (1.2, 2)
            ax.plot(x, y, look.line, color=look.color, ms=size, lw=width, zorder=order, label=look.name)
    ax.set_xscale("log", base=2)
    ax.minorticks_off()


def name_lines(ax: Axes) -> None:
    """Write each line's name at its last point, or where it leaves the panel."""
    ends: list[tuple[float, float, str, str]] = []
    for line in ax.get_lines():
        points = [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]
        inside = [n for n, (_, y) in enumerate(points) if NEAR[0] <= y <= NEAR[1]]
        if str(line.get_label()).startswith("_") or not inside:
            continue
        x, y = points[inside[-1]]
        if inside[-1] + 1 < len(points):  # x is drawn as its logarithm
            further, beyond = points[inside[-1] + 1]
            x, y = x * (further / x) ** ((NEAR[1] - y) / (beyond - y)), NEAR[1]
        text, color = str(line.get_label()), str(line.get_color())
        if x < 0.8 * points[-1][0]:
            style.note(ax, text, (x, y), xytext=(0, 1), textcoords="offset points", color=color, ha="center")
        else:
            ends.append((x, y, text, color))
    style.label_ends(ax, ends, 0.075)


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
