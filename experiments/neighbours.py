"""RaSA beside its neighbours at equal parameters, on the bundled updates.

    python experiments/neighbours.py

For every bundled stack and r, each method of `rasa_theory.methods` at its best within the number of parameters of LoRA
of rank r (and 0.8 % more, since RaSA's mixing comes on top). Written to --out:

    neighbours.csv    one row per stack, r and method, as each is done; a run that was interrupted goes on from there:
                      settings, parameters, error and certified floor in units of ||M||^2, evidence, seconds of all
                      configurations tried
    neighbours.png    above: error against parameters; below: the same in units of LoRA's error
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import rasa_theory as rt
from experiments import tables
from experiments.tables import Row
from rasa_theory import methods
from rasa_theory.plotting import style

COLUMNS = (
    "stack", "r", "method", "settings", "parameters", "error", "floor", "evidence", "seconds",
)  # fmt: skip
LOOKS = {
    "lora": ("LoRA", style.INK, "o-"),
    "allocated": ("allocated", style.GREY, "s-"),
    "rasa": ("RaSA", style.VERMILION, "D-"),
    "joint_diagonal": ("joint, CP", style.PURPLE, "v-"),
    "joint_full": ("joint, full", style.PURPLE, "^--"),
    "tied_lora": ("Tied-LoRA", style.BLUE, "P-"),
    "vb_lora": ("VB-LoRA", style.GREEN, "X-"),
    "one_sided": ("one-sided", style.ORANGE, "<-"),
    "share_lora": ("ShareLoRA", style.SKY, ">-"),
    "share_basis": ("SHARE", style.GREY, "h--"),
    "vera": ("VeRA", style.BLUE, "*:"),
}
"""What each method of `rasa_theory.methods` is called in the figure, its colour, marker and line."""
NEAR = (0.94, 1.12)  # of LoRA's error: what the panels in units of LoRA show


def stacks(smoke: bool) -> list[rt.LayerStack]:
    """The bundled stacks, or a corner of the first two."""
    found = rt.load("minilm-code")[0]
    return [rt.LayerStack(s.values[:3, :24, :16], s.name) for s in found[:2]] if smoke else found


def compared(found: list[rt.LayerStack], ranks: list[int], done: set[tuple[str, int, str]]) -> Iterator[Row]:
    """The rows that are not done; equal configurations of a stack are solved once for all r."""
    solved: dict[tuple[str, str, str], Row] = {}
    for r, stack in itertools.product(ranks, found):
        parameters = methods.lora_parameters(stack.layers, stack.shape, r)
        for name, method in methods.METHODS.items():
            if (stack.name, r, name) in done:
                continue
            tried = str(method.configurations(stack, methods.allowed(stack, parameters)))
            key = (stack.name, name, tried)
            if key not in solved:
                begun = time.perf_counter()
                fit = methods.at_parameters(stack, parameters, [name]).get(name)
                if fit is None:
                    continue
                solved[key] = row_of(stack, fit) | {"seconds": round(time.perf_counter() - begun, 2)}
            yield solved[key] | {"stack": stack.name, "r": r, "method": name}


def row_of(stack: rt.LayerStack, fit: methods.Fit) -> Row:
    """What a Fit says, in units of ||M||^2."""
    return {
        "settings": " ".join(f"{key}={value}" for key, value in fit.settings.items()),
        "parameters": fit.parameters,
        "error": fit.error / stack.norm_squared,
        "floor": "" if fit.floor is None else fit.floor / stack.norm_squared,
        "evidence": fit.evidence.name.lower().replace("_", " "),
    }


def plot(rows: list[Row]) -> Figure:
    """Above: error against parameters, VeRA and all, unnamed. Below: the same over LoRA's at the same r, named."""
    names = list(dict.fromkeys(row["stack"] for row in rows))
    lines, tall = math.ceil(len(names) / 2), 1.9
    figure = style.new_figure(tall + 2.9 * lines)
    above, below = figure.subfigures(2, 1, height_ratios=[tall, 2.9 * lines])
    small = style.panels(above, 1, len(names), sharey=True)[0]
    large = style.panels(below, lines, 2)
    for ax in large.flat[len(names) :]:
        ax.set_axis_off()
    for n, (name, ax) in enumerate(zip(names, small, strict=True)):
        own = [row for row in rows if row["stack"] == name]
        draw(ax, own, dict.fromkeys({row["r"] for row in own}, 1.0), 3)
        for row in [row for row in own if row["method"] == "vera"][:1]:
            at = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "color": LOOKS["vera"][1]}
            style.note(ax, "VeRA", (row["parameters"], row["error"]), **at)
        style.name(ax, "r of LoRA", "error / $\\|M\\|^2$" if n == 0 else "", name)
        ticks = {row["parameters"]: str(row["r"]) for row in own if row["method"] == "lora"}
        ax.set_xticks(list(ticks), list(ticks.values()))
    for n, (name, ax) in enumerate(zip(names, large.flat, strict=False)):
        own = [row for row in rows if row["stack"] == name]
        lora = [row for row in own if row["method"] == "lora"]
        grown = [row for row in own if row["method"] != "vera"]  # which has hardly more numbers at a larger r
        draw(ax, grown, {row["r"]: row["error"] for row in lora}, 5)
        ax.axhline(1, color=style.INK, linewidth=0.8, zorder=1)
        ax.set_ylim(*NEAR)
        ax.set_xticks([row["parameters"] for row in lora],
                      [f"{row['parameters'] / 1000:.0f}k\n{row['r']}" for row in lora])  # fmt: skip
        style.name(ax, "" if n + 2 < len(names) else "numbers; LoRA's r for as many")
        ax.set_title(name, fontsize=style.MEDIUM, pad=16)
        if n % 2 == 0:
            style.name(ax, y="error / LoRA's")
        name_lines(ax)
    return figure


