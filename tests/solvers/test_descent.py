"""The one loop and its wrappers, on a sweep whose answers are known: x -> x / 2, with the error x^2."""

import math
from itertools import pairwise

import pytest

from rasa_theory.solvers import (
    BestSoFar,
    Descent,
    Extrapolated,
    Guarded,
    Memoryless,
    StopReason,
    decreases_less,
)

NEVER = decreases_less(0.0, 0.0)


def halved(x):
    return x / 2, (x / 2) ** 2


def in_turn(*errors):
    """A sweep x -> x + 1 that ends at these errors, one after the other; an exception is raised."""
    remaining = iter(errors)

    def step(x):
        error = next(remaining)
        if isinstance(error, Exception):
            raise error
        return x + 1, error

    return step


def test_the_history_holds_every_error_and_a_descent_can_be_continued():
    whole, parts = (Descent(Memoryless(halved), 1.0, 1.0) for _ in range(2))
    whole.advance(5, NEVER)
    parts.advance(2, NEVER).advance(5, NEVER)
    assert whole.history == parts.history == [4.0**-n for n in range(6)]
    assert whole.point == parts.point == 1 / 32
    assert (whole.sweeps, whole.stop_reason) == (5, None)


def test_it_ends_where_a_sweep_gains_too_little_or_the_error_is_rounding():
    run = Descent(Memoryless(in_turn(0.5, 0.4, 0.399, 0.1)), 0, 1.0).advance(10, decreases_less(0.01, 0.0))
    assert (run.history, run.stop_reason) == ([1.0, 0.5, 0.4, 0.399], StopReason.CONVERGED)
    run = Descent(Memoryless(halved), 1.0, 1.0).advance(100, decreases_less(1e-6, 0.1))
    assert (run.sweeps, run.stop_reason) == (4, StopReason.CONVERGED)  # the error is 1/16 squared


def test_it_reports_after_every_sweep_also_after_a_rejected_one():
    seen = []
    run = Descent(Memoryless(in_turn(0.5, math.nan)), 0, 1.0)
    run.advance(10, NEVER, lambda: seen.append((run.sweeps, run.stop_reason)))
    assert seen == [(1, None), (1, StopReason.NON_FINITE)]


@pytest.mark.parametrize("failure", [math.nan, math.inf, ZeroDivisionError()])
def test_a_failed_sweep_is_rejected(failure):
    run = Descent(Guarded(Memoryless(in_turn(0.5, failure)), lambda x: False), 0, 1.0).advance(10, NEVER)
    assert (run.point, run.history, run.stop_reason) == (1, [1.0, 0.5], StopReason.NON_FINITE)


def test_a_degenerate_point_is_rejected_even_if_its_error_is_lower():
    sweep = BestSoFar(Guarded(Memoryless(in_turn(0.5, 0.4, 0.3)), lambda x: x > 2))
    run = Descent(sweep, 0, 1.0).advance(10, NEVER)
    assert (run.point, run.history, run.stop_reason) == (2, [1.0, 0.5, 0.4], StopReason.DEGENERATE)


def test_the_best_point_is_kept_where_the_error_rises():
    last, best = (wrap(Memoryless(in_turn(0.5, 0.7, 0.5, 0.6))) for wrap in (lambda sweep: sweep, BestSoFar))
    assert Descent(last, 0, 1.0).advance(4, NEVER).point == 4
    assert Descent(best, 0, 1.0).advance(4, NEVER).point == 1


def test_extrapolation_goes_further_along_the_last_change_and_never_raises_the_error():
    plain, fast = (Descent(sweep, 1.0, 1.0) for sweep in (Memoryless(slowed), Extrapolated(slowed, beyond)))
    plain.advance(30, NEVER)
    fast.advance(30, NEVER)
    assert fast.history[:2] == plain.history[:2]  # the first sweep has no change to go along
    assert all(after <= before for before, after in pairwise(fast.history))
    assert fast.history[-1] < 1e-3 * plain.history[-1]


def test_a_sweep_from_beyond_that_is_no_lower_is_repeated_from_the_point():
    """All points beyond are useless: the errors are those of the plain sweeps."""
    plain, stuck = (
        Descent(sweep, 1.0, 1.0) for sweep in (Memoryless(halved), Extrapolated(halved, lambda x, before, s: 100.0))
    )
    assert stuck.advance(10, NEVER).history == plain.advance(10, NEVER).history


def slowed(x):
    return 0.9 * x, (0.9 * x) ** 2


def beyond(x, before, stride):
    return x + stride * (x - before)
