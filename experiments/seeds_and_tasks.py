"""What updates share: two seeds of one task, two tasks, layers of one run, near and distant layers.

    python -m experiments.seeds_and_tasks                    # MiniLM; needs seed 1 of `python -m experiments.finetune`
    python -m experiments.seeds_and_tasks --model synthetic
    python -m experiments.seeds_and_tasks --model mpnet

The first set of layers is trained on code from seed 0. The second one is from seed 1 (relation `seed`) or trained on
prose (relation `task`). The two sets of the synthetic stacks are halves of one (relation `halves`): they share what all
its layers share. Written to --out, each unit of work as it is done; an interrupted run goes on from there:

    seeds_and_tasks.csv    one value per row. `part`, `relation` and `how` name the unit, `index` tells values apart:
      overlap    cosine <M, M'> / (||M|| ||M'||) of two updates, and ||U^T U'||_F^2 / r of their leading left (columns)
                 and right (rows) singular vectors: of the same layer in both sets, of another layer (the null model:
                 layers permuted), and of two layers of the first set at a distance (`index`); chance: of random spaces
      pool       one pool over both sets: as they are; one set turned, i.e. by one rotation for all layers of the second
                 set, which takes away what the sets share and leaves what layers of a set share; turned apart, i.e.
                 every layer by its own; and a pool for each set
      pair       a pool for each pair of layers: of the same layer in both sets, and of other layers (permuted)
      depth      pools over groups of layers of the first set: `neighbours`, `distant` ones and `all`

Items of pool, pair and depth: e_lora / ||M||^2, then allocation, best_found and floor in units of e_lora, summed over
the pools. All of them have the same rank, k and parameters, but for the mixing. The part of the gain that sets share is
best_found of `one set turned` less best_found of `as they are`. `by_loss_of_sets` is the number of sets that each term
serves.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import rasa_theory as rt
from experiments.models.update_sets import MODEL_NAMES, add_model_flags, chosen_updates, corner, updates_of
from experiments.support.command import refuses_bad_input
from experiments.support.rows import Row, Table
from experiments.support.timing import percents
from experiments.why_sharing_pays.measures import groups_served
from rasa_theory import null_models
from rasa_theory.commands.progress import ProgressBar
from rasa_theory.common import InputError

COLUMNS = ("model", "part", "relation", "how", "stack", "r", "k", "effort", "item", "index", "value")
KEY = COLUMNS[:8]
Key = tuple[str, str, str, str]  # part, relation, how, stack
Item = tuple[str, str, float]  # item, index, value
AS_THEY_ARE, TURNED_SET, TURNED_APART = "as they are", "one set turned", "turned apart"


@dataclass(frozen=True)
class Plan:
    """The budget of every pool, and how it is solved."""

    rank: int = 8
    k: int = 1
    solver: rt.SolverOptions = rt.SolverOptions()  # noqa: RUF009  (frozen)

    @property
    def budget(self) -> rt.RankBudget:
        return rt.RankBudget(self.rank, self.k)


# --------------------------------------------------------------------------------------------- what is measured


def pools(stacks: Sequence[rt.LayerStack], plan: Plan, sets: int = 0) -> Iterator[Item]:
    """The parts of the gain of a pool for each of these stacks, summed, in units of their e_lora.

    If there are `sets`, also the number of them that each term of the first pool serves.
    """
    solutions = [rt.solve_rasa(stack, plan.budget, plan.solver) for stack in stacks]
    gains = [rt.gain(stack, plan.budget, solution=solution) for stack, solution in zip(stacks, solutions, strict=True)]
    e_lora = sum(gain.e_lora for gain in gains)
    yield "e_lora_share", "", e_lora / sum(stack.norm_squared for stack in stacks)
    yield "allocation", "", sum(gain.e_allocation for gain in gains) / e_lora
    yield "best_found", "", sum(gain.e_rasa for gain in gains) / e_lora
    yield "floor", "", sum(gain.floor.value for gain in gains) / e_lora
    if sets:
        for j, served in enumerate(groups_served(solutions[0].factors, sets)):
            yield "by_loss_of_sets", str(j), served


def one_pool(first: rt.LayerStack, second: rt.LayerStack, plan: Plan, how: str) -> Iterator[Item]:
    """One pool over both sets, as they are, with one of them turned, or with all layers turned apart."""
    if how == TURNED_SET:
        second = turned_set(second, seed=3)
    stack = rt.LayerStack(torch.cat([first.values, second.values]), first.name)
    if how == TURNED_APART:
        stack = null_models.turned_apart(stack, seed=2)
    yield from pools([stack], plan, sets=2)


def turned_set(stack: rt.LayerStack, seed: int) -> rt.LayerStack:
    """All layers turned by the same random U and V: what they share stays, what they share with others is lost."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in stack.shape)
    return rt.LayerStack(U @ stack.values @ V, stack.name)


