"""The loop on RaSA factors: sweeps on a stack from one start, with its limit on cancellation and its progress."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from rasa_theory.common import InputError
from rasa_theory.problem import LayerStack, RasaFactors, squared_error
from rasa_theory.solvers.accuracy import cancellation
from rasa_theory.solvers.descent import Best, BestSoFar, Descent, Guarded, decreases_less
from rasa_theory.solvers.sweeps import SWEEPS

DIVERGED = 1e4
"""The default limit on `cancellation` of a `RasaDescent`: beyond it terms diverge. That of `solve_rasa` is 8."""
_ROUNDING = 1e-3  # by which a term at the limit may exceed it, since factors are rounded to the dtype of the stack


@dataclass(frozen=True)
class Progress:
    """The argument of a callback, which is called after every sweep on the stack, and after every step of a search.

    Attributes:
        start: name of the start, or "search".
        sweep: number of sweeps since this start, or of steps of the search (heats and rounds of moves).
        max_sweeps: number of sweeps after which this descent pauses or ends, or of steps that the search plans.
        error: the squared error, summed over layers, in units of the input.
    """

    start: str
    sweep: int
    max_sweeps: int
    error: float


Callback = Callable[[Progress], None]


def in_units(stack: LayerStack, callback: Callback | None) -> Callback | None:
    """A callback for runs on `stack.unit()` which calls `callback` with errors in units of the input."""
    if callback is None:
        return None

    def scaled(progress: Progress) -> None:
        callback(dataclasses.replace(progress, error=progress.error * stack.scale**2))

    return scaled


class RasaDescent(Descent[RasaFactors, Best[RasaFactors, Any]]):
    """A `Descent` from `factors` on a stack in units of its scale, which is `unit`; errors are in its units, too.

    No term may exceed both `max_cancellation` times ||M_i|| and the terms of the start. A sweep that goes beyond is
    rejected and ends the descent; core sweeps stay inside. `best` is the lowest point so far. Raises InputError if the
    error of the start is not finite.
    """

    def __init__(
        self, unit: LayerStack, factors: RasaFactors, sweep: str, start: str, max_cancellation: float = DIVERGED
    ) -> None:
        self.unit = unit
        self.start = start
        error = squared_error(unit, factors)
        if not math.isfinite(error):
            raise InputError(f"the error of start {start!r} is {error}; a start needs finite factors")
        limit = max(max_cancellation, cancellation(unit, factors))
        allowed = limit * (1 + _ROUNDING)
        guarded = Guarded(SWEEPS[sweep](unit, limit), lambda point: cancellation(unit, point) > allowed)
        super().__init__(BestSoFar(guarded), factors.normalised(), error)

    @property
    def best(self) -> RasaFactors:
        """The factors of lowest error so far."""
        return self.point

    @property
    def best_error(self) -> float:
        """The lowest squared error so far."""
        return min(self.history)

    @property
    def solved(self) -> bool:
        """True if the lowest error is zero to rounding."""
        return math.sqrt(self.best_error) <= self.unit.rounding

    def run(self, max_sweeps: int, rtol: float, callback: Callback | None = None) -> Self:
        """Sweep until `max_sweeps` sweeps are done in all, or there is a reason to stop.

        With rtol = 0 the error alone never stops it. The callback gets errors in units of `unit`.
        """

        def report() -> None:
            if callback is not None:
                callback(Progress(self.start, self.sweeps, max_sweeps, self.history[-1]))

        with self.unit.suitable_threads():
            return self.advance(max_sweeps, decreases_less(rtol, self.unit.rounding), report)
