"""solve_rasa and solve_path: the best upper bound on e_rasa(k) that alternating exact minimisation reaches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from rasa_theory.common import InputError
from rasa_theory.linalg import batched, orthogonal
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors, squared_errors
from rasa_theory.solvers.accuracy import cancellation
from rasa_theory.solvers.descent import StopReason
from rasa_theory.solvers.options import SolverOptions
from rasa_theory.solvers.race import Race
from rasa_theory.solvers.rasa_descent import Callback, RasaDescent, in_units
from rasa_theory.solvers.search import SearchSummary


@dataclass(frozen=True)
class RasaSolution:
    """The best point of `solve_rasa`.

    Its error is an upper bound on e_rasa(k). It is not the optimum unless a lower bound meets it.

    Attributes:
        error: the direct residual of `factors`, squared, summed over layers, in units of the input.
        layer_errors: the L summands of `error`.
        factors: the best factors, in units of the input.
        history: the squared error after every sweep of the best run on the stack. history[0] is at its start, i.e. at
            the result of the search if there was one.
        start: the name of the start of this run, before any moves. "given" stands for factors of the caller, "previous
            k" for the solution before on a path.
        sweep: the name of the sweep.
        stop_reason: the reason why the run ended.
        data_passes: number of passes over all of M, search and final residual included.
        cancellation: the largest ratio of the norm of a term to ||M_i||.
        search: the number of starts, how many came near the lowest, and the moves; None if there was no search.
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
    search: SearchSummary | None = None

    @property
    def sweeps(self) -> int:
        """The number of sweeps recorded in `history`."""
        return len(self.history) - 1


def solve_rasa(
    stack: LayerStack, budget: RankBudget, options: SolverOptions | None = None, callback: Callback | None = None
) -> RasaSolution:
    """Minimise sum_i ||M_i - B~_i A~_i - B_S D_i A_S||_F^2 locally by alternating minimisation (He et al., 2025).

    With starts "best" and "allocation" the error is at most `allocation_bound`, with "lora" at most e_lora, up to
    `stack.rounding` in norm. No start promises the minimum: the problem is not convex.

    Arguments:
        stack: the L updates M_i (b, a).
        budget: r ranks a layer, k of them shared.
        options: the start, the sweep and when to stop; the defaults if None.
        callback: called with a `Progress` after every sweep on the stack and every step of a search.

    Returns:
        The best factors, their squared error and its history.

    Raises:
        InputError: r exceeds min(b, a), or the factors of `options.start` do not fit the stack and budget.
    """
    options = options or SolverOptions()
    budget.check_fits(stack)
    stack = stack.with_spectra(options.spectra, budget)
    passes = stack.data_passes
    return _solution(stack, *_race(stack, budget, options, callback, None), options, passes)


def solve_path(
    stack: LayerStack,
    rank: int,
    ks: Iterable[int],
    options: SolverOptions | None = None,
    callback: Callback | None = None,
) -> dict[int, RasaSolution]:
    """Solve for several k in rising order, so that the computed errors are nested: e_rasa(k+1) <= e_rasa(k).

    Each k races the starts of `options` against the solution for the k before, with private terms of every layer moved
    into the pool (start "previous k").

    Arguments:
        stack: the L updates M_i (b, a).
        rank: r, the rank budget of a layer.
        ks: the shared ranks k, in any order.
        options: as for `solve_rasa`.
        callback: as for `solve_rasa`.

    Returns:
        The solution of each k, in rising order of k.

    Raises:
        InputError: r exceeds min(b, a), a k is not in 0 .. r, or the factors of `options.start` do not fit.
    """
    return dict(iterate_path(stack, rank, ks, options, callback))


