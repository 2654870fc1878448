"""The race of `solve_rasa`: searches on small cores, and descents on the stack from what they find.

All in units of the stack's scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from rasa_theory.bounds import allocation_bound
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors
from rasa_theory.solvers.accuracy import cancellation
from rasa_theory.solvers.options import SolverOptions
from rasa_theory.solvers.rasa_descent import Callback, Progress, RasaDescent
from rasa_theory.solvers.search import EFFORTS, Candidate, Effort, PoolSearch, SearchSummary
from rasa_theory.solvers.starts import STARTS, Start, allocation_start
from rasa_theory.solvers.sweeps import SWEEPS

_FINALISTS = 3  # candidates of the search that descend on the stack


class Race:
    """The runs of `solve_rasa` on one stack and budget.

    `previous` is a solution for a smaller k with its terms moved to the pool. It takes part in every race, whatever the
    start of the options is. `summary` is that of the search, None before `run` and where there is none.
    """

    # No one can tell in advance which start leads to the lowest minimum, and running all to their end on the stack
    # would cost far too much. `heats` of the sweep are two total numbers of sweeps, n1 < n2. The plan for "best" is:
    #
    # 1. Starts with conditions, which are exact where they hold, do n1 sweeps. One whose error reaches rounding level
    #    ends the race, since nothing can be lower.
    # 2. `PoolSearch` looks for pools on a core of the stack at the allocation start. The core is small, so that
    #    many starts cost about as much as one descent on the stack.
    # 3. Its three lowest results, the runs of step 1, and the allocation start do n1 sweeps on the stack, and the two
    #    lowest n2. The allocation start is there for the promise of an error of at most e_alloc. Where the core is all
    #    of M, the search has swept on M itself. Only its lowest result goes on, beside the runs of step 1, and the
    #    allocation start if that is lower.
    # 4. A core at the allocation start lacks directions that descents on the stack have found since. So moves are tried
    #    again on the core at the lowest run, up to a few times, as long as n2 sweeps from there end lower.
    # 5. The lowest run sweeps to its end.
    #
    # The constants were chosen by trial.

    def __init__(
        self,
        unit: LayerStack,
        budget: RankBudget,
        options: SolverOptions,
        callback: Callback | None = None,
        previous: RasaFactors | None = None,
    ) -> None:
        self._unit = unit
        self._budget = budget
        self._options = options
        self._callback = callback
        self._previous = () if previous is None else (Candidate("previous k", previous),)
        self._effort = EFFORTS[options.effort]
        self._first, self._second = SWEEPS[options.sweep].heats
        self.summary: SearchSummary | None = None

    def run(self) -> RasaDescent:
        """Run the race. Returns the run that reaches the lowest error."""
        runs = []
        for run in self._starting_runs():
            runs.append(self._extended(run, self._first))
            if run.solved:
                break
        for run in lowest(runs, 2):
            self._extended(run, self._second)
        best = lowest(runs, 1)[0]
        if self.summary is not None and not best.solved:
            best = self._moved(best)
        return self._extended(best, self._options.max_sweeps)

    def _moved(self, best: RasaDescent) -> RasaDescent:
        """The run after moves from it, as long as they end lower."""
        for n in range(self._effort.returns):
            search = self._search(best.best, self._effort.returning(), self._options.seed + 1 + n)
            if search.core.is_whole:
                break  # the search before has tried all that
            candidates, _ = search.around([Candidate(best.start, best.best)])
            other = self._extended(self._started(candidates[0]), self._second)
            self._extended(best, best.sweeps + self._second)
            if other.best_error >= best.best_error:
                break
            best = other
        return best

    def _search(self, factors: RasaFactors, effort: Effort, seed: int) -> PoolSearch:
        limit, watch = self._options.max_cancellation, None if self._callback is None else self._searching
        return PoolSearch(self._unit, self._budget, factors, effort, seed, limit, watch)

    def _searching(self, done: int, planned: int, error: float) -> None:
        if self._callback is not None:
            self._callback(Progress("search", done, planned, error))

    def _extended(self, run: RasaDescent, sweeps: int) -> RasaDescent:
        """The run after this many sweeps in all, or fewer if there is a reason to stop."""
        return run.run(min(sweeps, self._options.max_sweeps), self._options.rtol, self._callback)

    def _started(self, candidate: Candidate) -> RasaDescent:
        options = self._options
        return RasaDescent(self._unit, candidate.factors, options.sweep, candidate.start, options.max_cancellation)

    # ---- starts

    def _starting_runs(self) -> Iterator[RasaDescent]:
        start = self._options.start
        if isinstance(start, RasaFactors):
            yield self._started(Candidate("given", start))
        elif start == "best":
            yield from self._racers()
        else:
            yield self._started(self._named(STARTS[start]))
        for candidate in self._previous:
            yield self._started(candidate)

    def _named(self, start: Start) -> Candidate:
        """One start, or allocation where its conditions do not hold."""
        factors = start.make(self._unit, self._budget, self._options.seed)
        if factors is None:
            return Candidate("allocation", allocation_start(self._unit, self._budget))
        return Candidate(start.name, factors)

    def _racers(self) -> Iterator[RasaDescent]:
        unit, budget = self._unit, self._budget
        yield from self._exact_runs()
        allocation = self._started(self._named(STARTS["allocation"]))
        if unit.layers == 1 or budget.shared_rank == 0 or unit.norm_squared == 0:
            yield allocation  # which is the optimum
            return
        search = self._search(allocation.best, self._effort, self._options.seed)
        candidates, self.summary = search.run(self._previous)
        is_whole = search.core.is_whole
        finalists = [self._started(candidate) for candidate in candidates[: 1 if is_whole else _FINALISTS]]
        if not is_whole or allocation.best_error < min((run.best_error for run in finalists), default=math.inf):
            yield allocation
        yield from finalists

    def _exact_runs(self) -> Iterator[RasaDescent]:
        """Runs of the starts with conditions that are `is_worth_racing`, keep the bound and begin below e_alloc."""
        unit, budget, limit = self._unit, self._budget, self._options.max_cancellation
        e_alloc = allocation_bound(unit, budget).value
        for start in STARTS.values():
            if start.is_worth_racing is not None and start.is_worth_racing(unit, budget):
                factors = start.make(unit, budget, self._options.seed)
                if factors is not None and cancellation(unit, factors) <= limit:
                    run = self._started(Candidate(start.name, factors))
                    if run.best_error < e_alloc:
                        yield run


def lowest(runs: list[RasaDescent], count: int) -> list[RasaDescent]:
    """The `count` runs of lowest error, lowest first."""
    return sorted(runs, key=lambda run: run.best_error)[:count]
