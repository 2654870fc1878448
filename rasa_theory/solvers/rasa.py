"""solve_rasa: the best found upper bound on e_rasa(k), from one start or from a race of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from rasa_theory.bounds import allocation_bound
from rasa_theory.common import InputError, at_least, fraction, one_of
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors, squared_errors
from rasa_theory.solvers.accuracy import cancellation
from rasa_theory.solvers.descent import SWEEPS, Callback, Descent, StopReason
from rasa_theory.solvers.exchange import Exchanges
from rasa_theory.solvers.starts import PROMISES, STARTS, allocation_start
from rasa_theory.solvers.starts.previous import move_to_pool

_RACE = ("common", "pencil", "allocation", "lora", "random", "random")
_SEEDS = 2**62  # torch takes less than 2^63, and the race and the attempts count on from the seed
_HEATS = {"core": (2, 6), "joint": (12, 48), "paper": (12, 48)}  # sweeps after which the race drops starts
_CLOSE = 0.01
_TRIALS = 6  # exchanges, at most


@dataclass(frozen=True)
class SolverOptions:
    """How to solve.

    start: "best" (the starts of `starts/` raced, two of them random, then exchanges of pool terms tried), the name of
    one start, or RasaFactors to start from. "common" and "pencil" need conditions on the stack; where they do not hold,
    "allocation" takes their place, and the solution says so. sweep: "core" (two passes over M, each with many sweeps on
    a small core), "joint" or "paper"; at most `max_sweeps` sweeps for the answer, anew after an exchange; stop when one
    sweep lowers the error by less than `rtol` of it (0: never). It also stops, with the iterate before, where a term
    exceeds `max_cancellation` times the norm of its layer: often no minimum is attained, and terms that grow and cancel
    gain ever less; at 8 the factors can be stored in half precision. Raises InputError for anything else.
    """

    start: str | RasaFactors = "best"
    sweep: str = "core"
    max_sweeps: int = 100
    rtol: float = 1e-6
    seed: int = 0
    max_cancellation: float = 8.0

    def __post_init__(self) -> None:
        if not isinstance(self.start, RasaFactors) and self.start not in ("best", *STARTS):
            found = repr(self.start) if isinstance(self.start, str) else f"of type {type(self.start).__name__}"
            raise InputError(f"unknown start {found}; known: {', '.join(('best', *STARTS))}, or RasaFactors", "start")
        one_of("sweep", self.sweep, SWEEPS)
        object.__setattr__(self, "max_sweeps", at_least("max_sweeps", self.max_sweeps, 1))
        object.__setattr__(self, "seed", at_least("seed", self.seed, 0))
        fraction("rtol", self.rtol)
        if not (isinstance(self.max_cancellation, int | float) and self.max_cancellation >= 1):
            raise InputError(f"max_cancellation must be at least 1, got {self.max_cancellation!r}", "max_cancellation")
        if self.seed >= _SEEDS:
            raise InputError(f"seed must be below 2^62, got {self.seed}", "seed")


@dataclass(frozen=True)
class RasaSolution:
    """The best point found. Its error is an upper bound on e_rasa(k), not the optimum unless a lower bound meets it.

    error: the direct residual of `factors`, squared, summed over layers, in units of the input, and `layer_errors` its
    summands; history: the error after every sweep of the start that won, history[0] at the start, or of what went on
    from it after an exchange of pool terms, history[0] behind the exchange; start: its name;
    data_passes: how often all of M was read, the race and the final residual included; cancellation: the largest norm
    of a term of a layer over ||M_i||, see `updates.cancellation`.
    """

    error: float
    layer_errors: list[float]
    factors: RasaFactors
    history: list[float]
    start: str
    sweep: str
    stop_reason: StopReason
    data_passes: int
    cancellation: float

    @property
    def sweeps(self) -> int:
        """Sweeps of the start that won."""
        return len(self.history) - 1


def solve_rasa(
    stack: LayerStack, budget: RankBudget, options: SolverOptions | None = None, callback: Callback | None = None
) -> RasaSolution:
    """Lower sum_i ||M_i - B~_i A~_i - B_S D_i A_S||_F^2 by alternating exact minimisation (He et al., 2025, Section 3).

    With starts "best" and "allocation" the error is at most `allocation_bound`, with "lora" at most e_lora, up to
    `stack.rounding` in norm. `callback` is told of every sweep. Raises InputError if r > min(b, a), or if factors given
    as a start do not fit.
    """
    options = options or SolverOptions()
    budget.check_fits(stack)
    return _race(stack, budget, options, {}, callback)


def solve_path(
    stack: LayerStack,
    rank: int,
    ks: Iterable[int],
    options: SolverOptions | None = None,
    callback: Callback | None = None,
) -> dict[int, RasaSolution]:
    """Solve for several k in rising order, so that the computed errors are nested: e_rasa(k+1) <= e_rasa(k).

    Each k races the starts of `options` against the solution of the k before, one private term or more of every layer
    moved into the pool (start "previous k"). Returns k -> solution, in rising order. Raises InputError for a bad k.
    """
    return dict(iterate_path(stack, rank, ks, options, callback))


def iterate_path(
    stack: LayerStack,
    rank: int,
    ks: Iterable[int],
    options: SolverOptions | None = None,
    callback: Callback | None = None,
) -> Iterator[tuple[int, RasaSolution]]:
    """The same as `solve_path`, (k, solution) as each is finished."""
    options = options or SolverOptions()
    budgets = [RankBudget(rank, k) for k in sorted(set(ks))]
    warm: dict[str, RasaFactors] = {}
    for budget in budgets:
        budget.check_fits(stack)
        moved = {name: move_to_pool(factors, budget) for name, factors in warm.items()}
        solution = _race(stack, budget, options, moved, callback)
        yield budget.shared_rank, solution
        warm = {"previous k": solution.factors}


def _race(
    stack: LayerStack,
    budget: RankBudget,
    options: SolverOptions,
    warm: dict[str, RasaFactors],
    callback: Callback | None,
) -> RasaSolution:
    """Run all starts for a few sweeps each, go on with the best of them, and return the lowest point seen by any.

    A start whose error reaches rounding level ends the race: nothing can be lower.
    """
    passes, unit = stack.data_passes, stack.unit()
    racing, (first, second) = options.start == "best" or bool(warm), _HEATS[options.sweep]

    def go_on(run: Descent, sweeps: int) -> Descent:
        return run.run(min(run.sweeps + sweeps, options.max_sweeps), options.rtol, callback, stack.scale)

    runs: list[Descent] = []
    for run in _starting_points(stack, unit, budget, options, warm):
        runs.append(go_on(run, first if racing else options.max_sweeps))
        if run.solved:
            break
    alive = [run for run in runs if run.solved] or runs
    if len(alive) > 1:
        alive = _ahead([go_on(run, second - first) for run in _ahead(alive, 2)], 1)
    worth_it = budget.shared_rank > 0 and options.max_sweeps >= 2 * second and not alive[0].solved
    if options.start == "best" and worth_it:
        exchanges = Exchanges(unit, budget, options.seed)
        alive = [_with_exchanges(run, exchanges, options, lambda run: go_on(run, second)) for run in alive]
    for run in alive:
        go_on(run, options.max_sweeps)
    best = min((*runs, *alive), key=lambda run: run.best_error)
    factors = best.best.scaled(stack.scale)
    errors = squared_errors(stack, factors)
    return RasaSolution(
        error=math.fsum(errors),
        layer_errors=errors,
        factors=factors,
        history=[e * stack.scale**2 for e in best.history],
        start=best.start,
        sweep=options.sweep,
        stop_reason=best.stop_reason or StopReason.SWEEP_LIMIT,
        data_passes=stack.data_passes - passes,
        cancellation=cancellation(stack, factors),
    )


def _ahead(runs: list[Descent], count: int) -> list[Descent]:
    """The `count` lowest, and allocation's unless another is more than 1 % lower.

    Random starts are ahead at times after a few sweeps, and hardly ever at the end.
    """
    ranked = sorted(runs, key=lambda run: run.best_error)
    lowest = ranked[0].best_error
    return [
        run
        for n, run in enumerate(ranked)
        if n < count or (run.start == "allocation" and lowest > (1 - _CLOSE) * run.best_error)
    ]


def _with_exchanges(
    run: Descent, exchanges: Exchanges, options: SolverOptions, go_on: Callable[[Descent], Descent]
) -> Descent:
    """Try exchanges as long as sweeps from there end lower than as many sweeps without; the run that is lowest."""
    for _ in range(_TRIALS):
        factors = None if run.solved else exchanges.exchanged(run.best)
        if factors is None:
            break
        other = go_on(Descent(run.unit, factors, options.sweep, run.start, options.max_cancellation))
        if other.best_error >= go_on(run).best_error:
            break
        run = other
    return run


def _starting_points(
    stack: LayerStack, unit: LayerStack, budget: RankBudget, options: SolverOptions, warm: dict[str, RasaFactors]
) -> Iterator[Descent]:
    """What is to be run, made one at a time, so that a race that is decided makes no more of them."""
    if isinstance(options.start, RasaFactors):
        given = _fitting(options.start, stack, budget).scaled(1 / stack.scale)
        yield Descent(unit, given, options.sweep, "given", options.max_cancellation)
    elif options.start == "best":
        yield from _racers(unit, budget, options)
    else:
        name, factors = options.start, STARTS[options.start](unit, budget, options.seed)
        if factors is None:
            name, factors = "allocation", allocation_start(unit, budget)
        yield Descent(unit, factors, options.sweep, name, options.max_cancellation)
    for name, factors in warm.items():
        yield Descent(unit, factors.scaled(1 / stack.scale), options.sweep, name, options.max_cancellation)


def _racers(unit: LayerStack, budget: RankBudget, options: SolverOptions) -> Iterator[Descent]:
    """The starts of the race; those with conditions only where they promise something and begin below e_alloc(k)."""
    e_alloc = allocation_bound(unit, budget).value
    for n, name in enumerate(_RACE):
        if name in PROMISES and not PROMISES[name](unit, budget):
            continue
        seed = options.seed if _RACE[:n].count(name) == 0 else options.seed + 1_000_003
        factors = STARTS[name](unit, budget, seed)
        if factors is not None:
            run = Descent(unit, factors, options.sweep, name, options.max_cancellation)
            if name not in PROMISES or run.best_error < e_alloc:
                yield run


def _fitting(factors: RasaFactors, stack: LayerStack, budget: RankBudget) -> RasaFactors:
    (b, a), q, R = stack.shape, budget.private_rank, budget.pool_rank(stack.layers)
    if factors.sharding.alone and factors.layers == stack.layers:
        factors = factors.sharded(stack.sharding)
    wanted = {"private_B": (stack.sharding.local_layers, b, q), "shared_A": (R, a)}
    for name, shape in wanted.items():
        found = tuple(factors.named()[name].shape)
        if found != shape:
            raise InputError(f"the start's {name} has shape {found}, stack {stack.name!r} and budget need {shape}")
    return factors.to(stack.dtype, stack.device)
