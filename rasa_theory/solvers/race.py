"""The race of starts, and exchanges of pool terms from the points that it ends at. All in units of the stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rasa_theory.bounds import allocation_bound
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors
from rasa_theory.solvers.exchange import Exchanges
from rasa_theory.solvers.options import SolverOptions
from rasa_theory.solvers.rasa_descent import Callback, RasaDescent
from rasa_theory.solvers.starts import STARTS, Start, allocation_start
from rasa_theory.solvers.sweeps import SWEEPS

_CLOSE = 0.01  # allocation stays in the race unless another start is lower by more than this share
_EXCHANGES = 6  # at most
_NEXT_SEED = 1_000_003  # between the seeds of a start's entries; large, so that neighbouring seeds race other starts


class Race:
    """The runs of `solve_rasa` on one stack and budget.

    `previous` is a solution for a smaller k with its terms moved to the pool. It takes part in every race, whatever the
    start of the options is.
    """

    # No one can tell in advance which start leads to the lowest minimum, and running all to their end would cost six
    # times as much. `heats` of the sweep are two total numbers of sweeps, n1 < n2. The plan is:
    #
    # 1. All starts that are worth racing do n1 sweeps, those with conditions first. One whose error reaches rounding
    #    level ends the race, since nothing can be lower.
    # 2. The two lowest go on to n2 sweeps in all, and then only the lowest stays. Random starts are ahead at times
    #    after a few sweeps and hardly ever at the end. So both selections also keep allocation, unless it is more than
    #    1 % behind.
    # 3. Sweeps converge to the nearest local minimum. From "best", exchanges of pool terms try to escape it. An
    #    exchange is kept if n2 sweeps from it end lower than n2 more sweeps without it. There are none where the sweep
    #    limit leaves no room for that, or k = 0.
    # 4. The remaining runs sweep to their end, and the lowest point of all runs is the result.
    #
    # n1 and n2 belong to the sweep, since a core sweep does the work of many others. They, the 1 % and the six
    # exchanges were chosen by trial.

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
        self._previous = previous
        self._first, self._second = SWEEPS[options.sweep].heats

    def run(self) -> RasaDescent:
        """Run the race. Returns the run that reaches the lowest error."""
        is_race = self._options.start == "best" or self._previous is not None
        runs = self._first_heat(self._first if is_race else self._options.max_sweeps)
        finalists = self._second_heat(runs)
        if self._has_exchanges(finalists):
            exchanges = Exchanges(self._unit, self._budget, self._options.seed)
            finalists = [with_exchanges(run, exchanges.exchanged, self._restarted, self._heat) for run in finalists]
        for run in finalists:
            self._extended(run, self._options.max_sweeps)
        return min((*runs, *finalists), key=lambda run: run.best_error)

    def _first_heat(self, sweeps: int) -> list[RasaDescent]:
        """The runs of all starts, made one at a time: after a solved one the others cost nothing."""
        runs = []
        for run in self._starting_runs():
            runs.append(self._extended(run, sweeps))
            if run.solved:
                break
        return runs

    def _second_heat(self, runs: list[RasaDescent]) -> list[RasaDescent]:
        """The runs that go on: the solved one, or the best by the second heat."""
        contenders = [run for run in runs if run.solved] or runs
        if len(contenders) == 1:
            return contenders
        semifinalists = ahead(contenders, 2)
        for run in semifinalists:
            self._extended(run, self._second - self._first)
        return ahead(semifinalists, 1)

    def _has_exchanges(self, finalists: list[RasaDescent]) -> bool:
        options = self._options
        is_long_enough = options.max_sweeps >= 2 * self._second
        return options.start == "best" and self._budget.shared_rank > 0 and is_long_enough and not finalists[0].solved

    def _extended(self, run: RasaDescent, sweeps: int) -> RasaDescent:
        options = self._options
        return run.run(min(run.sweeps + sweeps, options.max_sweeps), options.rtol, self._callback)

    def _heat(self, run: RasaDescent) -> RasaDescent:
        return self._extended(run, self._second)

    def _started(self, factors: RasaFactors, name: str) -> RasaDescent:
        return RasaDescent(self._unit, factors, self._options.sweep, name, self._options.max_cancellation)

    def _restarted(self, run: RasaDescent, factors: RasaFactors) -> RasaDescent:
        return self._started(factors, run.start)

    # ---- starts

    def _starting_runs(self) -> Iterator[RasaDescent]:
        start = self._options.start
        if isinstance(start, RasaFactors):
            yield self._started(start, "given")
        elif start == "best":
            yield from self._racers()
        else:
            yield self._named(STARTS[start])
        if self._previous is not None:
            yield self._started(self._previous, "previous k")

    def _named(self, start: Start) -> RasaDescent:
        """The run of one start, or of allocation where its conditions do not hold."""
        factors = start.make(self._unit, self._budget, self._options.seed)
        if factors is None:
            return self._started(allocation_start(self._unit, self._budget), "allocation")
        return self._started(factors, start.name)

    def _racers(self) -> Iterator[RasaDescent]:
        """The runs of all starts; those with conditions go first, if `is_worth_racing` and they begin below e_alloc."""
        e_alloc = allocation_bound(self._unit, self._budget).value
        for start in sorted(STARTS.values(), key=lambda start: start.is_worth_racing is None):
            if start.is_worth_racing is not None and not start.is_worth_racing(self._unit, self._budget):
                continue
            for entry in range(start.entries):
                factors = start.make(self._unit, self._budget, self._options.seed + entry * _NEXT_SEED)
                if factors is None:
                    continue
                run = self._started(factors, start.name)
                if start.is_worth_racing is None or run.best_error < e_alloc:
                    yield run


def ahead(runs: list[RasaDescent], count: int) -> list[RasaDescent]:
    """The `count` lowest runs, lowest first, and that of allocation unless another is lower by more than 1 %."""
    ranked = sorted(runs, key=lambda run: run.best_error)
    lowest = ranked[0].best_error
    return [
        run
        for n, run in enumerate(ranked)
        if n < count or (run.start == "allocation" and lowest > (1 - _CLOSE) * run.best_error)
    ]


def with_exchanges(
    run: RasaDescent,
    exchanged: Callable[[RasaFactors], RasaFactors | None],
    restarted: Callable[[RasaDescent, RasaFactors], RasaDescent],
    heat: Callable[[RasaDescent], RasaDescent],
) -> RasaDescent:
    """Try up to six exchanges. After each, sweep both runs for one heat; keep the exchange if it is lower, else stop.

    `exchanged` offers other factors or None, `restarted` makes a run from them, and `heat` sweeps a run for a while.
    """
    for _ in range(_EXCHANGES):
        factors = None if run.solved else exchanged(run.best)
        if factors is None:
            break
        other = heat(restarted(run, factors))
        heat(run)
        if other.best_error >= run.best_error:
            break
        run = other
    return run
