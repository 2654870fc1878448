"""The one loop: sweeps from one start, with their history and the reason to stop; and wrappers that change a sweep."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Generic, Protocol, Self, TypeVar

from rasa_theory import linalg

P = TypeVar("P")
"""A point: what is improved, for instance `RasaFactors`."""
S = TypeVar("S")
"""A state: a point, and what its sweep remembers beside it."""


class StopReason(Enum):
    """The reason why an iteration ended; the value of each member is a sentence.

    Attributes:
        CONVERGED: one sweep lowered the error by less than `rtol` of it, or the error is zero to rounding.
        SWEEP_LIMIT: `max_sweeps` sweeps were done, and the error still fell.
        DEGENERATE: a term exceeded `max_cancellation` times the norm of its layer.
        NON_FINITE: a factor or the error became infinite or NaN, or a factorisation failed.
    """

    CONVERGED = "The relative decrease over one sweep fell below the tolerance, or the error to rounding."
    SWEEP_LIMIT = "The sweep limit was reached while the error still fell; raise max_sweeps."
    DEGENERATE = "Terms grew beyond the largest cancellation allowed; the best iterate before is returned."
    NON_FINITE = "A factor became infinite or NaN; the best earlier iterate is returned."


class SweepFailed(Exception):
    """A sweep whose result must not be used; `reason` says why."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Sweep(Protocol[P, S]):
    """One sweep of a descent, state -> (state, squared error), and how its states begin and end.

    Everything that a sweep remembers is in its state. A state may be used up by the sweep, so only the latest goes on.
    """

    def begin(self, point: P, error: float) -> S:
        """The state from which the first sweep starts; `error` is the squared error at `point`."""
        ...

    def __call__(self, state: S, /) -> tuple[S, float]:
        """The state after one sweep, and its squared error."""
        ...

    def point(self, state: S) -> P:
        """The point of a state."""
        ...


class Descent(Generic[P, S]):
    """Sweeps from one start, which may be interrupted and continued.

    `history` holds the squared error of every iterate, the start's first. `stop_reason` is None as long as the descent
    can be continued. A sweep that fails, or that ends at an infinite error, is rejected and ends the descent.
    """

    def __init__(self, sweep: Sweep[P, S], start: P, error: float) -> None:
        self._sweep = sweep
        self._start = start
        self._state: S | None = None
        self.history = [error]
        self.stop_reason: StopReason | None = None

    @property
    def sweeps(self) -> int:
        """The number of sweeps done so far."""
        return len(self.history) - 1

    @property
    def point(self) -> P:
        """The current point, or the lowest one if the sweep is `BestSoFar`."""
        return self._start if self._state is None else self._sweep.point(self._state)

    def advance(
        self,
        max_sweeps: int,
        is_converged: Callable[[list[float]], bool],
        after_sweep: Callable[[], None] | None = None,
    ) -> Self:
        """Sweep until `max_sweeps` sweeps are done in all, or there is a reason to stop.

        `is_converged` decides by the history. `after_sweep` is called after every sweep, also a rejected one.
        """
        while self.stop_reason is None and self.sweeps < max_sweeps:
            self.stop_reason = self._step(is_converged)
            if after_sweep is not None:
                after_sweep()
        return self

    def _step(self, is_converged: Callable[[list[float]], bool]) -> StopReason | None:
        try:
            if self._state is None:
                self._state = self._sweep.begin(self._start, self.history[0])
            state, error = self._sweep(self._state)
        except SweepFailed as failure:
            return failure.reason
        if not math.isfinite(error):
            return StopReason.NON_FINITE
        self._state = state
        self.history.append(error)
        return StopReason.CONVERGED if is_converged(self.history) else None


def decreases_less(rtol: float, rounding: float) -> Callable[[list[float]], bool]:
    """A rule for `Descent.advance`: the last sweep lowered the error by at most `rtol` of it, or to rounding level.

    `rounding` is in units of norm, the errors are squared. With rtol = 0 the error alone never stops a descent.
    """

    def is_converged(history: list[float]) -> bool:
        before, error = history[-2:]
        return rtol > 0 and (before - error <= rtol * before or math.sqrt(error) <= rounding)

    return is_converged


