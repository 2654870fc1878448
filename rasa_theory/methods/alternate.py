"""The loop of the methods that alternate exact steps: several starts, the lowest of them run to its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from rasa_theory.problem import LayerStack
from rasa_theory.solvers import Descent, Extrapolated, Memoryless, Sweep, decreases_less

RTOL = 1e-6  # a sweep that lowers the error by at most this share of it is the last

S = TypeVar("S", bound=tuple[Tensor, ...])


@dataclass(frozen=True)
class Steps(Generic[S]):
    """An alternation: sweep(state) -> state, and the squared error of a state in units of `LayerStack.unit()`.

    With `beyond`, sweeps are `Extrapolated`: they start from beyond(state, the one before, stride).
    """

    sweep: Callable[[S], S]
    error: Callable[[S], float]
    beyond: Callable[[S, S, float], S] | None = None

    def swept(self, state: S) -> tuple[S, float]:
        """The state after one sweep, and its squared error."""
        after = self.sweep(state)
        return after, self.error(after)

    def as_sweep(self) -> Sweep[S, Any]:
        """The sweep of a `Descent`."""
        return Memoryless(self.swept) if self.beyond is None else Extrapolated(self.swept, self.beyond)


def alternate(
    unit: LayerStack, steps: Steps[S], starts: Sequence[S], max_sweeps: int, heat: int = 8
) -> tuple[S, tuple[float, ...]]:
    """Do `heat` sweeps from each start, and continue the lowest run: its last state, and the errors of all its sweeps.

    The run ends after `max_sweeps` sweeps, at rounding level, or when a sweep gains at most `RTOL` of the error. The
    errors, squared and in units of `unit`, are measured at the start and after every sweep. A start that reaches
    rounding level makes the later ones unnecessary.
    """
    rounding = unit.rounding
    is_converged = decreases_less(RTOL, rounding)
    runs: list[Descent[S, Any]] = []

    def is_solved(run: Descent[S, Any]) -> bool:
        return math.sqrt(run.history[-1]) <= rounding

    def advance(run: Descent[S, Any], sweeps: int) -> None:
        if not is_solved(run):
            run.advance(sweeps, is_converged)

    with unit.suitable_threads():
        for start in starts:
            run = Descent(steps.as_sweep(), start, steps.error(start))
            runs.append(run)
            advance(run, min(heat, max_sweeps))
            if is_solved(run):
                break
        best = min(runs, key=lambda run: run.history[-1])
        advance(best, max_sweeps)
    return best.point, tuple(best.history)
