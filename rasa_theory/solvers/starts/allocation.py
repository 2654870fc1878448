"""The pool handed to the layers that need it most."""

from __future__ import annotations

import torch

from rasa_theory.bounds import allocate_pool
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors


def allocation_start(stack: LayerStack, budget: RankBudget, seed: int = 0) -> RasaFactors:
    """Factors whose error is `allocation_bound`: q leading singular terms private, the R next largest in the pool.

    Every pool term serves the one layer that it comes from. `seed` is not used.
    """
    U, S, Vh = stack.spectra.svd()
    q, sharding = budget.private_rank, stack.sharding
    layer, index = allocate_pool(stack.spectra.singular_values(), budget)
    terms = torch.nonzero((layer >= sharding.first) & (layer < sharding.first + sharding.local_layers))[
        :, 0
    ]  # of the layers held
    layer, index = layer[terms] - sharding.first, index[terms]
    (b, a), R = stack.shape, budget.pool_rank(stack.layers)
    mixing, B_S, A_S = S.new_zeros(sharding.local_layers, R), S.new_zeros(b, R), S.new_zeros(R, a)
    mixing[layer, terms], B_S[:, terms], A_S[terms] = S[layer, index], U[layer, :, index].mT, Vh[layer, index]
    B_S, A_S = sharding.all_reduce_together(B_S, A_S)  # every term is that of one layer
    return RasaFactors(
        private_B=U[:, :, :q] * S[:, None, :q],
        private_A=Vh[:, :q],
        shared_B=B_S,
        shared_A=A_S,
        mixing=mixing,
        sharding=sharding,
    ).to(stack.dtype, stack.device)
