"""The certified floor: the best of all lower bounds on e_rasa(k) that one is willing to pay for."""

from __future__ import annotations

from rasa_theory.bounds.closed import Bound, closed_floors
from rasa_theory.errors import InputError
from rasa_theory.problem import LayerStack, RankBudget

CERTIFICATES = ("closed",)


def lower_bound(stack: LayerStack, budget: RankBudget, certificate: str = "closed") -> Bound:
    """A certified floor below e_rasa(k): the largest of its kind, and the name of the argument that gave it.

    Spectra are exact ones in float64. From each bound its rounding allowance is taken off, so that the value is not
    above the truth. Raises InputError if r > min(b, a) or `certificate` is unknown.
    """
    budget.check_fits(stack)
    if certificate not in CERTIFICATES:
        raise InputError(f"unknown certificate {certificate!r}; known: {', '.join(CERTIFICATES)}")
    best = max(closed_floors(stack.unit(), budget), key=lambda bound: bound.value)  # the first of equals: zero
    return Bound(best.value * stack.scale**2, best.name)
