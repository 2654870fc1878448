"""RaSA: k of every layer's r ranks in a pool that all layers share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rasa_theory.bounds import lower_bound
from rasa_theory.methods.fit import Evidence, Fit, Settings, UnitFit, measured
from rasa_theory.methods.method import EFFORT, Method, largest
from rasa_theory.problem import LayerStack, RankBudget, lora_parameters
from rasa_theory.solvers import SolverOptions, solve_rasa


def fit_rasa(stack: LayerStack, rank: int, shared_rank: int, seed: int = 0) -> Fit:
    """Minimise sum_i ||M_i - B~_i A~_i - B_S D_i A_S||_F^2 with diagonal D_i, by `solve_rasa`. He et al., ICLR 2025.

    With q = r - k and R = L k, stored are B~_i (b, q), A~_i (q, a), B_S (b, R), A_S (R, a) and the R entries of every
    D_i, so L r (a + b) + L R parameters.

    Arguments:
        stack: the layers M_i, (L, b, a).
        rank: r, from 1 to min(b, a).
        shared_rank: k, from 0 to r.
        seed: seed of the random starts.

    Returns:
        A `Fit` with the best solution of a quick search, and the closed certified floor.

    Raises:
        InputError: a rank is out of its range.
    """
    budget, unit = RankBudget(rank, shared_rank), stack.unit()
    factors = solve_rasa(unit, budget, SolverOptions(effort=EFFORT, seed=seed)).factors.to(torch.float64)
    solution = UnitFit(
        factors.update,
        tuple(factors.named().values()),
        factors.update_rank,
        floor=lower_bound(unit, budget).value,
    )
    settings = {"rank": rank, "shared_rank": shared_rank}
    return measured(stack, "rasa", settings, Evidence.BEST_FOUND_WITH_FLOOR, solution)


def _parameters(layers: int, shape: tuple[int, int], rank: int, shared_rank: int) -> int:
    return lora_parameters(layers, shape, rank) + layers * layers * shared_rank


def _configurations(stack: LayerStack, limit: int) -> list[Settings]:
    """The largest r with k = 1, and the largest r with half of the ranks shared."""

    def rank_within(shared_rank: Callable[[int], int]) -> int:
        return largest(lambda r: _parameters(stack.layers, stack.shape, r, shared_rank(r)), limit, min(stack.shape))

    configurations: list[Settings] = []
    for shared_rank in (_one, _half):
        rank = rank_within(shared_rank)
        settings = {"rank": rank, "shared_rank": shared_rank(rank)}
        if rank and settings not in configurations:
            configurations.append(settings)
    return configurations


def _one(rank: int) -> int:
    return 1


def _half(rank: int) -> int:
    return max(1, rank // 2)


RASA = Method("rasa", "RaSA", fit_rasa, _parameters, _configurations)
