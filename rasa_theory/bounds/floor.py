"""The certified floor: the highest lower bound on e_rasa(k) that a certificate allows."""

from __future__ import annotations

import torch

from rasa_theory.bounds.bound import Bound, BoundName
from rasa_theory.bounds.closed import closed_floors
from rasa_theory.bounds.dual import search_dual
from rasa_theory.bounds.probable import FAILURE, probable_floor
from rasa_theory.bounds.search import FloorOptions, SearchProgress, SearchWatch, level_of
from rasa_theory.bounds.two_sided import search_two_sided
from rasa_theory.common import InputError, one_of
from rasa_theory.problem import SPECTRA, LayerStack, RankBudget

CERTIFICATES = ("closed", "dual", "two-sided")
"""Kinds of certificate. Each includes those before it, and takes longer."""


def check_certificate(certificate: str, is_alone: bool) -> None:
    """Raise InputError if `certificate` is unknown, or asks several processes for a search that only one can run."""
    one_of("certificate", certificate, CERTIFICATES)
    if certificate != "closed" and not is_alone:
        raise InputError(
            f"certificate {certificate} is searched for in all layers of a stack together, by one process; ask for "
            "certificate closed, or run one process",
            "certificate",
        )


def lower_bound(
    stack: LayerStack,
    budget: RankBudget,
    certificate: str = "closed",
    options: FloorOptions | None = None,
    watch: SearchWatch | None = None,
    spectra: str = "auto",
) -> Bound:
    """A certified floor below e_rasa(k): no factors of this budget have a lower error.

    It is the highest of these floors. Each is proved in the docstring of the function that computes it.

    - closed: the forms of `closed_floors`, for k, and for r in place of k. The floors for k = r are valid too, since
      e_rasa(r) <= e_rasa(k): a pool term can do the work of a private term of one layer, so RaSA factors with k < r
      are special ones with k = r. They are sometimes higher.
    - dual: also the value of `dual_value` for columns and for rows, where a search ends.
    - two-sided: also the value of `two_sided_value`, where a search ends.

    A floor holds wherever its search ends: it is a formula that holds at every point, computed from float64 spectra,
    minus a bound on its rounding error. There is no search where nothing is left to decide: for k = 0, and for one
    layer. Nor is there one where rounding would take off more than e_lora, see `_is_resolved`. Plain CP, k = r, has no
    dual floor above the closed ones.

    Arguments:
        stack: the updates M_i, (L, b, a).
        budget: r and k.
        certificate: "closed" (immediate), "dual" (up to 2 `options.max_seconds`) or "two-sided" (up to 2 more).
        options: limits of the searches. None: `FloorOptions()`.
        watch: called after every iteration of a search with its `SearchProgress`.
        spectra: "exact", "leading" or "auto", see `LayerStack.with_spectra`. With leading directions,
            `probable_floor` computes the closed floors, and products evaluate the searched ones. All of them together
            fail with a probability of at most 1e-10, and their name says so.

    Returns:
        The floor, squared, summed over layers, in the units of the stack, with the name of its proof.

    Raises:
        InputError: r exceeds min(b, a), the certificate is unknown, or it needs a search and the stack is sharded over
            several processes.
    """
    budget.check_fits(stack)
    check_certificate(certificate, stack.sharding.alone)
    one_of("spectra", spectra, SPECTRA)
    unit = stack.with_spectra(spectra, budget).unit()
    with stack.suitable_threads():
        if unit.spectra.is_leading:
            floors = [probable_floor(unit, budget)]
        else:
            floors = closed_floors(unit, budget)
            if budget.private_rank > 0:
                floors += closed_floors(unit, RankBudget(budget.rank, budget.rank))
        if certificate != "closed" and _is_open(unit, budget):
            unit_watch = None if watch is None else _in_units(stack, watch)
            floors += _searched_floors(unit, budget, certificate, options or FloorOptions(), unit_watch)
    best = max(floors, key=lambda floor: floor.value)  # the first of equals, so "zero" if nothing is above it
    return Bound(best.value * stack.scale**2, best.name, best.failure)


def _searched_floors(
    unit: LayerStack, budget: RankBudget, certificate: str, options: FloorOptions, watch: SearchWatch | None
) -> list[Bound]:
    """The floors of a search that `certificate` includes."""
    found: list[tuple[BoundName, float]] = []
    if budget.private_rank > 0:
        for view in (unit, unit.transpose()):
            found.append((BoundName.DUAL, search_dual(view, budget, options, watch)))
    if certificate == "two-sided":
        found.append((BoundName.TWO_SIDED, search_two_sided(unit, budget, options, watch)))
    if unit.spectra.is_leading:
        return [Bound(value, f"{name}, probable", FAILURE) for name, value in found]
    return [Bound(value, name) for name, value in found]


def _is_open(unit: LayerStack, budget: RankBudget) -> bool:
    """Whether a search can raise the floor: layers share a pool, and their tails are above the rounding of a search."""
    return unit.layers > 1 and budget.shared_rank > 0 and _is_resolved(unit, budget)


def _is_resolved(unit: LayerStack, budget: RankBudget) -> bool:
    """Whether the mean of sigma_{i,r+1}^2 exceeds eps ||M||^2.

    With m = min(b, a), e_lora <= sum_i (m - r) sigma_{i,r+1}^2. Where the mean is lower, that is less than the rounding
    of a search, whose value would be negative.
    """
    return level_of(unit, budget.rank) > torch.finfo(torch.float64).eps * unit.norm_squared


def _in_units(stack: LayerStack, watch: SearchWatch) -> SearchWatch:
    """The watch of a search on `stack.unit()`, which passes values on in the units of `stack`."""

    def watch_unit(progress: SearchProgress) -> None:
        watch(progress._replace(value=progress.value * stack.scale**2))

    return watch_unit
