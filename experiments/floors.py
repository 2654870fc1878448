"""The gap between each certified floor and the best error of the solver, and the cost of each floor.

    python -m experiments.floors                 # searches for floors take most of its hour on one core
    python -m experiments.floors --solver-only   # solves anew beside the floors that the file has

On the bundled updates, one row of floors.csv in --out for every stack and k, errors squared and in units of e_lora.
floors.png shows the same:

    best_found, allocation       the solver's error and the allocation bound, both above e_rasa(k)
    closed, closed_name          the best closed form, and its name
    dual, two_sided              the floors with a search, each at least the one before; with their seconds
    gap                          best_found - two_sided, the interval that holds e_rasa(k)
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from tqdm import tqdm

import rasa_theory as rt
from experiments.support.rows import Row, append_rows, read_rows, write_rows
from rasa_theory.plotting import style

if TYPE_CHECKING:
    Bar = tqdm[Any]

COLUMNS = (
    "stack", "k", "best_found", "allocation", "closed", "closed_name", "dual", "dual_seconds",
    "two_sided", "two_sided_seconds", "gap",
)  # fmt: skip


def row(stack: rt.LayerStack, budget: rt.RankBudget, e_lora: float, best_found: float, bar: Bar) -> Row:
    """One row of the table. The seconds of a floor are spent in its own search, in both orientations."""

    def watch(progress: rt.SearchProgress) -> None:
        at = f"{progress.search} {progress.iteration}: {progress.value / e_lora:.4f}"
        bar.set_description(f"{stack.name}, k = {budget.shared_rank}, {at}")

    floors, clock = {}, {}
    for name in ("closed", "dual", "two-sided"):
        started = time.perf_counter()
        floors[name] = rt.lower_bound(stack, budget, name, watch=watch)
        clock[name] = time.perf_counter() - started
    ratios = {name: floor.value / e_lora for name, floor in floors.items()}
    dual_seconds, two_sided_seconds = (
        max(0.0, round(clock[name] - clock[before], 1)) for name, before in (("dual", "closed"), ("two-sided", "dual"))
    )
    values = (
        stack.name, budget.shared_rank, best_found / e_lora, rt.allocation_bound(stack, budget).value / e_lora,
        ratios["closed"], floors["closed"].name, ratios["dual"], dual_seconds,
        ratios["two-sided"], two_sided_seconds, best_found / e_lora - ratios["two-sided"],
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def solved_anew(bundled: dict[str, rt.LayerStack], rank: int, rows: list[Row]) -> list[Row]:
    """The same rows with the errors of the solver as it is now. Raises ValueError for rows of another rank."""
    anew = []
    for name, group in itertools.groupby(tqdm(rows), key=lambda row: row["stack"]):
        stack, own = bundled[name], list(group)
        e_lora = rt.solve_lora(stack, rank).error
        for row in own:
            allocation = rt.allocation_bound(stack, rt.RankBudget(rank, row["k"])).value / e_lora
            if not math.isclose(row["allocation"], allocation, rel_tol=1e-6):
                raise ValueError(f"the row of {name}, k = {row['k']} is not of rank {rank}")
        solutions = rt.solve_path(stack, rank, [row["k"] for row in own])
        best = [solutions[row["k"]].error / e_lora for row in own]
        anew += [row | {"best_found": x, "gap": x - row["two_sided"]} for row, x in zip(own, best, strict=True)]
    return anew


LOOKS = {
    "closed": ("closed form", style.SKY, "<"), "dual": ("dual", style.GREEN, "s"),
    "two_sided": ("two-sided", style.PURPLE, "D"), "best_found": ("best found", style.BLUE, "o"),
}  # fmt: skip


def plot(rows: list[Row]) -> Figure:
    """Floors and best error of every stack and k; the line between them holds e_rasa(k)."""
    heights, y = [], 0.0
    for before, row in zip([None, *rows], rows, strict=False):
        y += 1.0 if before is None or before["stack"] == row["stack"] else 1.8
        heights.append(y)
    figure = style.new_figure(1.0 + 0.17 * y, title="How far is the best error from its floor?")
    ax = style.panels(figure)[0, 0]
    for row, y in zip(rows, heights, strict=True):
        ax.plot([row["two_sided"], row["best_found"]], [y, y], color=style.GREY, linewidth=2, zorder=1)
    for key, (label, color, marker) in LOOKS.items():
        shown = [
            (row[key], y) for row, y in zip(rows, heights, strict=True) if key == "closed" or row[key] > row["closed"]
        ]
        ax.plot(
            *zip(*shown, strict=True), marker, color=color, ms=4, label=label
        )  # no marker for a search that gained nothing
    ax.axvline(1, color=style.INK, linewidth=1.2, zorder=0)
    ax.set_yticks(heights, [f"{row['stack'].replace('attention_', 'att. ')}, k = {row['k']}" for row in rows])
    ax.invert_yaxis()
    style.name(ax, "error / $e_{\\mathrm{LoRA}}$ ($e_{\\mathrm{RaSA}}$: on the line)")
    style.legend_above(ax, 2, bbox_to_anchor=(-0.3, 1))
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", nargs="+", help="all bundled ones unless named")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--ks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--solver-only", action="store_true", help="new best errors beside the floors in the file")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)

    bundled = {stack.name: stack for stack in rt.load("minilm-code")[0]}
    unknown = set(options.stacks or ()) - set(bundled)
    if unknown:
        parser.error(f"--stacks: {min(unknown)!r} is none of {', '.join(bundled)}")
    stacks = [bundled[name] for name in options.stacks or bundled]
    table = options.out / "floors.csv"
    if options.solver_only:
        if options.stacks or options.ks != parser.get_default("ks"):
            parser.error("--solver-only solves all rows of the file; leave out --stacks and --ks")
        rows = solved_anew(bundled, options.rank, read_rows(table))
        write_rows(table, COLUMNS, rows)
        style.save(plot(rows), options.out / "floors.png")
        return
    write_rows(table, COLUMNS, [])
    with tqdm(total=len(stacks) * len(options.ks)) as bar:
        for stack in stacks:
            e_lora = rt.solve_lora(stack, options.rank).error
            bar.set_description(f"{stack.name}, solving")
            for k, solution in rt.solve_path(stack, options.rank, options.ks).items():
                line = row(stack, rt.RankBudget(options.rank, k), e_lora, solution.error, bar)
                append_rows(table, [line], COLUMNS)
                bar.update()
                tqdm.write(
                    f"{stack.name:18} k = {k}  best found {line['best_found']:.5f}"
                    f"  closed {line['closed']:.5f} {line['closed_name']:8}"
                    f"  dual {line['dual']:.5f} ({line['dual_seconds']:.0f} s)"
                    f"  two-sided {line['two_sided']:.5f} ({line['two_sided_seconds']:.0f} s)  gap {line['gap']:.5f}"
                )
    style.save(plot(read_rows(table)), options.out / "floors.png")


if __name__ == "__main__":
    main()
