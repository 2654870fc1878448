"""RaSA beside its neighbours at equal parameters and with equal effort.

    python -m experiments.neighbours
    python -m experiments.neighbours --model synthetic --ranks 8
    python -m experiments.neighbours --model mpnet --ranks 8

For every stack and r, each method of `rasa_theory.methods` at its best within the number of parameters of LoRA of rank
r (and up to L / (a + b) more, 0.8 % for the bundled updates, since RaSA's mixing comes on top). The names of papers
beside ours are in `PAPERS`. Written to --out:

    neighbours.csv    one row per model, stack, r and method, as each is done; an interrupted run goes on from there.
                      Columns: settings, parameters, error and certified floor in units of ||M||^2, evidence, and the
                      seconds of all configurations
    neighbours.png    error in units of LoRA's, at the parameters of LoRA of rank 8
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

import rasa_theory as rt
from experiments.models.update_sets import FIRST_MODEL, MODEL_NAMES, add_model_flags, chosen_updates, corner
from experiments.support import looks
from experiments.support.command import refuses_bad_input
from experiments.support.rows import Row, Table, of_models
from rasa_theory import methods
from rasa_theory.commands.progress import ProgressBar
from rasa_theory.plotting import style

COLUMNS = (
    "model", "stack", "r", "method", "settings", "parameters", "error", "floor", "evidence", "seconds",
)  # fmt: skip
KEY = ("model", "stack", "r", "method")
SHOWN = 8
"""The rank of the LoRA whose parameters the methods in the figure have."""
FARTHEST = 1.19
"""The largest error that the figure shows, in units of LoRA's. Of a method above it the range is written."""


PAPERS = {
    "lora": "PHLoRA",
    "allocated": "ranks as in AdaLoRA",
    "block_lora": "Localized LoRA",
    "joint_full": "JD-Full, LoTR, FacT-TT",
    "joint_diagonal": "JD-Diag; LoRTA is near it",
    "share_lora": "ShareLoRA; with A shared: Basis Sharing",
    "share_basis": "SHARE",
    "tied_lora": "Tied-LoRA",
    "vb_lora": "VB-LoRA",
    "vera": "VeRA",
    "mos": "MoS",
}
"""The names that papers have for a method, or for what its optimum is on updates, where they differ from the title."""


def compared(
    stacks: Iterable[rt.LayerStack], ranks: Iterable[int], done: Table, model: str, names: Sequence[str]
) -> Iterator[Row]:
    """Yield the rows that are not in `done`; equal configurations of a stack are solved once for all r."""
    solved: dict[tuple[str, str, str], Row] = {}
    for r, name, stack in itertools.product(ranks, names, stacks):
        parameters = methods.lora_parameters(stack.layers, stack.shape, r)
        identity = {"model": model, "stack": stack.name, "r": r, "method": name}
        if identity in done:
            continue
        tried = str(methods.METHODS[name].configurations(stack, methods.allowed(stack, parameters)))
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
    """A row for each method, a point for each stack: error over LoRA's at the same parameters, r = 8. Needs rows."""
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


@refuses_bad_input
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16])
    names = list(methods.METHODS)
    parser.add_argument("--methods", nargs="+", choices=names, metavar="METHOD", default=names, help="in this order")
    parser.add_argument("--smoke", action="store_true", help="a corner of two stacks at ranks 1 and 2, in seconds")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)
    chosen, ranks = chosen_updates(options), options.ranks
    if options.smoke:
        chosen, ranks = corner(chosen, 3, 20, count=2), [1, 2]

    table, stacks = Table(options.out / "neighbours.csv", COLUMNS, KEY), list(chosen.values())
    model = MODEL_NAMES[options.model]
    with ProgressBar(len(stacks) * len(ranks) * len(options.methods), "rows") as progress:
        for done, row in enumerate(compared(stacks, ranks, table, model, options.methods), 1):
            table.add([row])
            progress(done, f"after {row['stack']}, r = {row['r']}, {row['method']}")
    if shown := of_models(table.rows, FIRST_MODEL):
        style.save(plot(shown), options.out / "neighbours.png")
    rows = of_models(table.rows, model)
    for r in ranks:
        print(f"\nr = {r}: error / ||M||^2 at LoRA's parameters")
        print(f"{'':16}" + "".join(f"{stack.name:>18}" for stack in stacks))
        for name in methods.METHODS:
            values = {row["stack"]: row["error"] for row in rows if (row["method"], row["r"]) == (name, r)}
            numbers = "".join(f"{values.get(stack.name, math.nan):18.4f}" for stack in stacks)
            print(f"{name:16}{numbers}  {PAPERS.get(name, '')}")


if __name__ == "__main__":
    main()
