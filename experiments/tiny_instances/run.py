"""The table: minima, the solver's best error and the floors of every instance, in units of e_lora."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import rasa_theory as rt
from experiments.support.rows import Row, read_rows, write_rows
from experiments.tiny_instances.branching import enclose
from experiments.tiny_instances.descent import descend, descend_frames
from experiments.tiny_instances.instances import INSTANCES, Instance
from rasa_theory.commands.progress import ProgressBar
from rasa_theory.common import aligned

KEY = ("layers", "b", "a", "rank", "k", "kind", "seed", "e_lora")
MINIMUM = ("minimum", "proved", "capped_minimum", "descents", "starts", "hits", "missed_share", "boxes", "seconds")
SOLVER = ("best_found", "start", "stop_reason", "uncapped", "allocation", "closed", "dual", "two_sided")
COLUMNS = (*KEY, *MINIMUM, *SOLVER)
"""Columns of the table. Errors are squared; all but e_lora are in units of e_lora.

    minimum          lowest error of all descents and boxes: an upper bound on e_rasa(k), which is an infimum
    proved           lower bound by branch and bound; empty if there is none
    capped_minimum   lowest error of all descents of factors while no pool term was above 8 times the norm of its layer
    descents         what the descents move: all factors, or orthogonal frames where that is possible
    starts, hits     number of these descents, and of those that ended within 1e-4 of `minimum`
    missed_share     a lower minimum that this share of the starts leads to would have been found with probability 99 %
    best_found       error of `solve_rasa` as it is, `uncapped` without its limit on the size of terms
    allocation       the allocation bound; closed, dual, two_sided: the floors, each at least the one before
"""
TOLERANCE = 1e-3
"""Width of the proved intervals."""
UNCAPPED = rt.SolverOptions(max_cancellation=1e6)


def key(instance: Instance) -> Row:
    """What tells the rows apart; e_lora too, since the updates of another numpy could be others."""
    e_lora = rt.solve_lora(rt.LayerStack(instance.updates()), instance.rank).error
    values = (*instance.shape, instance.rank, instance.k, instance.kind.__name__, instance.seed, e_lora)
    return dict(zip(KEY, values, strict=True))


def is_stored(row: Row, stored: Row) -> bool:
    names = KEY[:-1]
    same = all(row[name] == stored[name] for name in names)
    return same and math.isclose(row["e_lora"], stored["e_lora"], rel_tol=1e-9)


def minimum(instance: Instance, e_lora: float, starts: int, max_boxes: int, say: Callable[[str], None]) -> Row:
    """The columns `MINIMUM`. `say` is called with the task in hand."""
    began = time.perf_counter()
    M = instance.updates()
    unit = float((M**2).sum()) / e_lora

    def watch_starts(n: int) -> None:
        say(f"{instance.name}, descents: {n}")

    def watch_boxes(done: int, left: int) -> None:
        say(f"{instance.name}, boxes: {done}, open: {left}")

    descents = descend(M, instance.rank, instance.k, starts, 200, seed=0, watch=watch_starts)
    errors, kind = descents.errors * unit, "factors"
    lowest, proved, boxes = float(errors.min()), None, 0
    if instance.axes:
        errors, kind = descend_frames(M.transpose(instance.axes), starts, 200, seed=0) * unit, "frames"
        lowest = min(lowest, float(errors.min()))
    if instance.eliminate is not None:
        high = lowest if instance.exact else math.inf
        enclosure = enclose(instance.eliminate(M / math.sqrt(e_lora)), high, TOLERANCE, max_boxes, watch_boxes)
        proved, boxes = enclosure.low, enclosure.boxes
        lowest = enclosure.high if instance.exact else lowest
    hits, missed = int((errors <= lowest + 1e-4).sum()), math.log(100) / starts
    seconds = round(time.perf_counter() - began, 1)
    values = (lowest, proved, descents.capped * unit, kind, starts, hits, missed, boxes, seconds)
    return dict(zip(MINIMUM, values, strict=True))


def solver(instance: Instance, e_lora: float) -> Row:
    """The columns `SOLVER`."""
    stack, budget = rt.LayerStack(instance.updates()), rt.RankBudget(instance.rank, instance.k)
    best = rt.solve_rasa(stack, budget)
    errors = (rt.solve_rasa(stack, budget, UNCAPPED).error, rt.allocation_bound(stack, budget).value)
    floors = (rt.lower_bound(stack, budget, name).value for name in ("closed", "dual", "two-sided"))
    others = (error / e_lora for error in (*errors, *floors))
    return dict(zip(SOLVER, (best.error / e_lora, best.start, best.stop_reason.name, *others), strict=True))


def certified(row: Row) -> float:
    """The highest lower bound on e_rasa(k): the floor, or what branch and bound proved."""
    floor: float = row["two_sided"]
    return max(floor, row["proved"] or 0.0)


def contradictions(row: Row) -> list[str]:
    """Sentences on errors below a lower bound, which is a bug, or below the stored minimum: too few starts."""
    name, lowest = label(row), min(row[column] for column in ("minimum", "best_found", "uncapped"))
    if lowest < certified(row) - 1e-9:
        return [f"{name}: the error {lowest:.9f} is below the lower bound {certified(row):.9f}"]
    if lowest < row["minimum"] - 1e-6:
        return [f"{name}: the solver's error {lowest:.6f} is below the stored minimum {row['minimum']:.6f}; "
                "run again with --again and more --starts"]  # fmt: skip
    return []


def is_wanted(instance: Instance, names: list[str] | None) -> bool:
    """Whether its minimum is to be looked for again. The names may be parts of an instance's; an empty list: all."""
    return names is not None and (not names or any(name in instance.name for name in names))


