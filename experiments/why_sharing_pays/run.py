"""The work of the experiment, unit by unit, and its command."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

import torch

import rasa_theory as rt
from experiments.floors import is_floor_of
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
from experiments.why_sharing_pays.figure import EACH, FIGURES, HOW, LAYER, LAYERS, Results, summary
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
from rasa_theory import methods, null_models
from rasa_theory.commands.progress import ProgressBar
from rasa_theory.plotting import style
from rasa_theory.problem import participation_ratio

COLUMNS = ("part", "source", "stack", "k", "item", "index", "value", "model")
KEY = ("part", "source", "stack", "model")
Item = tuple[int | str, str, str, float | str]  # k, item, index, value
Key = tuple[str, str, str]  # part, source, stack
Floors = dict[tuple[str, int], Row]
"""Rows of figures/floors.csv by stack and k."""


# --------------------------------------------------------------------------------------------- what is measured


def split_gain(stack: rt.LayerStack, plan: Plan, ks: tuple[int, ...], floors: dict[int, Row]) -> Iterator[Item]:
    """The parts of the gain and the participation of every pool term, for each k; one path over all k."""
    e_lora = rt.solve_lora(stack, plan.rank).error
    yield "", "e_lora", "", e_lora
    yield "", "e_lora_share", "", e_lora / stack.norm_squared
    for k, solution in rt.solve_path(stack, plan.rank, ks, plan.solver).items():
        yield from point(stack, rt.RankBudget(plan.rank, k), solution, floors.get(k))


def split_changed(
    change: Callable[[rt.LayerStack], rt.LayerStack], stack: rt.LayerStack, plan: Plan, ks: tuple[int, ...]
) -> Iterator[Item]:
    """The same for a control, which `change` makes of the stack."""
    yield from split_gain(change(stack), plan, ks, {})


def point(stack: rt.LayerStack, budget: rt.RankBudget, solution: rt.RasaSolution, floor: Row | None) -> Iterator[Item]:
    """All items of one solution. `floor`: the row of a two-sided floor, in place of the closed forms.

    A floor of other updates of the same name is left out, which is printed.
    """
    k, parts = budget.shared_rank, rt.gain(stack, budget, solution=solution)
    allocation = parts.e_allocation / parts.e_lora
    yield k, "allocation", "", allocation
    yield k, "best_found", "", parts.e_rasa / parts.e_lora
    if floor is not None and is_floor_of(floor, allocation):
        yield k, "floor", "", floor["two_sided"]
        yield k, "floor_name", "", "two-sided"
    else:
        if floor is not None:
            print(f"two-sided floor of {stack.name}, k = {k} left out: it is of other updates")
        yield k, "floor", "", parts.floor.value / parts.e_lora
        yield k, "floor_name", "", parts.floor.name
    yield k, "stop", "", f"{solution.stop_reason.name} after {solution.sweeps} from {solution.start}"
    yield k, "cancellation", "", solution.cancellation
    terms = rt.pool_participation(solution.factors)
    shares = terms.losses / terms.losses.sum(0)
    for j, (by_weight, by_loss, share) in enumerate(zip(terms.by_weight, terms.by_loss, shares.mT, strict=True)):
        yield k, "by_weight", str(j), float(by_weight)
        yield k, "by_loss", str(j), float(by_loss)
        yield k, "owner_share", str(j), float(share.max())
        if k == 1 and stack.layers <= 6:
            for i, part in enumerate(share.tolist()):
                yield k, "loss_share", f"{j} {i}", part


def at_size(stack: rt.LayerStack, plan: Plan, layers: int, width: int, count: int, bases: str) -> Iterator[Item]:
    """Parts of the gain and participation in a resized stack, and the directions that its layers share."""
    resized = null_models.resized(stack, layers, width, count, bases, seed=1)
    spectrum = rt.shared_subspace_spectrum(resized, plan.rank)
    for side, values in (("columns", spectrum.columns), ("rows", spectrum.rows)):
        yield "", f"projector_{side}", "0", float(values[0])
    e_lora = rt.solve_lora(resized, plan.rank).error
    yield "", "e_lora_share", "", e_lora / resized.norm_squared
    for k in plan.depth_ks:
        budget = rt.RankBudget(plan.rank, k)
        solution = rt.solve_rasa(resized, budget, rt.SolverOptions(max_sweeps=plan.depth_sweeps))
        yield from point(resized, budget, solution, None)


def one_sided(stack: rt.LayerStack, plan: Plan, layers: int, bases: str) -> Iterator[Item]:
    """Pools that share one side alone, at the parameters of RaSA of k = 1: LoRA's and L^2 for the mixing."""
    stack = null_models.resized(stack, layers, plan.size, plan.size, bases, seed=1)
    e_lora = rt.solve_lora(stack, plan.rank).error
    cost = methods.lora_parameters(stack.layers, stack.shape, 1)
    (b, a), L = stack.shape, stack.layers
    for side, each in (("columns", b + L * a), ("rows", a + L * b)):
        for q in (plan.rank - 1, plan.rank // 2):
            p = ((plan.rank - q) * cost + L**2) // each
            if p > 0:
                fit = methods.fit_one_sided(stack, q, p, side, plan.one_sided_sweeps)
                yield "", "one_sided", f"{side} q={q} p={p}", fit.error / e_lora


def over_kinds(stacks: dict[str, rt.LayerStack], how: str, plan: Plan) -> Iterator[Item]:
    """One pool over all kinds; `how` is one of HOW."""
    own = to_stream(stacks) if how == HOW[1] else stacks
    stack = rt.LayerStack(torch.cat([one.values for one in own.values()]), "all kinds")
    if how == HOW[2]:
        stack = null_models.turned_apart(stack, seed=2)
    yield "", "e_lora", "", rt.solve_lora(stack, plan.rank).error
    for k, solution in rt.solve_path(stack, plan.rank, plan.kinds_ks, plan.solver).items():
        yield from point(stack, rt.RankBudget(plan.rank, k), solution, None)
        for j, kinds in enumerate(groups_served(solution.factors, len(own))):
            yield k, "by_loss_of_kinds", str(j), kinds
        parameters = methods.lora_parameters(stack.layers, stack.shape, plan.rank) + solution.factors.mixing.numel()
        yield k, "parameters", "", parameters


def to_stream(stacks: dict[str, rt.LayerStack]) -> dict[str, rt.LayerStack]:
    """The kinds with the attention output transposed, so that all face the residual stream with the same side."""
    return {name: stack.transpose() if name == "attention_output" else stack for name, stack in stacks.items()}


def one_of_each_kind(stacks: dict[str, rt.LayerStack], step: int) -> dict[str, rt.LayerStack]:
    """As many stacks as there are layers: layer i of the first kind, i + step of the second (cyclic), and so on.

    The attention output is transposed.
    """
    kinds = [stack.values for stack in to_stream(stacks).values()]
    layers = len(kinds[0])
    groups = ([kind[(i + n * step) % layers] for n, kind in enumerate(kinds)] for i in range(layers))
    return {f"layer {i}": rt.LayerStack(torch.stack(group), f"layer {i}") for i, group in enumerate(groups)}


def separately(stacks: dict[str, rt.LayerStack], plan: Plan) -> Iterator[Item]:
    """A pool for each stack: the parts of their gains together, in units of the summed e_lora, and all their terms."""
    paths = [(stack, rt.solve_path(stack, plan.rank, plan.kinds_ks, plan.solver)) for stack in stacks.values()]
    e_lora = sum(rt.solve_lora(stack, plan.rank).error for stack in stacks.values())
    yield "", "e_lora", "", e_lora
    for k in plan.kinds_ks:
        gains = [rt.gain(stack, rt.RankBudget(plan.rank, k), solution=path[k]) for stack, path in paths]
        yield k, "allocation", "", sum(gain.e_allocation for gain in gains) / e_lora
        yield k, "best_found", "", sum(gain.e_rasa for gain in gains) / e_lora
        yield k, "floor", "", sum(gain.floor.value for gain in gains) / e_lora
        yield k, "floor_name", "", "sum of " + ", ".join(sorted({gain.floor.name for gain in gains}))
        for name, (_, path) in zip(stacks, paths, strict=True):
            terms = rt.pool_participation(path[k].factors)
            for j, (by_weight, by_loss) in enumerate(zip(terms.by_weight, terms.by_loss, strict=True)):
                yield k, "by_weight", f"{name} {j}", float(by_weight)
                yield k, "by_loss", f"{name} {j}", float(by_loss)


def over_tasks(first: rt.LayerStack, second: rt.LayerStack, plan: Plan, how: str) -> Iterator[Item]:
    """One pool over the layers of both tasks, as they are or turned apart."""
    stack = rt.LayerStack(torch.cat([first.values, second.values]), "both tasks")
    if how == HOW[2]:
        stack = null_models.turned_apart(stack, seed=2)
    yield "", "e_lora", "", rt.solve_lora(stack, plan.rank).error
    for k in plan.task_ks:
        budget = rt.RankBudget(plan.rank, k)
        solution = rt.solve_rasa(stack, budget, plan.solver)
        yield from point(stack, budget, solution, None)
        for j, tasks in enumerate(groups_served(solution.factors, 2)):
            yield k, "by_loss_of_tasks", str(j), tasks


def groups_served(factors: rt.RasaFactors, groups: int) -> list[float]:
    """Number of layer groups that every pool term serves, by loss; the groups are equal, one after another."""
    losses = rt.pool_participation(factors).losses
    served: list[float] = participation_ratio(losses.reshape(groups, -1, losses.shape[1]).sum(1)).tolist()
    return served


def sides(stack: rt.LayerStack, plan: Plan) -> Iterator[Item]:
    """The mean projectors of both sides, and the ranks of every layer."""
    spectrum = rt.shared_subspace_spectrum(stack, plan.rank)
    for side, values, level in zip(
        ("columns", "rows"), (spectrum.columns, spectrum.rows), spectrum.unrelated, strict=True
    ):
        yield "", f"unrelated_{side}", "", level
        for j, value in enumerate(values[: 2 * plan.rank].tolist()):
            yield "", f"projector_{side}", str(j), value
    ranks = rt.spectral_ranks(stack, [0.9])
    for i in range(stack.layers):
        yield "", "entropy_rank", str(i), float(ranks.entropy[i])
        yield "", "stable_rank", str(i), float(ranks.stable[i])
        yield "", "rank_90", str(i), int(ranks.energy[i, 0])


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
    yield from units_over_kinds(tuned, plan)


def units_over_kinds(
    stacks: dict[str, rt.LayerStack], plan: Plan
) -> Iterator[tuple[Key, Callable[[], Iterator[Item]]]]:
    """Yield the pools over the kinds of one run; those over different layers only if there are enough layers."""
    step = next(iter(stacks.values())).layers // len(stacks)
    ways = {EACH: stacks, LAYER: one_of_each_kind(stacks, 0)}
    if step > 0:
        ways[LAYERS] = one_of_each_kind(stacks, step)
    for how, groups in ways.items():
        yield ("kinds", how, "all kinds"), partial(separately, groups, plan)
    for how in HOW:
        yield ("kinds", how, "all kinds"), partial(over_kinds, stacks, how, plan)


def units_of_model(
    tuned: dict[str, rt.LayerStack], together: dict[str, rt.LayerStack] | None, plan: Plan, floors: Floors
) -> Iterator[tuple[Key, Callable[[], Iterator[Item]]]]:
    """The same units of another model: its updates as they are, turned apart, and four kinds of one run together."""
    for name, stack in tuned.items():
        yield ("side", "updates", name), partial(sides, stack, plan)
    for name, stack in tuned.items():
        own = {k: floors[name, k] for k in plan.ks if (name, k) in floors}
        yield ("pool", "updates", name), partial(split_gain, stack, plan, plan.ks, own)
    for name, stack in tuned.items():
        change = partial(null_models.turned_apart, seed=2)
        yield ("pool", "turned apart", name), partial(split_changed, change, stack, plan, plan.control_ks)
    if together is not None:
        yield from units_over_kinds(together, plan)


def kinds_together(chosen: Collection[str], model: str, runs: Path) -> dict[str, rt.LayerStack] | None:
    """The four kinds of one run, if all of them are chosen. None, and a line of print, where no run has all."""
    if not set(KINDS) <= set(chosen):
        return None
    if (together := updates_of_one_run(model, KINDS, runs)) is None:
        print(f"pools over kinds left out: no run in {runs} has all of {', '.join(KINDS)}")
    return together


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
            work = units(plan, floors)
        else:
            chosen = chosen_updates(options)
            together = kinds_together(chosen, options.model, options.runs)
            work = units_of_model(
                all_cropped(chosen, plan), None if together is None else all_cropped(together, plan), plan, floors
            )
        tasks = list(work)
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
