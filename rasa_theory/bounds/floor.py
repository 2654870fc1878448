"""The certified floor: the best of all lower bounds on e_rasa(k) that one is willing to pay for."""

from __future__ import annotations

import torch

from rasa_theory.bounds.closed import Bound, closed_floors
from rasa_theory.bounds.dual import search_dual
from rasa_theory.bounds.search import FloorOptions, SearchProgress, SearchWatch, level_of
from rasa_theory.bounds.two_sided import search_two_sided
from rasa_theory.common import InputError, one_of
from rasa_theory.problem import LayerStack, RankBudget

CERTIFICATES = ("closed", "dual", "two-sided")
"""Each includes those before it."""


def lower_bound(
    stack: LayerStack,
    budget: RankBudget,
    certificate: str = "closed",
    options: FloorOptions | None = None,
    watch: SearchWatch | None = None,
) -> Bound:
    """A certified floor below e_rasa(k): the largest of its kind, and the name of the argument that gave it.

    - closed: `closed_floors`, immediately; those of k = r too, since e_rasa(r) <= e_rasa(k) (move private terms into
      the pool), and the split form of plain CP can be the higher one.
    - dual: also the best found of `dual_value`, per orientation at most `options.max_seconds`.
    - two-sided: also the best found of `two_sided_value`, at most twice that.

    However a search ends, its value is a formula that holds at every point, with exact spectra in float64, less its
    rounding; where nothing is left to search for the closed forms stand alone: k = 0, one layer, or sigma_{i,r+1}^2 so
    small that e_lora <= sum_i (m - r) sigma_{i,r+1}^2, m = min(b, a), is less than the rounding of a search, whose
    value would be negative.
    `watch` is told of every step, a `SearchProgress` with the floor in units of the stack. Raises InputError if
    r > min(b, a) or `certificate` is unknown.
    """
    budget.check_fits(stack)
    one_of("certificate", certificate, CERTIFICATES)
    if certificate != "closed" and not stack.sharding.alone:
        raise InputError(
            f"certificate {certificate} is searched for in all layers of a stack together, by one process; ask for "
            "certificate closed, or run one process"
        )
    unit, options = stack.unit(), options or FloorOptions()
    resolved = (
        level_of(unit.spectra.singular_values(), budget.rank) > torch.finfo(torch.float64).eps * unit.norm_squared
    )
    open_question = unit.layers > 1 and budget.shared_rank > 0 and resolved
    told = None if watch is None else _in_units(stack, watch)
    with stack.suitable_threads():
        bounds = closed_floors(unit, budget)
        if budget.private_rank > 0:
            bounds += closed_floors(unit, RankBudget(budget.rank, budget.rank))
        if open_question and certificate != "closed" and budget.private_rank > 0:
            bounds += [Bound(search_dual(v, budget, options, told), "dual") for v in (unit, unit.transpose())]
        if open_question and certificate == "two-sided":
            bounds.append(Bound(search_two_sided(unit, budget, options, told), "two-sided"))
    best = max(bounds, key=lambda bound: bound.value)  # the first of equals, so "zero" if nothing is above it
    return Bound(best.value * stack.scale**2, best.name)


def _in_units(stack: LayerStack, watch: SearchWatch) -> SearchWatch:
    """The watch of a search on `stack.unit()`, told in the units of `stack`."""

    def told(progress: SearchProgress) -> None:
        watch(progress._replace(value=progress.value * stack.scale**2))

    return told
