"""A solution for one k as a start for a larger one."""

from __future__ import annotations

import torch

from rasa_theory.linalg import batched, orthogonal
from rasa_theory.problem import RankBudget, RasaFactors


def move_to_pool(factors: RasaFactors, budget: RankBudget) -> RasaFactors:
    """Nesting: the same updates with the smallest private terms of every layer moved into the pool.

    From RaSA(r, k) to RaSA(r, k') with k' >= k. D_i is 1 on the layer's own new terms and 0 on those of the others.
    """
    q = budget.private_rank
    B, A = orthogonal.truncated_product(
        factors.private_B, factors.private_A, factors.private_A.shape[1]
    )  # terms in order of size
    L, given, sharding = factors.layers, B.shape[2] - q, factors.sharding
    new_B, new_A = sharding.all_gather(B[:, :, q:]), sharding.all_gather(A[:, q:])
    own = torch.kron(torch.eye(L, dtype=B.dtype, device=B.device), B.new_ones(1, given))[sharding.local]
    return RasaFactors(
        private_B=B[:, :, :q],
        private_A=A[:, :q],
        shared_B=torch.cat([factors.shared_B, batched.beside(new_B)], 1),
        shared_A=torch.cat([factors.shared_A, new_A.reshape(L * given, A.shape[2])]),
        mixing=torch.cat([factors.mixing, own], 1),
        sharding=sharding,
    )
