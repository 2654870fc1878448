"""The result of a method: its updates, and their error, which is measured in the same way for all methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from rasa_theory.problem import LayerStack

Settings = Mapping[str, int | str]
"""The settings of one configuration of a method, as keyword arguments of its function."""


class Evidence(Enum):
    """The evidence for an error: a minimum, or an upper bound on it. The value of each member is a sentence."""

    CLOSED_FORM = "The minimum, in closed form."
    BEST_FOUND = "The best found, an upper bound on the minimum: the problem is not convex."
    BEST_FOUND_WITH_FLOOR = "The best found, an upper bound on the minimum, which is not below the certified floor."
    OF_FACTORS = "As the method computes it: it minimises the error of factors, not of updates, so an upper bound."


@dataclass(frozen=True)
class Fit:
    """The updates of one method in one configuration, and their distance from the stack.

    All errors are squared, summed over the layers, and in the units of the input.

    Attributes:
        method: the name of the method in `METHODS`.
        settings: the configuration, as keyword arguments of the method.
        error: sum_i ||M_i - update(i)||_F^2, the direct residual in float64.
        parameters: the number of parameters stored for all layers, counted by the rule of
            `rasa_theory.methods.compare`.
        evidence: the evidence for the error.
        update_rank: the largest rank that an update can have.
        update: layer i -> its update (b, a) in float64.
        floor: a proved lower bound on the error of any fit with these settings, or None.
        history: the error at the initial guess and after every sweep; empty for closed forms.
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
class UnitFit:
    """The solution of a method on `stack.unit()`, in units of that view, before its error is measured.

    `stored` holds the tensors that have to be stored, and `indices` counts the whole numbers stored beside them.
    """

    update: Callable[[int], Tensor]
    stored: tuple[Tensor, ...]
    update_rank: int
    indices: int = 0
    history: tuple[float, ...] = ()
    floor: float | None = None


def measured(stack: LayerStack, method: str, settings: Settings, evidence: Evidence, solution: UnitFit) -> Fit:
    """The `Fit` of a solution, in units of the stack: its error is measured and its parameters are counted."""
    c, (b, a) = stack.scale, stack.shape
    return Fit(
        method=method,
        settings=dict(settings),
        error=residual(stack.unit(), solution.update) * c**2,
        parameters=sum(t.numel() for t in solution.stored) + solution.indices,
        evidence=evidence,
        update_rank=min(solution.update_rank, b, a),
        update=lambda i: solution.update(i) * c,
        floor=None if solution.floor is None else solution.floor * c**2,
        history=tuple(e * c**2 for e in solution.history),
    )


def residual(stack: LayerStack, update: Callable[[int], Tensor]) -> float:
    """The squared error sum_i ||M_i - update(i)||_F^2, formed directly in float64.

    Arguments:
        stack: the layers M_i, read once.
        update: layer i -> its update (b, a).

    Returns:
        The squared error, summed over layers, in the units of the stack.
    """
    layers = (tile.values.double() - update(tile.layer) for tile in stack.tiles(rows=stack.shape[0]))
    return math.fsum(float((E * E).sum()) for E in layers)