def pairs(first: rt.LayerStack, second: rt.LayerStack, plan: Plan, step: int) -> Iterator[Item]:
    """A pool for layer i of the first set and layer i + step (modulo L) of the second, for every i."""
    L = first.layers
    both = [torch.stack([first.values[i], second.values[(i + step) % L]]) for i in range(L)]
    yield from pools([rt.LayerStack(values, first.name) for values in both], plan)


def overlaps(first: rt.LayerStack, second: rt.LayerStack, plan: Plan) -> Iterator[Item]:
    """Overlaps of two sets: of the same layer, and of other layers."""
    L = first.layers
    same = [(i, i) for i in range(L)]
    other = [(i, j) for i in range(L) for j in range(L) if i != j]
    for where, indices in (("same layer", same), ("other layer", other)):
        yield "cosine", where, cosine(first, second, indices)
        for side in ("columns", "rows"):
            yield side, where, overlap_of(first, second, side, indices, plan.rank)
    for side, n in zip(("columns", "rows"), first.shape, strict=True):
        yield side, "chance", plan.rank / n


def overlaps_by_distance(stack: rt.LayerStack, plan: Plan) -> Iterator[Item]:
    """Overlaps of two layers of one set, by the number of layers between them plus one."""
    for distance in range(1, stack.layers):
        indices = [(i, i + distance) for i in range(stack.layers - distance)]
        yield "cosine", str(distance), cosine(stack, stack, indices)
        for side in ("columns", "rows"):
            yield side, str(distance), overlap_of(stack, stack, side, indices, plan.rank)


def leading(stack: rt.LayerStack, side: str, rank: int) -> Tensor:
    """Leading left (columns) or right (rows) singular vectors of every layer, (L, n, r)."""
    svd = stack.spectra.svd()
    return (svd.U if side == "columns" else svd.Vh.mT)[:, :, :rank]


def overlap(U: Tensor, W: Tensor) -> float:
    """Mean over i of ||U_i^T W_i||_F^2 / r, for orthonormal columns (n, b, r), (n, b, r)."""
    return float((U.mT @ W).square().sum((1, 2)).mean()) / U.shape[2]


def cosine(first: rt.LayerStack, second: rt.LayerStack, indices: Sequence[tuple[int, int]]) -> float:
    """Mean of <M_i, M'_j> / (||M_i|| ||M'_j||) over pairs (i, j)."""
    cosines = [torch.cosine_similarity(first.values[i].flatten(), second.values[j].flatten(), 0) for i, j in indices]
    return float(torch.stack(cosines).mean())


def overlap_of(
    first: rt.LayerStack, second: rt.LayerStack, side: str, indices: Sequence[tuple[int, int]], rank: int
) -> float:
    """Mean of ||U_i^T U'_j||_F^2 / r over pairs (i, j), for leading singular vectors of one side."""
    U, W = leading(first, side, rank), leading(second, side, rank)
    return overlap(U[[i for i, _ in indices]], W[[j for _, j in indices]])


def groups(layers: int, size: int, how: str) -> list[list[int]]:
    """Groups of `size` layers: neighbours, or as far from each other as they can be. `size` divides `layers`."""
    count = layers // size
    if how == "neighbours":
        return [list(range(size * n, size * (n + 1))) for n in range(count)]
    return [list(range(n, layers, count)) for n in range(count)]


def sizes(layers: int) -> list[int]:
    """Sizes of groups: 3 and 2 of six layers, 4 and 3 of twelve, 8 and 4 of sixteen."""
    return [n for n in (8, 4, 3, 2) if layers % n == 0 and 2 * n <= layers][:2]


def by_depth(stack: rt.LayerStack, plan: Plan, size: int, how: str) -> Iterator[Item]:
    """A pool for each group of layers."""
    yield from pools([rt.LayerStack(stack.values[g], stack.name) for g in groups(stack.layers, size, how)], plan)


# ------------------------------------------------------------------------------------------------ units of work


