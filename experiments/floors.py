"""The gap between each certified floor and the best error of the solver, and the cost of each floor.

    python -m experiments.floors                 # 18 minutes on two cores, searches for floors for the most part
    python -m experiments.floors --solver-only   # solves anew beside the floors that the file has
    python -m experiments.floors --model mpnet --ks 1 --effort quick --seconds 600

One row of floors.csv in --out for every model, stack, r and k, errors squared and in units of e_lora; an interrupted
run goes on after the last row. floors.png shows the bundled updates at r = 8:

    best_found, allocation       the solver's error and the allocation bound, both above e_rasa(k)
    closed, closed_name          the best closed form, and its name
    dual, two_sided              the floors with a search, each at least the one before; with their seconds
    gap                          best_found - two_sided, the interval that holds e_rasa(k)
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

import rasa_theory as rt
from experiments.models.update_sets import FIRST_MODEL, MODEL_NAMES, add_model_flags, chosen_updates, corner
from experiments.support.command import refuses_bad_input
from experiments.support.rows import Row, Table, of_models, read_rows, write_rows
from rasa_theory.commands.progress import ProgressBar
from rasa_theory.common import InputError
from rasa_theory.plotting import style

KEY = ("model", "stack", "r", "k", "effort")
COLUMNS = (
    *KEY, "best_found", "allocation", "closed", "closed_name", "dual", "dual_seconds",
    "two_sided", "two_sided_seconds", "gap",
)  # fmt: skip


def row(
    stack: rt.LayerStack, budget: rt.RankBudget, best_found: float, search: rt.FloorOptions, say: Callable[[str], None]
) -> Row:
    """One row of the table, without the model and the effort. `say` is called with the state of the search in hand.

    The seconds of a floor are spent in its own search, in both orientations.
    """
    e_lora = rt.solve_lora(stack, budget.rank).error

    def watch(progress: rt.SearchProgress) -> None:
        at = f"{progress.search} {progress.iteration}: {progress.value / e_lora:.4f}"
        say(f"{stack.name}, k = {budget.shared_rank}, {at}")

    floors, clock = {}, {}
    for name in ("closed", "dual", "two-sided"):
        started = time.perf_counter()
        floors[name] = rt.lower_bound(stack, budget, name, search, watch)
        clock[name] = time.perf_counter() - started
    ratios = {name: floor.value / e_lora for name, floor in floors.items()}
    dual_seconds, two_sided_seconds = (
        max(0.0, round(clock[name] - clock[before], 1)) for name, before in (("dual", "closed"), ("two-sided", "dual"))
    )
    allocation = rt.allocation_bound(stack, budget).value
    values = (
        stack.name, budget.rank, budget.shared_rank, best_found / e_lora, allocation / e_lora,
        ratios["closed"], floors["closed"].name, ratios["dual"], dual_seconds,
        ratios["two-sided"], two_sided_seconds, best_found / e_lora - ratios["two-sided"],
    )  # fmt: skip
    return dict(zip((name for name in COLUMNS if name not in ("model", "effort")), values, strict=True))


def solved_anew(stacks: dict[str, rt.LayerStack], rows: list[Row], solver: rt.SolverOptions) -> Iterator[Row]:
    """The same rows with the errors of the solver as it is now; rows of other stacks stay as they are.

    Raises InputError for rows that do not belong to these stacks, by their allocation bound.
    """
    done = 0
    with ProgressBar(len(rows), "rows") as progress:
        for (name, r), group in itertools.groupby(rows, key=lambda row: (row["stack"], row["r"])):
            own = list(group)
            progress(done, f"{name}, r = {r}")
            stack = stacks[name]
            e_lora = rt.solve_lora(stack, r).error
            for row in own:
                allocation = rt.allocation_bound(stack, rt.RankBudget(r, row["k"])).value / e_lora
                if not is_floor_of(row, allocation):
                    raise InputError(f"the row of {name}, k = {row['k']} is of another rank than {r}, or other updates")
            solutions = rt.solve_path(stack, r, [row["k"] for row in own], solver)
            best = [solutions[row["k"]].error / e_lora for row in own]
            for row, x in zip(own, best, strict=True):
                yield row | {"effort": solver.effort, "best_found": x, "gap": x - row["two_sided"]}
            done += len(own)


def is_floor_of(row: Row, allocation: float) -> bool:
    """Whether a row of floors.csv is of the stack, r and k that have this allocation bound, over e_lora.

    The bound is a function of all spectra, so it tells updates apart, but not a stack from itself turned apart.
    """
    return math.isclose(row["allocation"], allocation, rel_tol=1e-9)


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


@refuses_bad_input
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--ks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--effort", default="default", help="of the solver: quick, default or thorough (default)")
    parser.add_argument("--seconds", type=float, default=40.0, help="the most of one search for a floor, of four (40)")
    parser.add_argument("--solver-only", action="store_true", help="new best errors beside the floors in the file")
    parser.add_argument("--smoke", action="store_true", help="a corner of one stack, in seconds")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)

    stacks, r, ks = chosen_updates(options), options.rank, options.ks
    if options.smoke:
        stacks, r, ks = corner(stacks), 2, [1]
    solver, search = rt.SolverOptions(effort=options.effort), rt.FloorOptions(max_seconds=options.seconds)
    model, file = MODEL_NAMES[options.model], options.out / "floors.csv"
    table = Table(file, COLUMNS, KEY)
    if options.solver_only:
        if options.kinds:
            parser.error("--solver-only solves all rows of a model; leave out --kinds")
        others = [row for row in table.rows if row["model"] != model]
        own = solved_anew(stacks, of_models(table.rows, model), solver)
        write_rows(file, COLUMNS, [*others, *own])
        style.save(plot(shown(read_rows(file))), options.out / "floors.png")
        return
    point = {"model": model, "effort": options.effort}
    missing = {name: [k for k in ks if point | {"stack": name, "r": r, "k": k} not in table] for name in stacks}
    done = 0
    with ProgressBar(sum(map(len, missing.values())), "rows") as progress:
        for name, own_ks in missing.items():
            progress(done, f"{name}, solving")
            for k, solution in rt.solve_path(stacks[name], r, own_ks, solver).items():
                line = row(stacks[name], rt.RankBudget(r, k), solution.error, search, partial(progress, done))
                table.add([point | line])
                done += 1
                progress.print(
                    f"{name:18} k = {k}  best found {line['best_found']:.5f}"
                    f"  closed {line['closed']:.5f} {line['closed_name']:8}"
                    f"  dual {line['dual']:.5f} ({line['dual_seconds']:.0f} s)"
                    f"  two-sided {line['two_sided']:.5f} ({line['two_sided_seconds']:.0f} s)  gap {line['gap']:.5f}",
                    sys.stdout,
                )
    if rows := shown(table.rows):
        style.save(plot(rows), options.out / "floors.png")


def shown(rows: list[Row]) -> list[Row]:
    """The rows of the picture."""
    return of_models(rows, FIRST_MODEL)


if __name__ == "__main__":
    main()
