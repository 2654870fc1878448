"""The loop of the methods that alternate exact steps: several starts, the lowest of them run to its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from rasa_theory.problem import LayerStack

RTOL = 1e-6  # a sweep that lowers the error by less than this share of it is the last

S = TypeVar("S", bound=tuple[Tensor, ...])


@dataclass(frozen=True)
class Steps(Generic[S]):
    """What is alternated: sweep(state) -> state, and the squared error of a state in units of `LayerStack.unit()`.

    With `beyond`, a sweep begins at beyond(state, the one before, stride), by a stride that grows while this lowers the
    error and shrinks where it does not; then it begins at the state itself. So the error never rises.
    """

    sweep: Callable[[S], S]
    error: Callable[[S], float]
    beyond: Callable[[S, S, float], S] | None = None


def alternate(
    unit: LayerStack, steps: Steps[S], starts: Sequence[S], max_sweeps: int, heat: int = 8
) -> tuple[S, tuple[float, ...]]:
    """Sweeps from each of `starts`, the lowest after `heat` sweeps to its end; the last state and all errors.

    Ends after `max_sweeps` sweeps, where one gains less than `RTOL` of the error, or at rounding level. The errors,
    squared and in units of `unit`, are those measured after every sweep, the first at the start: nothing is left out.
    """
    with unit.suitable_threads():
        runs: list[_Run[S]] = []
        for start in starts:
            runs.append(_Run(unit, steps, start).go_on(min(heat, max_sweeps)))
            if runs[-1].solved:
                break
        best = min(runs, key=lambda run: run.history[-1]).go_on(max_sweeps)
    return best.state, tuple(best.history)


class _Run(Generic[S]):
    """Sweeps from one start, which may be taken up again."""

    def __init__(self, unit: LayerStack, steps: Steps[S], start: S) -> None:
        self._steps, self._rounding = steps, unit.rounding
        self._before, self._stride = start, 0.0
        self.state, self.history = start, [steps.error(start)]

    @property
    def solved(self) -> bool:
        """Whether the error is zero to rounding."""
        return math.sqrt(self.history[-1]) <= self._rounding

    def go_on(self, sweeps: int) -> _Run[S]:
        """Sweep until `sweeps` are done in all, or nothing more is gained."""
        while len(self.history) <= sweeps and not self.solved and not self._stalled:
            found, error = self._next()
            self._before, self.state = self.state, found
            self.history.append(error)
        return self

    @property
    def _stalled(self) -> bool:
        return len(self.history) > 1 and self.history[-2] - self.history[-1] <= RTOL * self.history[-2]

    def _next(self) -> tuple[S, float]:
        steps = self._steps
        if steps.beyond is not None and self._stride > 0:
            found = steps.sweep(steps.beyond(self.state, self._before, self._stride))
            error = steps.error(found)
            if error < self.history[-1]:
                self._stride *= 1.3
                return found, error
            self._stride = max(self._stride / 2, 0.5)
        else:
            self._stride = 1.0
        found = steps.sweep(self.state)
        return found, steps.error(found)