def units(
    first: dict[str, rt.LayerStack], others: dict[str, dict[str, rt.LayerStack]], plan: Plan
) -> Iterator[tuple[Key, Callable[[], Iterator[Item]]]]:
    """Yield (part, relation, how, stack) and the work that gives its rows: the cheap ones first, then the telling."""
    for relation, second in others.items():
        for name, stack in first.items():
            yield ("overlap", relation, "", name), partial(overlaps, stack, second[name], plan)
    for name, stack in first.items():
        yield ("overlap", "layers", "", name), partial(overlaps_by_distance, stack, plan)
    for name, stack in first.items():
        yield ("pool", "none", "a pool each", name), partial(pools, [stack], plan)
        for relation, second in others.items():
            yield ("pool", relation, AS_THEY_ARE, name), partial(one_pool, stack, second[name], plan, AS_THEY_ARE)
            yield ("pool", relation, TURNED_SET, name), partial(one_pool, stack, second[name], plan, TURNED_SET)
            yield ("pool", relation, "a pool each", name), partial(pools, [stack, second[name]], plan)
        for size, how in itertools.product(sizes(stack.layers), ("neighbours", "distant")):
            yield ("depth", f"groups of {size}", how, name), partial(by_depth, stack, plan, size, how)
    for name, stack in first.items():
        for relation, second in others.items():
            for how, step in (("same layer", 0), ("other layer", stack.layers // 2)):
                yield ("pair", relation, how, name), partial(pairs, stack, second[name], plan, step)
            yield ("pool", relation, TURNED_APART, name), partial(one_pool, stack, second[name], plan, TURNED_APART)


def weight(key: Key, stack: rt.LayerStack) -> int:
    """About the work of a unit, for the forecast."""
    part, relation, how, _ = key
    sets = 2 if part == "pool" and relation != "none" and how != "a pool each" else 1
    return {"overlap": 0, "pair": 1, "depth": 2, "pool": 2 * sets * sets}[part] * stack.layers


def sets_of(
    model: str, first: dict[str, rt.LayerStack], runs: Path
) -> tuple[dict[str, rt.LayerStack], dict[str, dict[str, rt.LayerStack]]]:
    """The first set, and the second one by its relation; relations whose updates are missing are named and left out."""
    if model == "synthetic":
        halves = {name: stack.values.chunk(2) for name, stack in first.items()}
        one, other = ({name: rt.LayerStack(half[n], name) for name, half in halves.items()} for n in range(2))
        return one, {"halves": other}
    others = {}
    for relation, task, seed in (("seed", "code", 1), ("task", "prose", 0)):
        try:
            others[relation] = updates_of(model, task, seed, runs, list(first))
        except InputError as error:
            print(f"relation {relation} left out: {error}")
    return first, others


# ------------------------------------------------------------------------------------------------ the command


def report(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of a table: overlaps, then the gains of pools in per cent of e_lora."""
    for key, own in itertools.groupby(rows, key=lambda row: tuple(row[name] for name in KEY)):
        values = [(row["item"], row["index"], row["value"]) for row in own]
        head = " ".join(str(word) for word in key[:5] if word is not None)
        if key[1] == "overlap":
            yield f"{head:64}" + "  ".join(f"{item} {index} {value:.3f}" for item, index, value in values if index)
            continue
        items = {item: value for item, _, value in values}
        allocation, best, floor = (items[name] for name in ("allocation", "best_found", "floor"))
        yield (
            f"{head:64} r = {key[5]}, k = {key[6]}  allocation {100 * (1 - allocation):6.3f} %  "
            f"sharing {100 * (allocation - best):6.3f} %  unknown {100 * (best - floor):6.2f} %"
        )


@refuses_bad_input
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--rank", type=int, default=8, help="r (8)")
    parser.add_argument("--k", type=int, default=1, help="(1)")
    parser.add_argument("--effort", default="quick", help="of the solver: quick, default or thorough (quick)")
    parser.add_argument("--sweeps", type=int, default=60, help="the most of each solution (60)")
    parser.add_argument("--smoke", action="store_true", help="a corner of one stack, in seconds")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)
    first, others = sets_of(options.model, chosen_updates(options), options.runs)
    plan = Plan(options.rank, options.k, rt.SolverOptions(effort=options.effort, max_sweeps=options.sweeps))
    if options.smoke:
        first, others = corner(first, 4), {relation: corner(second, 4) for relation, second in others.items()}
        plan = Plan(2, 1, rt.SolverOptions(start="allocation", max_sweeps=3))
    table = Table(options.out / "seeds_and_tasks.csv", COLUMNS, KEY)
    settings = {"model": MODEL_NAMES[options.model], "r": plan.rank, "k": plan.k, "effort": plan.solver.effort}
    work = [
        (settings | dict(zip(COLUMNS[1:5], key, strict=True)), task, weight(key, first[key[3]]))
        for key, task in units(first, others, plan)
    ]
    missing = [each for each in work if each[0] not in table]
    done = percents([load for _, _, load in missing])
    with ProgressBar(100, "%") as progress:
        for percent, (unit, task, _) in zip(done, missing, strict=True):
            progress(percent, ", ".join(str(unit[name]) for name in COLUMNS[1:5] if unit[name]))
            began = time.perf_counter()
            items = [*task(), ("seconds", "", round(time.perf_counter() - began, 1))]
            table.add([unit | dict(zip(COLUMNS[8:], item, strict=True)) for item in items])
    print(*report(table.rows), sep="\n")


if __name__ == "__main__":
    main()
