"""What is measured of a stack, or of several: the items of a unit of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import rasa_theory as rt
from experiments.floors import is_floor_of
from experiments.support.rows import Row
from experiments.why_sharing_pays.figure import HOW
from experiments.why_sharing_pays.stacks import KINDS, Plan
from rasa_theory import methods, null_models
from rasa_theory.problem import participation_ratio

Item = tuple[int | str, str, str, float | str]  # k, item, index, value


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
    """A pool for each stack: the parts of their gains together, in units of the summed e_lora, and all their terms.

    Of a stack with one matrix of each kind also the two kinds that lose most without a term.
    """
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
                if (shares := terms.losses[:, j]).numel() == len(KINDS):
                    first, second = shares.argsort(descending=True)[:2].sort().values.tolist()
                    yield k, "two_kinds", f"{name} {j}", f"{KINDS[first]} and {KINDS[second]}"


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
