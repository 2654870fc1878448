"""The start in which every pool term serves the one layer that needs it most."""

from __future__ import annotations

import torch

from rasa_theory.bounds import allocate_pool, terms_within_reach
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors
from rasa_theory.solvers.starts.start import Start


def allocation_start(stack: LayerStack, budget: RankBudget, seed: int = 0) -> RasaFactors:
    """Factors whose error is `allocation_bound`: q leading singular terms private, the R next largest in the pool.

    Every pool term serves the one layer that it comes from. `seed` is not used.
    """
    U, S, Vh = terms_within_reach(stack, budget)
    (b, a), sharding = stack.shape, stack.sharding
    q, R = budget.private_rank, budget.pool_rank(stack.layers)
    layer, index = allocate_pool(stack.sharding.all_gather(S), budget)
    is_local = (layer >= sharding.first) & (layer < sharding.first + sharding.local_layers)
    terms = torch.nonzero(is_local)[:, 0]
    layer, index = layer[terms] - sharding.first, index[terms]
    mixing = S.new_zeros(sharding.local_layers, R)
    mixing[layer, terms] = S[layer, index]
    B_S, A_S = S.new_zeros(b, R), S.new_zeros(R, a)
    B_S[:, terms], A_S[terms] = U[layer, :, index].mT, Vh[layer, index]
    B_S, A_S = sharding.all_reduce_together(B_S, A_S)  # each term comes from the process that holds its layer
    return RasaFactors(
        private_B=U[:, :, :q] * S[:, None, :q],
        private_A=Vh[:, :q],
        shared_B=B_S,
        shared_A=A_S,
        mixing=mixing,
        sharding=sharding,
    ).to(stack.dtype, stack.device)


ALLOCATION = Start("allocation", allocation_start, is_at_most_lora=True)
