"""The pool handed to the layers that need it most."""

from __future__ import annotations

import torch

from rasa_theory.bounds import allocate
from rasa_theory.factors import RasaFactors
from rasa_theory.problem import LayerStack, RankBudget


def allocation_start(stack: LayerStack, budget: RankBudget, seed: int = 0) -> RasaFactors:
    """Factors whose error is `allocation_bound`: q leading singular terms private, the R next largest in the pool.

    Every pool term serves the one layer that it comes from. `seed` is not used.
    """
    U, S, Vh = stack.svd()
    q = budget.private_rank
    layer, index = allocate(S, budget)
    mixing = torch.zeros(stack.layers, len(layer), dtype=S.dtype, device=S.device)
    mixing[layer, torch.arange(len(layer), device=S.device)] = S[layer, index]
    return RasaFactors(
        private_B=U[:, :, :q] * S[:, None, :q],
        private_A=Vh[:, :q],
        shared_B=U[layer, :, index].mT,
        shared_A=Vh[layer, index],
        mixing=mixing,
    ).to(stack.dtype, stack.device)