def iterate_path(
    stack: LayerStack,
    rank: int,
    ks: Iterable[int],
    options: SolverOptions | None = None,
    callback: Callback | None = None,
) -> Iterator[tuple[int, RasaSolution]]:
    """Yield (k, solution) as `solve_path` finishes them."""
    options = options or SolverOptions()
    budgets = [RankBudget(rank, k) for k in sorted(set(ks))]
    stack = stack.with_spectra(options.spectra, RankBudget(rank, 0))
    best: RasaFactors | None = None
    for budget in budgets:
        budget.check_fits(stack)
        passes = stack.data_passes
        previous = None if best is None else move_to_pool(best, budget)
        run, summary = _race(stack, budget, options, callback, previous)
        yield budget.shared_rank, _solution(stack, run, summary, options, passes)
        best = run.best


def move_to_pool(factors: RasaFactors, budget: RankBudget) -> RasaFactors:
    """Nesting: the same updates with the smallest private terms of every layer moved into the pool.

    From RaSA(r, k) to RaSA(r, k') with k' >= k. D_i is 1 on the layer's own new terms and 0 on those of the others.
    """
    q = budget.private_rank
    Bt, At = factors.private_B, factors.private_A
    B, A = orthogonal.truncated_product(Bt, At, At.shape[1])  # terms in order of size
    L, moved, sharding = factors.layers, B.shape[2] - q, factors.sharding
    new_B, new_A = sharding.all_gather(B[:, :, q:]), sharding.all_gather(A[:, q:])
    own = torch.kron(torch.eye(L, dtype=B.dtype, device=B.device), B.new_ones(1, moved))[sharding.local]
    return RasaFactors(
        private_B=B[:, :, :q],
        private_A=A[:, :q],
        shared_B=torch.cat([factors.shared_B, batched.beside(new_B)], 1),
        shared_A=torch.cat([factors.shared_A, new_A.reshape(L * moved, A.shape[2])]),
        mixing=torch.cat([factors.mixing, own], 1),
        sharding=sharding,
    )


# ---- the border: units of the input outside, units of the stack's scale inside


def _race(
    stack: LayerStack,
    budget: RankBudget,
    options: SolverOptions,
    callback: Callback | None,
    previous: RasaFactors | None,
) -> tuple[RasaDescent, SearchSummary | None]:
    """The lowest run of a race, in units of the stack's scale, as `previous` is; and the summary of its search."""
    if isinstance(options.start, RasaFactors):
        start = _fitting(options.start, stack, budget).scaled(1 / stack.scale)
        options = dataclasses.replace(options, start=start)
    with stack.suitable_threads():
        race = Race(stack.unit(), budget, options, in_units(stack, callback), previous)
        return race.run(), race.summary


def _solution(
    stack: LayerStack, run: RasaDescent, summary: SearchSummary | None, options: SolverOptions, passes: int
) -> RasaSolution:
    """The lowest point of a run in units of the input; `passes` were counted before the run."""
    with stack.suitable_threads():
        factors = run.best.scaled(stack.scale)
        errors = squared_errors(stack, factors)
        largest_ratio = cancellation(run.unit, run.best)
    return RasaSolution(
        error=math.fsum(errors),
        layer_errors=errors,
        factors=factors,
        history=[error * stack.scale**2 for error in run.history],
        start=run.start,
        sweep=options.sweep,
        stop_reason=run.stop_reason or StopReason.SWEEP_LIMIT,
        data_passes=stack.data_passes - passes,
        cancellation=largest_ratio,
        search=summary,
    )


def _fitting(factors: RasaFactors, stack: LayerStack, budget: RankBudget) -> RasaFactors:
    (b, a), q, R = stack.shape, budget.private_rank, budget.pool_rank(stack.layers)
    if factors.sharding.alone and factors.layers == stack.layers:
        factors = factors.sharded(stack.sharding)
    expected = {"private_B": (stack.sharding.local_layers, b, q), "shared_A": (R, a)}
    for name, shape in expected.items():
        actual = tuple(factors.named()[name].shape)
        if actual != shape:
            raise InputError(f"the start's {name} has shape {actual}, stack {stack.name!r} and budget need {shape}")
    return factors.to(stack.dtype, stack.device)