class Memoryless(Generic[P]):
    """A sweep that remembers nothing: `step` takes a point to the next one and its squared error."""

    def __init__(self, step: Callable[[P], tuple[P, float]]) -> None:
        self._step = step

    def begin(self, point: P, error: float) -> P:
        return point

    def __call__(self, state: P, /) -> tuple[P, float]:
        return self._step(state)

    def point(self, state: P) -> P:
        return state


@dataclass(frozen=True)
class Trail(Generic[P]):
    """The state of `Extrapolated`: a point, its squared error, the point before, and the stride of the next sweep."""

    point: P
    error: float
    before: P
    stride: float


class Extrapolated(Generic[P]):
    """Sweeps that start beyond the last point, x + s (x - x_prev), as `beyond`(x, x_prev, s) has it.

    Alternating minimisation crawls along curved valleys, and its changes then point the same way for many sweeps. A
    fixed s > 1 either gains little or overshoots. So the stride s starts at 1 after the first sweep, grows by 1.3 where
    the error falls, and is halved (not below 0.5) where it does not. In that case the sweep is repeated from x itself,
    so that the error never rises. The three constants were chosen by trial. `step` must not use up its argument.
    """

    GROWTH = 1.3
    SHRINKAGE = 0.5
    SMALLEST = 0.5

    def __init__(self, step: Callable[[P], tuple[P, float]], beyond: Callable[[P, P, float], P]) -> None:
        self._step = step
        self._beyond = beyond

    def begin(self, point: P, error: float) -> Trail[P]:
        return Trail(point, error, before=point, stride=0.0)

    def __call__(self, trail: Trail[P], /) -> tuple[Trail[P], float]:
        stride = 1.0
        if trail.stride > 0:
            point, error = self._step(self._beyond(trail.point, trail.before, trail.stride))
            if error < trail.error:
                return Trail(point, error, trail.point, self.GROWTH * trail.stride), error
            stride = max(self.SHRINKAGE * trail.stride, self.SMALLEST)
        point, error = self._step(trail.point)
        return Trail(point, error, trail.point, stride), error

    def point(self, state: Trail[P]) -> P:
        return state.point


@dataclass(frozen=True)
class Best(Generic[P, S]):
    """The state of `BestSoFar`: the state of the sweep inside, and the lowest point so far with its squared error."""

    current: S
    lowest: P
    error: float


class BestSoFar(Generic[P, S]):
    """A sweep whose point is the lowest one so far: rounding can raise the error where it is near zero."""

    def __init__(self, sweep: Sweep[P, S]) -> None:
        self._sweep = sweep

    def begin(self, point: P, error: float) -> Best[P, S]:
        return Best(self._sweep.begin(point, error), point, error)

    def __call__(self, best: Best[P, S], /) -> tuple[Best[P, S], float]:
        state, error = self._sweep(best.current)
        if error < best.error:
            return Best(state, self._sweep.point(state), error), error
        return Best(state, best.lowest, best.error), error

    def point(self, state: Best[P, S]) -> P:
        return state.lowest


class Guarded(Generic[P, S]):
    """A sweep that fails with a reason: where its algebra fails, and where `is_degenerate` holds for its point."""

    def __init__(self, sweep: Sweep[P, S], is_degenerate: Callable[[P], bool]) -> None:
        self._sweep = sweep
        self._is_degenerate = is_degenerate

    def begin(self, point: P, error: float) -> S:
        with _failures_named():
            return self._sweep.begin(point, error)

    def __call__(self, state: S, /) -> tuple[S, float]:
        with _failures_named():
            state, error = self._sweep(state)
        if math.isfinite(error) and self._is_degenerate(self._sweep.point(state)):
            raise SweepFailed(StopReason.DEGENERATE)
        return state, error

    def point(self, state: S) -> P:
        return self._sweep.point(state)


@contextlib.contextmanager
def _failures_named() -> Iterator[None]:
    try:
        yield
    except (linalg.LinAlgError, ArithmeticError) as error:
        raise SweepFailed(StopReason.NON_FINITE) from error
