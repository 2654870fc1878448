"""RaSA beside its neighbours at equal parameters, on the bundled updates.

    python experiments/neighbours.py

For every bundled stack and r, each method of `rasa_theory.methods` at its best within the number of parameters of LoRA
of rank r (and 0.8 % more, since RaSA's mixing comes on top). Written to --out:

    neighbours.csv    one row per stack, r and method, as each is done; a run that was interrupted goes on from there:
                      settings, parameters, error and certified floor in units of ||M||^2, evidence, seconds of all
                      configurations tried
    neighbours.png    error against parameters, and the same in units of LoRA's error, one column per stack
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import rasa_theory as rt
from rasa_theory import methods

Row = dict[str, Any]
COLUMNS = (
    "stack", "r", "method", "settings", "parameters", "error", "floor", "evidence", "seconds",
)  # fmt: skip
STYLES = {
    "lora": ("LoRA", "#000000", "o"),
    "allocated": ("LoRA, ranks allocated", "#7f7f7f", "s"),
    "rasa": ("RaSA", "#D55E00", "D"),
    "joint_diagonal": ("joint, diagonal (CP)", "#CC79A7", "v"),
    "joint_full": ("joint, full core", "#CC79A7", "^"),
    "tied_lora": ("Tied-LoRA", "#0072B2", "P"),
    "vb_lora": ("VB-LoRA", "#009E73", "X"),
    "one_sided": ("one-sided pool", "#E69F00", "<"),
    "share_lora": ("ShareLoRA", "#56B4E9", ">"),
    "share_basis": ("shared bases (SHARE)", "#8c6d31", "h"),
    "vera": ("VeRA", "#a0a000", "*"),
}
NEAR = (0.94, 1.12)  # of LoRA's error: what the lower panels show


def stacks(smoke: bool) -> list[rt.LayerStack]:
    """The bundled stacks, or a corner of the first two."""
    found = rt.load("minilm-code")[0]
    return [rt.LayerStack(s.values[:3, :24, :16], s.name) for s in found[:2]] if smoke else found


def compared(found: list[rt.LayerStack], ranks: list[int], done: set[tuple[str, str, str]]) -> Iterator[Row]:
    """The rows that are not done; equal configurations of a stack are solved once for all r."""
    solved: dict[tuple[str, str, str], Row] = {}
    for r, stack in itertools.product(ranks, found):
        parameters = methods.lora_parameters(stack.layers, stack.shape, r)
        for name, method in methods.METHODS.items():
            if (stack.name, str(r), name) in done:
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
    """Upper panels: error against parameters. Lower: the same over LoRA's at the same r."""
    names = list(dict.fromkeys(row["stack"] for row in rows))
    figure = Figure(figsize=(4.6 * len(names), 9), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        own = [row for row in rows if row["stack"] == name]
        lora = {row["r"]: float(row["error"]) for row in own if row["method"] == "lora"}
        ticks = {int(row["parameters"]): row["r"] for row in own if row["method"] == "lora"}
        for ax, relative in zip(panels[:, column], (False, True), strict=True):
            ends = []
            for method, (label, color, marker) in STYLES.items():
                points = sorted((int(row["r"]), row) for row in own if row["method"] == method)
                x = [int(row["parameters"]) for _, row in points]
                y = [float(row["error"]) / (lora[row["r"]] if relative else 1) for _, row in points]
                shown = [(u, v) for u, v in zip(x, y, strict=True) if not relative or NEAR[0] <= v <= NEAR[1]]
                if not shown or (relative and len(set(x)) < len(x)):  # VeRA, which does not grow with r
                    continue
                width = 2.2 if method == "rasa" else 1.2
                ax.plot(x, y, color=color, marker=marker, ms=5, lw=width, zorder=3 if method == "rasa" else 2)
                ends.append((*shown[-1], label, color))
            ax.set_xscale("log", base=2)
            ax.set_xticks(list(ticks), [f"{p / 1000:.0f}k\nr = {r}" for p, r in ticks.items()])
            dress(ax, name, relative)
            label_ends(ax, ends)
    return figure


def dress(ax: Axes, name: str, relative: bool) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("parameters stored, and the r of LoRA with as many")
    ax.set_ylabel("error / LoRA's at equal parameters" if relative else "error / $\\|M\\|^2$")
    if relative:
        ax.set_ylim(*NEAR)
        ax.axhline(1, color="black", lw=0.8, zorder=1)
    else:
        ax.set_title(name)


def label_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names right of the last points, moved apart where they would overlap, with a thin line to the point."""
    low, high = ax.get_ylim()
    gap = (high - low) * 0.047
    left, right = ax.get_xlim()
    ax.set_xlim(left, right * (right / left) ** 0.75)
    ordered = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, y, _, _ in ordered:
        heights.append(max(y, heights[-1] + gap) if heights else y)
    excess = max(0.0, heights[-1] - (high - gap / 2)) if heights else 0.0
    for n in reversed(range(len(heights))):  # back into the panel
        top = high - gap / 2 if n == len(heights) - 1 else heights[n + 1] - gap
        heights[n] = min(heights[n], top) if excess else heights[n]
    for (x, y, label, color), height in zip(ordered, heights, strict=True):
        ax.annotate(
            label, (x, y), (right * (right / left) ** 0.06, height), color=color, fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--smoke", action="store_true", help="a corner of two stacks at ranks 1 and 2, in seconds")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args()
    ranks, found = ([1, 2], stacks(True)) if options.smoke else (options.ranks, stacks(False))

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "neighbours.csv"
    rows: list[Row] = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    done = {(row["stack"], row["r"], row["method"]) for row in rows}
    with path.open("a", newline="") as file, tqdm(total=len(found) * len(ranks) * len(methods.METHODS)) as bar:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not rows:
            writer.writeheader()
        bar.update(len(rows))
        for row in compared(found, ranks, done):
            rows.append({key: str(value) for key, value in row.items()})
            writer.writerow(row)
            file.flush()
            bar.set_description(f"{row['stack']}, r = {row['r']}, {row['method']}")
            bar.update()
    plot(rows).savefig(options.out / "neighbours.png", dpi=110)
    for r in ranks:
        print(f"\nr = {r}: error / ||M||^2 at LoRA's parameters")
        print(f"{'':16}" + "".join(f"{stack.name:>18}" for stack in found))
        for name in methods.METHODS:
            values = {row["stack"]: float(row["error"]) for row in rows if (row["method"], row["r"]) == (name, str(r))}
            print(f"{name:16}" + "".join(f"{values.get(stack.name, math.nan):18.4f}" for stack in found))


if __name__ == "__main__":
    main()
