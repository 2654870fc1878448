"""What every method of this room returns, how its error is measured, and what it needs to be listed in METHODS."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from rasa_theory.methods.settings import Settings
from rasa_theory.problem import LayerStack


class Evidence(Enum):
    """What is known of an error, as a sentence."""

    CLOSED_FORM = "The minimum, in closed form."
    BEST_FOUND = "The best found, an upper bound on the minimum: the problem is not convex."
    BEST_FOUND_WITH_FLOOR = "The best found, an upper bound on the minimum, which is not below the certified floor."
    OF_FACTORS = "As the method computes it: it minimises the error of factors, not of updates, so an upper bound."


@dataclass(frozen=True)
class Fit:
    """Updates of one method in one configuration, and how far they are from the stack.

    error: sum_i ||M_i - update(i)||_F^2, the direct residual in float64, in units of the input; parameters: the numbers
    that have to be stored for all layers, by the rule of `rasa_theory.methods`; update_rank: the largest rank that an
    update can have; update: layer -> its update (b, a) in float64; floor: what no updates of this method and
    configuration can be below (None: nothing is known); history: the squared error after every sweep (empty: none).
    """

    method: str
    settings: Settings
    error: float
    parameters: int
    evidence: Evidence
    update_rank: int
    update: Callable[[int], Tensor]
    floor: float | None = None
    history: tuple[float, ...] = ()


@dataclass(frozen=True)
class Found:
    """What a method found on `stack.unit()`, in units of that view.

    `stored` are the tensors that have to be stored, `indices` how many whole numbers there are beside them.
    """

    update: Callable[[int], Tensor]
    stored: tuple[Tensor, ...]
    update_rank: int
    indices: int = 0
    history: tuple[float, ...] = ()
    floor: float | None = None


def fitted(stack: LayerStack, method: str, settings: Settings, evidence: Evidence, found: Found) -> Fit:
    """The Fit of what was found, in units of the stack: the error measured, the parameters counted."""
    c, (b, a) = stack.scale, stack.shape
    return Fit(
        method=method,
        settings=dict(settings),
        error=residual(stack.unit(), found.update) * c**2,
        parameters=sum(t.numel() for t in found.stored) + found.indices,
        evidence=evidence,
        update_rank=min(found.update_rank, b, a),
        update=lambda i: found.update(i) * c,
        floor=None if found.floor is None else found.floor * c**2,
        history=tuple(e * c**2 for e in found.history),
    )


def residual(stack: LayerStack, update: Callable[[int], Tensor]) -> float:
    """sum_i ||M_i - update(i)||_F^2, direct, in float64; one pass."""
    layers = (tile.values.double() - update(tile.layer) for tile in stack.tiles(rows=stack.shape[0]))
    return math.fsum(float((E * E).sum()) for E in layers)


@dataclass(frozen=True)
class Method:
    """An entry of METHODS: solve(stack, **settings) -> Fit, and which settings to try within a number of parameters.

    configurations(stack, parameters): settings of at most so many parameters, each as large as fits along its own
    direction (more layers' own ranks, more shared ones, ..); none where not even the smallest one fits.
    """

    solve: Callable[..., Fit]
    configurations: Callable[[LayerStack, int], list[Settings]]
