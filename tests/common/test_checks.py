"""Checks of arguments: the sentence, and the parameter that a command names the flag of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import rasa_theory as rt
from rasa_theory.common import at_least, fraction, one_of, positive, real_number, whole_number


@pytest.mark.parametrize(
    ("check", "sentence"),
    [
        (lambda: whole_number("n", 2.0), "n must be a whole number, got 2.0"),
        (lambda: whole_number("n", True), "n must be a whole number, got True"),
        (lambda: at_least("n", "3", 1), "n must be a whole number, got '3'"),
        (lambda: at_least("n", 0, 1), "n must be at least 1, got 0"),
        (lambda: real_number("n", "x"), "n must be a number, got 'x'"),
        (lambda: real_number("n", False), "n must be a number, got False"),
        (lambda: positive("n", 0), "n must be positive, got 0"),
        (lambda: positive("n", float("nan")), "n must be positive, got nan"),
        (lambda: fraction("n", 1.0), "n must be at least 0 and below 1, got 1.0"),
        (lambda: fraction("n", float("nan")), "n must be at least 0 and below 1, got nan"),
        (lambda: one_of("n", "x", ("y", "z")), "unknown n 'x'; known: y, z"),
    ],
)
def test_a_check_says_what_it_wants_and_names_the_parameter(check: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(rt.InputError) as raised:
        check()
    assert str(raised.value) == sentence
    assert raised.value.parameter == "n"


def test_what_passes_is_returned() -> None:
    assert [real_number("n", value) for value in (10**400, -(10**400))] == [math.inf, -math.inf]
    assert [type(real_number("n", value)) for value in (np.int64(4), np.float32(4), 4)] == 3 * [float]
    assert (whole_number("n", 3), at_least("n", 0, 0), real_number("n", 1), positive("n", 0.5)) == (3, 0, 1, 0.5)
    assert (fraction("n", 0), one_of("n", "y", ("y",))) == (0, None)


@pytest.mark.parametrize(
    ("make", "parameter"),
    [
        (lambda: rt.RankBudget(0, 0), "rank"),
        (lambda: rt.RankBudget(2, 3), "shared_rank"),
        (lambda: rt.SolverOptions(max_sweeps=0), "max_sweeps"),
        (lambda: rt.SolverOptions(rtol=1), "rtol"),
        (lambda: rt.SolverOptions(max_cancellation=0.5), "max_cancellation"),
        (lambda: rt.FloorOptions(width=0), "width"),
        (lambda: rt.study([], seeds=-1), "seeds"),
    ],
)
def test_settings_name_the_parameter_at_fault(make: Callable[[], Any], parameter: str) -> None:
    with pytest.raises(rt.InputError) as raised:
        make()
    assert raised.value.parameter == parameter
