"""The rules of the race of starts, on runs that are numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from rasa_theory.solvers import StopReason, ahead, with_exchanges


@dataclass
class Run:
    start: str
    best_error: float
    best: Any = None
    solved: bool = False
    stop_reason: StopReason | None = None


@pytest.mark.parametrize(("lowest", "left"), [(0.995, ["random", "allocation"]), (0.985, ["random"])])
def test_allocation_stays_unless_another_start_is_lower_by_more_than_one_percent(
    lowest: float, left: list[str]
) -> None:
    runs: Any = [Run("allocation", 1.0), Run("lora", 0.999), Run("random", lowest)]
    assert [run.start for run in ahead(runs, 1)] == left


def test_a_run_that_has_converged_is_offered_exchanges() -> None:
    run: Any = Run("lora", 1.0, stop_reason=StopReason.CONVERGED)
    other: Any = Run("lora", 0.5)
    offered: Any = iter([object(), None])
    assert with_exchanges(run, lambda _: next(offered), lambda *_: other, lambda one: one) is other