def draw(ax: Axes, rows: list[Row], unit: dict[int, float], size: float) -> None:
    """Each method's error over `unit` at its r, against its parameters."""
    for method, (label, color, look) in LOOKS.items():
        points = sorted((row["r"], row["parameters"], row["error"] / unit[row["r"]]) for row in rows
                        if row["method"] == method)  # fmt: skip
        if points:
            _, x, y = zip(*points, strict=True)
            top = method == "rasa"
            ax.plot(x, y, look, color=color, ms=size, lw=2.2 if top else 1.2, zorder=3 if top else 2, label=label)
    ax.set_xscale("log", base=2)
    ax.minorticks_off()


def name_lines(ax: Axes) -> None:
    """Each line's name at its last point, or where it leaves the panel."""
    ends = []
    for line in ax.get_lines():
        points = list(zip(*line.get_data(), strict=True))
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
    style.label_ends(ax, ends, 0.085)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--smoke", action="store_true", help="a corner of two stacks at ranks 1 and 2, in seconds")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)
    ranks, found = ([1, 2], stacks(True)) if options.smoke else (options.ranks, stacks(False))

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "neighbours.csv"
    rows = tables.read(path)
    done = {(row["stack"], row["r"], row["method"]) for row in rows}
    with path.open("a", newline="") as file, tqdm(total=len(found) * len(ranks) * len(methods.METHODS)) as bar:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not rows:
            writer.writeheader()
        bar.update(len(rows))
        for row in compared(found, ranks, done):
            rows.append(row)
            writer.writerow(row)
            file.flush()
            bar.set_description(f"{row['stack']}, r = {row['r']}, {row['method']}")
            bar.update()
    style.save(plot(rows), options.out / "neighbours.png")
    for r in ranks:
        print(f"\nr = {r}: error / ||M||^2 at LoRA's parameters")
        print(f"{'':16}" + "".join(f"{stack.name:>18}" for stack in found))
        for name in methods.METHODS:
            values = {row["stack"]: row["error"] for row in rows if (row["method"], row["r"]) == (name, r)}
            print(f"{name:16}" + "".join(f"{values.get(stack.name, math.nan):18.4f}" for stack in found))


if __name__ == "__main__":
    main()
