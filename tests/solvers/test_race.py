"""The rules of the race, with a search whose results the test decides."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from rasa_theory import (
    LayerStack,
    RankBudget,
    RasaFactors,
    SolverOptions,
    allocation_bound,
    reconstruction_error,
    solve_path,
    solve_rasa,
)
from rasa_theory.linalg import not_above
from rasa_theory.solvers import STARTS, Candidate, Progress, SearchSummary, pencil_start, race, random_start
from tests.helpers.problems import noise, planted

SUMMARY = SearchSummary(9, 3, 5, 1)


class FakeSearch:
    """A search with the results `found`; `around` returns `moved`, one after the other."""

    found: ClassVar[list[Candidate]] = []
    moved: ClassVar[list[Candidate]] = []
    given: ClassVar[list[list[str]]] = []
    seeds: ClassVar[list[int]] = []
    is_whole = False

    def __init__(self, *arguments: Any) -> None:
        self.seeds.append(arguments[4])
        self.core = SimpleNamespace(is_whole=self.is_whole)

    def run(self, given: Any = ()) -> tuple[list[Candidate], SearchSummary]:
        self.given.append([candidate.start for candidate in given])
        return self.found, SUMMARY

    def around(self, given: Any) -> tuple[list[Candidate], SearchSummary]:
        return [self.moved.pop(0)], SUMMARY


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> type[FakeSearch]:
    class Search(FakeSearch):
        found: ClassVar[list[Candidate]] = []
        moved: ClassVar[list[Candidate]] = []
        given: ClassVar[list[list[str]]] = []
        seeds: ClassVar[list[int]] = []

    monkeypatch.setattr(race, "PoolSearch", Search)
    return Search


STACK, BUDGET = LayerStack(noise(3, 9, 8)), RankBudget(2, 1)
OPTIONS = SolverOptions(max_sweeps=2, rtol=0, sweep="joint")


def poor(seed: int) -> Candidate:
    """Factors that stay far above the allocation bound for some sweeps."""
    return Candidate("poor", random_start(STACK.unit(), BUDGET, seed, 30.0))


def good(sweeps: int = 20) -> Candidate:
    options = SolverOptions(start="lora", max_sweeps=sweeps, rtol=0)
    return Candidate("good", solve_rasa(STACK, BUDGET, options).factors.scaled(1 / STACK.scale))


def error(candidate: Candidate) -> float:
    return reconstruction_error(STACK, candidate.factors.scaled(STACK.scale))


def runs_of(told: list[Progress]) -> list[str]:
    """The starts of the runs that swept, in order of their first sweep."""
    return [p.start for p in told if p.sweep == 1]


# ---- the promise


def test_whatever_the_search_finds_the_error_is_at_most_that_of_allocation(search: type[FakeSearch]) -> None:
    search.found = [poor(seed) for seed in range(3)]
    search.moved = [poor(3)]
    e_alloc = allocation_bound(STACK, BUDGET).value
    assert min(error(candidate) for candidate in search.found) > 2 * e_alloc
    solution = solve_rasa(STACK, BUDGET, OPTIONS)
    assert solution.start == "allocation"
    assert not_above(solution.error, e_alloc, STACK.rounding)
    assert solution.search == SUMMARY


@pytest.mark.slow
def test_the_lowest_results_descend_the_two_lowest_longer_and_the_lowest_to_its_end(
    search: type[FakeSearch], monkeypatch: pytest.MonkeyPatch
) -> None:
    search.found, search.moved = [good(), poor(0), poor(1), poor(2), poor(3)], [poor(4), poor(5), poor(6)]
    told: list[Progress] = []
    first, second = race.SWEEPS["joint"].heats
    options = SolverOptions(max_sweeps=second + 3, rtol=0, sweep="joint", max_cancellation=math.inf)
    solution = solve_rasa(STACK, BUDGET, options, callback=told.append)
    moves_begin = [n for n, p in enumerate(told) if p.sweep == 1][4]
    assert runs_of(told[:moves_begin]) == ["allocation", "good", "poor", "poor"]
    counts = [sum(p.sweep == n for p in told[:moves_begin]) for n in range(1, second + 1)]
    assert counts == first * [4] + (second - first) * [2]
    assert told[-1].sweep == second + 3
    assert solution.error < error(search.found[0])


def test_after_a_search_on_all_of_the_stack_its_lowest_result_goes_on_alone(
    search: type[FakeSearch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "is_whole", True)
    search.found = [good(), poor(0)]
    told: list[Progress] = []
    assert solve_rasa(STACK, BUDGET, OPTIONS, callback=told.append).start == "good"
    assert runs_of(told) == ["good"]


def test_lowest() -> None:
    runs: Any = [SimpleNamespace(best_error=x) for x in (3.0, 1.0, 2.0)]
    assert [run.best_error for run in race.lowest(runs, 2)] == [1.0, 2.0]


# ---- the bound


@pytest.mark.slow
def test_a_start_with_conditions_that_is_beyond_the_bound_is_not_raced() -> None:
    """Two layers that nearly fail to be diagonal together: the exact factors have terms of 5,000 times their layers."""
    J = np.diag([1, 1.0001, 2, 3.0]) + np.diag([1.0, 0, 0], 1)
    stack, budget = LayerStack(np.stack([np.eye(4), J])), RankBudget(2, 2)
    bounded, free = (
        solve_rasa(stack, budget, SolverOptions(max_cancellation=c, effort="quick")) for c in (8.0, math.inf)
    )
    assert bounded.cancellation <= 8 * (1 + 1e-3)
    assert free.cancellation > 1000
    assert free.error < bounded.error


# ---- moves on the stack


def test_moves_go_on_as_long_as_they_end_lower(search: type[FakeSearch]) -> None:
    """From allocation to better points, twice; then a worse one, which is not kept, and no other is asked for."""
    search.found = [poor(0)]
    points = [good(1), good(20), poor(1), good(2)]
    assert allocation_bound(STACK, BUDGET).value > error(points[0]) > error(points[1])
    search.moved = list(points)
    solution = solve_rasa(STACK, BUDGET, SolverOptions(max_sweeps=1, rtol=0, sweep="paper"))
    assert solution.error <= error(points[1])
    assert [candidate.factors for candidate in search.moved] == [points[3].factors]
    assert search.seeds == [0, 1, 2, 3]  # of the search, and of moves from three points


def test_moves_that_end_higher_are_not_kept(search: type[FakeSearch]) -> None:
    search.found, search.moved = [good()], [poor(0), good(2)]
    solution = solve_rasa(STACK, BUDGET, OPTIONS)
    assert solution.start == "good"
    assert solution.error <= error(search.found[0])
    assert len(search.moved) == 1


@pytest.mark.slow
def test_the_run_that_moves_come_from_sweeps_on_as_long_as_their_result(search: type[FakeSearch]) -> None:
    search.found, search.moved = [good()], [poor(0)]
    told: list[Progress] = []
    second = race.SWEEPS["joint"].heats[1]
    options = SolverOptions(max_sweeps=5 * second, rtol=0, sweep="joint", max_cancellation=math.inf)
    solve_rasa(STACK, BUDGET, options, callback=told.append)
    moves_begin = [n for n, p in enumerate(told) if p.sweep == 1][-1]
    assert max(p.sweep for p in told[:moves_begin]) == second
    after = [p for p in told[moves_begin:] if p.start != "poor"]
    assert {p.start for p in after} <= {"good", "allocation"}
    assert [p.sweep for p in after[:second]] == list(range(second + 1, 2 * second + 1))
    assert after[second - 1].max_sweeps == 2 * second


def test_no_moves_on_the_stack_where_the_core_was_all_of_it(
    search: type[FakeSearch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "is_whole", True)
    search.found, search.moved = [poor(0)], [good()]
    assert solve_rasa(STACK, BUDGET, OPTIONS).start == "allocation"
    assert len(search.moved) == 1


# ---- races without a search


def test_an_exact_start_ends_the_race(search: type[FakeSearch]) -> None:
    told: list[Progress] = []
    solution = solve_rasa(LayerStack(planted(0, 6, 30, 28, 3, 1).values), RankBudget(3, 1), callback=told.append)
    assert {progress.start for progress in told} == {"common"}
    assert solution.search is None
    assert search.given == []


@pytest.mark.parametrize(
    ("values", "k"), [(noise(3, 9, 8), 0), (noise(1, 9, 8), 1), (noise(1, 9, 8), 2), (np.zeros((3, 9, 8)), 1)]
)
def test_where_allocation_is_the_optimum_nothing_is_searched(
    search: type[FakeSearch], values: np.ndarray, k: int
) -> None:
    stack = LayerStack(values)
    solution = solve_rasa(stack, RankBudget(2, k))
    assert (solution.start, solution.search, search.given) == ("allocation", None, [])
    assert not_above(solution.error, allocation_bound(stack, RankBudget(2, k)).value, stack.rounding)


@pytest.mark.parametrize("start", ["lora", "random", random_start(STACK, BUDGET, 0, 0.3)])
def test_a_start_of_the_caller_is_not_searched(search: type[FakeSearch], start: str | RasaFactors) -> None:
    told: list[Progress] = []
    solve_rasa(STACK, BUDGET, SolverOptions(start=start, max_sweeps=3), callback=told.append)
    assert runs_of(told) == [start if isinstance(start, str) else "given"]
    assert search.given == []


def test_a_start_that_begins_above_allocation_is_not_raced(search: type[FakeSearch]) -> None:
    stack, budget, told = LayerStack(noise(4, 20, 18)), RankBudget(3, 1), list[Progress]()
    pencil = STARTS["pencil"]
    assert pencil.is_worth_racing is not None
    assert pencil.is_worth_racing(stack.unit(), budget)
    factors = pencil_start(stack, budget)
    assert factors is not None
    assert reconstruction_error(stack, factors) > allocation_bound(stack, budget).value
    search.is_whole = True
    solve_rasa(stack, budget, SolverOptions(max_sweeps=3), callback=told.append)
    assert runs_of(told) == ["allocation"]


# ---- the solution for the k before


@pytest.mark.parametrize("start", ["best", "random"])
def test_the_solution_for_the_k_before_takes_part(search: type[FakeSearch], start: str) -> None:
    """In the search as well, where there is one."""
    search.is_whole = True
    told: list[Progress] = []
    options = SolverOptions(start=start, max_sweeps=1, rtol=0, sweep="joint")
    path = solve_path(STACK, 2, [0, 1, 2], options, callback=told.append)
    first = "allocation" if start == "best" else start
    assert runs_of(told) == [first, *2 * [first, "previous k"]]
    assert search.given == ([["previous k"], ["previous k"]] if start == "best" else [])
    for k in (1, 2):
        assert not_above(path[k].error, path[k - 1].error, STACK.rounding)
