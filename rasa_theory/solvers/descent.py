"""The loop: sweeps of exact block updates from one start, with its history, its stopping rules and the best point."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from rasa_theory import linalg
from rasa_theory.common import InputError
from rasa_theory.problem import LayerStack, RasaFactors, squared_error
from rasa_theory.solvers import updates
from rasa_theory.solvers.accuracy import cancellation
from rasa_theory.solvers.sweeps.core import CoreSweep
from rasa_theory.solvers.sweeps.joint import joint_iteration
from rasa_theory.solvers.sweeps.paper import paper_sweep

DEGENERATE = 1e4  # the `cancellation` beyond which terms are taken to diverge


class StopReason(Enum):
    """Why an iteration ended, as a sentence."""

    CONVERGED = "The relative decrease over one sweep fell below the tolerance, or the error to rounding."
    SWEEP_LIMIT = "The sweep limit was reached while the error still fell; raise max_sweeps."
    DEGENERATE = "Terms grew beyond the largest cancellation allowed; the best iterate before is returned."
    NON_FINITE = "A factor became infinite or NaN; the best earlier iterate is returned."


@dataclass(frozen=True)
class Progress:
    """What a callback is told after every sweep. `error` is squared, in units of the input."""

    start: str
    sweep: int
    max_sweeps: int
    error: float


Callback = Callable[[Progress], None]
Sweep = Callable[[RasaFactors], tuple[RasaFactors, float]]
"""Factors -> the factors after one sweep, and their squared error."""


SWEEPS: dict[str, Callable[[LayerStack], Sweep]] = {
    "core": CoreSweep,
    "joint": lambda unit: functools.partial(joint_iteration, unit, unit.layer_norms()),
    "paper": lambda unit: functools.partial(paper_sweep, unit, unit.layer_norms()),
}
"""A stack's unit view -> a sweep."""


class Descent:
    """Sweeps from one start, which may be interrupted and taken up again.

    `unit` is a `LayerStack.unit()`; factors and errors are in its units. After `run`, `stop_reason` is None if the
    sweeps asked for are done and nothing else ended it. `history` has the error of every iterate, the start's first;
    `best` and `best_error` are those of the lowest. A sweep after which terms exceed `max_cancellation` times ||M_i||,
    and those of the start, is not taken and ends it.
    """

    def __init__(
        self, unit: LayerStack, factors: RasaFactors, sweep: str, start: str, max_cancellation: float = DEGENERATE
    ) -> None:
        self.unit, self.start = unit, start
        self._sweep = SWEEPS[sweep](unit)
        self.factors = factors.normalised()
        error = squared_error(unit, factors)
        if not math.isfinite(error):
            raise InputError(f"the error of start {start!r} is {error}; a start needs finite factors")
        self.best, self.best_error, self.history = self.factors, error, [error]
        self.stop_reason: StopReason | None = None
        self._most = max(max_cancellation, cancellation(unit, factors))
        private = factors.private_A.abs().amax((1, 2)) if factors.private_A.shape[1] else factors.mixing.new_zeros(0)
        self._lacks_private = sweep != "paper" and factors.sharding.all_reduce_max(private) == 0

    @property
    def sweeps(self) -> int:
        """How many sweeps have been done."""
        return len(self.history) - 1

    @property
    def solved(self) -> bool:
        """Whether the lowest error is zero to rounding."""
        return math.sqrt(self.best_error) <= self.unit.rounding

    def run(self, max_sweeps: int, rtol: float, callback: Callback | None = None, scale: float = 1.0) -> Descent:
        """Sweep until `max_sweeps` are done in all, or a stop reason shows.

        With rtol = 0 the error alone never stops it. `scale` turns the errors that the callback is told into the
        units of the input.
        """
        with self.unit.suitable_threads():
            while self.stop_reason is None and self.sweeps < max_sweeps:
                self._step(rtol)
                if callback is not None:
                    callback(Progress(self.start, self.sweeps, max_sweeps, self.history[-1] * scale**2))
        return self

    def _step(self, rtol: float) -> None:
        previous = self.history[-1]
        try:
            if self._lacks_private:  # these sweeps need row spaces to begin with
                self.factors, self._lacks_private = updates.update_private(self.unit, self.factors), False
            self.factors, error = self._sweep(self.factors)
        except (linalg.LinAlgError, ArithmeticError):
            error = math.nan
        if not math.isfinite(error):
            self.stop_reason = StopReason.NON_FINITE
            return
        if cancellation(self.unit, self.factors) > self._most:
            self.stop_reason = StopReason.DEGENERATE
            return
        self.history.append(error)
        if error < self.best_error:
            self.best, self.best_error = self.factors, error
        if rtol > 0 and (previous - error <= rtol * previous or math.sqrt(error) <= self.unit.rounding):
            self.stop_reason = StopReason.CONVERGED
