"""The work of the experiment, unit by unit, and its command."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import rasa_theory as rt
from experiments.models.update_sets import (
    FIRST_MODEL,
    MODEL_NAMES,
    add_model_flags,
    chosen_updates,
    updates_of_one_run,
)
from experiments.support.command import refuses_bad_input
from experiments.support.rows import Row, Table, of_models, read_rows
from experiments.why_sharing_pays import __doc__ as description
from experiments.why_sharing_pays.figure import (
    EACH,
    FIGURES,
    FIRST_RUN,
    HOW,
    LAYER,
    LAYER_APART,
    LAYERS,
    RUNS,
    Results,
    summary,
)
from experiments.why_sharing_pays.measures import (
    Item,
    at_size,
    one_of_each_kind,
    one_sided,
    over_kinds,
    over_tasks,
    separately,
    sides,
    split_changed,
    split_gain,
)
from experiments.why_sharing_pays.stacks import (
    KINDS,
    PLANS,
    SMOKE,
    Plan,
    all_cropped,
    second_task,
    updates,
    weights,
)
from rasa_theory import null_models
from rasa_theory.commands.progress import ProgressBar
from rasa_theory.plotting import style

COLUMNS = ("part", "source", "stack", "k", "item", "index", "value", "model")
KEY = ("part", "source", "stack", "model")
Key = tuple[str, str, str]  # part, source, stack
Floors = dict[tuple[str, int], Row]
"""Rows of figures/floors.csv by stack and k."""


# ------------------------------------------------------------------------------------------------ units of work


def units(plan: Plan, floors: Floors) -> Iterator[tuple[Key, Callable[[], Iterator[Item]]]]:
    """Yield (part, source, stack) and the work that gives its rows, the cheap ones first."""
    tuned, base, other = updates(plan), weights(plan), second_task(plan)
    query = tuned["query"]
    for source, stacks in (("updates", tuned), ("weights", base), ("second task", other)):
        for name, stack in stacks.items():
            yield ("side", source, name), partial(sides, stack, plan)
    for name, stack in tuned.items():
        own = {k: floors[name, k] for k in plan.ks if (name, k) in floors}
        yield ("pool", "updates", name), partial(split_gain, stack, plan, plan.ks, own)
    for control, change, ks in (
        ("hidden dyads", partial(null_models.with_hidden_dyads, rank=plan.rank), plan.control_ks[:1]),
        ("turned apart", partial(null_models.turned_apart, seed=2), plan.control_ks),
        ("shared bases", null_models.with_common_bases, plan.control_ks[:1]),
    ):
        for name, stack in tuned.items():
            yield ("pool", control, name), partial(split_changed, change, stack, plan, ks)
    for source, stacks in (("weights", base), ("second task", other)):
        for name, stack in stacks.items():
            yield ("pool", source, name), partial(split_gain, stack, plan, plan.control_ks, {})
    for name, stack in tuned.items():
        for how in (HOW[0], HOW[2]):
            yield ("tasks", how, name), partial(over_tasks, stack, other[name], plan, how)
    for layers, bases in itertools.product(plan.depths, null_models.BASES):
        resize = partial(at_size, query, plan, layers, plan.size, plan.size, bases)
        yield ("depth", bases, f"L = {layers}"), resize
        yield ("one-sided", bases, f"L = {layers}"), partial(one_sided, query, plan, layers, bases)
    for width in plan.widths:
        resize = partial(at_size, query, plan, query.layers, width, plan.widths[0], "independent")
        yield ("width", "independent", f"width {width}"), resize


def units_over_kinds(
    stacks: dict[str, rt.LayerStack], plan: Plan, run: str
) -> Iterator[tuple[Key, Callable[[], Iterator[Item]]]]:
    """Yield the pools over the kinds of a run of `RUNS`: all of them for the first run, several pools for the others.

    Pools over different layers are left out if there are fewer layers than kinds.
    """
    layers, step = one_of_each_kind(stacks, 0), next(iter(stacks.values())).layers // len(stacks)
    turned = {name: null_models.turned_apart(group, seed=2 + i) for i, (name, group) in enumerate(layers.items())}
    ways = {EACH: stacks, LAYER: layers, LAYER_APART: turned}
    if step > 0:
        ways[LAYERS] = one_of_each_kind(stacks, step)
    for how, groups in ways.items():
        yield ("kinds", how, run), partial(separately, groups, plan)
    for how in HOW if run == FIRST_RUN else ():
        yield ("kinds", how, run), partial(over_kinds, stacks, how, plan)


def units_of_model(
    tuned: dict[str, rt.LayerStack], plan: Plan, floors: Floors
) -> Iterator[tuple[Key, Callable[[], Iterator[Item]]]]:
    """The same units of another model: its updates as they are, and turned apart."""
    for name, stack in tuned.items():
        yield ("side", "updates", name), partial(sides, stack, plan)
    for name, stack in tuned.items():
        own = {k: floors[name, k] for k in plan.ks if (name, k) in floors}
        yield ("pool", "updates", name), partial(split_gain, stack, plan, plan.ks, own)
    for name, stack in tuned.items():
        change = partial(null_models.turned_apart, seed=2)
        yield ("pool", "turned apart", name), partial(split_changed, change, stack, plan, plan.control_ks)


def units_of_runs(model: str, runs: Path, plan: Plan) -> Iterator[tuple[Key, Callable[[], Iterator[Item]]]]:
    """Yield the pools over four kinds of every run of a model; a line of print says which run is missing."""
    for run, (task, seed) in RUNS.items():
        stacks = updates_of_one_run(model, task, seed, runs, KINDS)
        if stacks is None:
            print(f"pools over kinds left out: {runs} has no run of {model} on {task}, seed {seed}, with all four")
        else:
            yield from units_over_kinds(all_cropped(stacks, plan), plan, run)


def two_sided_floors(path: Path, model: str) -> Floors:
    """The rows of the two-sided floors of a model, r = 8, where they have been computed."""
    return {(row["stack"], row["k"]): row for row in of_models(read_rows(path), model) if row["r"] == 8}


@refuses_bad_input
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--smoke", action="store_true", help="corners of the stacks, in seconds")
    parser.add_argument("--figure", action="store_true", help="the pictures alone")
    parser.add_argument("--floors", type=Path, default=Path("figures/floors.csv"), help="two-sided floors")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)

    model, table = MODEL_NAMES[options.model], Table(options.out / "why_sharing_pays.csv", COLUMNS, KEY)
    if not options.figure:
        plan = SMOKE if options.smoke else PLANS[options.model]
        floors = {} if options.smoke else two_sided_floors(options.floors, model)
        if model == FIRST_MODEL:
            chosen, tasks = set(KINDS), [*units(plan, floors)]
        else:
            stacks = all_cropped(chosen_updates(options), plan)
            chosen, tasks = set(stacks), [*units_of_model(stacks, plan, floors)]
        if chosen >= set(KINDS):
            tasks += units_of_runs(options.model, options.runs, plan)
        with ProgressBar(len(tasks), "tasks") as progress:
            for done, (key, task) in enumerate(tasks):
                progress(done, ", ".join(key))
                if dict(zip(KEY, (*key, model), strict=True)) in table:
                    continue
                began = time.perf_counter()
                items = [*task(), ("", "seconds", "", round(time.perf_counter() - began, 1))]
                table.add([dict(zip(COLUMNS, (*key, *item, model), strict=True)) for item in items])
    print(*summary(Results(of_models(table.rows, model))), sep="\n")
    if rows := of_models(table.rows, FIRST_MODEL):
        for name, plot in FIGURES.items():
            style.save(plot(rows), options.out / f"{name}.png")