def label(row: Row) -> str:
    return f"{row['layers']}x{row['b']}x{row['a']} ({row['rank']},{row['k']}) {row['kind']}"


def guarantee(row: Row) -> str:
    """How the minimum is known: proved, or the share of the starts that hit it."""
    if row["minimum"] - certified(row) > 1.001 * TOLERANCE:
        return f"{row['hits']} of {row['starts']} starts"
    return "floor" if row["two_sided"] >= (row["proved"] or 0.0) else "boxes"


HEAD = ("instance", "floor", "certified", "minimum", "capped", "best found", "above", "below", "known by")


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table; `above` and `below` are the two sides of the gap between the error and the floor."""
    errors = (row["two_sided"], certified(row), row["minimum"], row["capped_minimum"], row["best_found"])
    sides = (max(0.0, row["best_found"] - row["minimum"]), max(0.0, row["minimum"] - row["two_sided"]))
    return (label(row), *(f"{value:.4f}" for value in (*errors, *sides)), guarantee(row))


def with_table(page: str, rows: list[Row]) -> str:
    """The page with its only Markdown table replaced by that of `rows`."""
    lines = page.splitlines(keepends=True)
    inside = [n for n, line in enumerate(lines) if line.startswith("|")]
    sides = ("---", *("---:",) * (len(HEAD) - 2), "---")
    new_rows = [f"| {' | '.join(words)} |\n" for words in (HEAD, sides, *map(cells, rows))]
    return "".join([*lines[: inside[0]], *new_rows, *lines[inside[-1] + 1 :]])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--again",
        nargs="*",
        metavar="NAME",
        help="look again for the stored minima of these instances; of all, if none",
    )
    parser.add_argument("--starts", type=int, default=4096, help="number of descents of each instance")
    parser.add_argument("--boxes", type=int, default=30_000_000, help="largest number of boxes of each instance")
    parser.add_argument("--smoke", action="store_true", help="two instances with few starts, in seconds")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--page", type=Path, help="a Markdown page whose table to replace by the new one")
    options = parser.parse_args(arguments)
    instances = INSTANCES[:2] if options.smoke else INSTANCES
    starts = min(options.starts, 64) if options.smoke else options.starts

    path = options.out / "tiny_instances.csv"
    stored, rows = read_rows(path), []
    pending = {instance: key(instance) for instance in INSTANCES}
    with ProgressBar(len(instances), "instances") as progress:
        for done, instance in enumerate(instances):
            row = pending.pop(instance)
            found = next((old for old in stored if is_stored(row, old)), None)
            if found is None or is_wanted(instance, options.again):
                row |= minimum(instance, row["e_lora"], starts, options.boxes, partial(progress, done))
            else:
                row |= {name: found[name] for name in ("e_lora", *MINIMUM)}
            progress(done, f"{instance.name}, solver and floors")
            rows.append(row | solver(instance, row["e_lora"]))
            later = [old for old in stored if any(is_stored(new, old) for new in pending.values())]
            write_rows(path, COLUMNS, [*rows, *later])  # so that an interrupted run loses no minimum
    print("\n".join(aligned([HEAD, *map(cells, rows)], left={0, len(HEAD) - 1})))
    wrong = [sentence for row in rows for sentence in contradictions(row)]
    if options.page is not None:
        page = with_table(options.page.read_text(encoding="utf-8"), rows)
        options.page.write_text(page, encoding="utf-8")
    for sentence in wrong:
        print(sentence)
    return 1 if wrong else 0
