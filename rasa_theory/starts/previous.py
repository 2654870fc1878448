"""A solution for one k as a start for a larger one."""

from __future__ import annotations

import torch

from rasa_theory import linalg
from rasa_theory.factors import RasaFactors
from rasa_theory.problem import RankBudget


def move_to_pool(factors: RasaFactors, budget: RankBudget) -> RasaFactors:
    """Nesting: the same updates with the smallest private terms of every layer moved into the pool.

    From RaSA(r, k) to RaSA(r, k') with k' >= k. D_i is 1 on the layer's own new terms and 0 on those of the others.
    """
    q = budget.private_rank
    T, At = linalg.orthonormal_rows(factors.private_A)
    U, S, Vh = linalg.svd(factors.private_B @ T)  # (L, b, q_old) times orthonormal rows: terms in order of size
    B, A = U * S[:, None], Vh @ At
    L, b, given = B[:, :, q:].shape
    own = torch.kron(torch.eye(L, dtype=B.dtype, device=B.device), B.new_ones(1, given))
    return RasaFactors(
        private_B=B[:, :, :q],
        private_A=A[:, :q],
        shared_B=torch.cat([factors.shared_B, B[:, :, q:].permute(1, 0, 2).reshape(b, L * given)], 1),
        shared_A=torch.cat([factors.shared_A, A[:, q:].reshape(L * given, A.shape[2])]),
        mixing=torch.cat([factors.mixing, own], 1),
    )
