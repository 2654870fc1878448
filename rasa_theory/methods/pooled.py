"""RaSA: k of every layer's r ranks in a pool that all layers share."""

from __future__ import annotations

import torch

from rasa_theory.bounds import lower_bound
from rasa_theory.methods.fit import Evidence, Fit, Found, Method, fitted
from rasa_theory.methods.settings import Settings, largest
from rasa_theory.problem import LayerStack, RankBudget, lora_parameters
from rasa_theory.solvers import SolverOptions, solve_rasa


def fit_rasa(stack: LayerStack, rank: int, shared_rank: int, seed: int = 0) -> Fit:
    """min sum_i ||M_i - B~_i A~_i - B_S D_i A_S||_F^2, D_i diagonal (He et al., ICLR 2025): `solve_rasa`.

    B~_i (b, q), A~_i (q, a), B_S (b, R), A_S (R, a), D_i R numbers, q = r - k, R = L k: L r (a + b) + L R parameters.
    Best found, with the closed certified floor. Raises InputError unless 1 <= rank <= min(b, a) and
    0 <= shared_rank <= rank.
    """
    budget, unit = RankBudget(rank, shared_rank), stack.unit()
    factors = solve_rasa(unit, budget, SolverOptions(seed=seed)).factors.to(torch.float64)
    found = Found(
        factors.update,
        tuple(factors.named().values()),
        factors.update_rank,
        floor=lower_bound(unit, budget).value,
    )
    settings = {"rank": rank, "shared_rank": shared_rank}
    return fitted(stack, "rasa", settings, Evidence.BEST_FOUND_WITH_FLOOR, found)


def _configurations(stack: LayerStack, parameters: int) -> list[Settings]:
    """k = 1, and half of the ranks shared."""
    L, most = stack.layers, min(stack.shape)

    def count(r: int, k: int) -> int:
        return lora_parameters(L, stack.shape, r) + L * L * k

    found: list[Settings] = []
    for halves in (False, True):
        rank = largest(lambda r: count(r, max(1, r // 2) if halves else 1), parameters, most)  # noqa: B023
        settings = {"rank": rank, "shared_rank": max(1, rank // 2) if halves else 1}
        if rank and settings not in found:
            found.append(settings)
    return found


RASA = Method(fit_rasa, _configurations)
