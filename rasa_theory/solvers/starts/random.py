"""The start with a random pool that no layer uses yet."""

from __future__ import annotations

import torch

from rasa_theory.problem import LayerStack, RankBudget, RankOneTerms, RasaFactors
from rasa_theory.solvers.starts.start import Start


def random_start(stack: LayerStack, budget: RankBudget, seed: int = 0, size: float = 0.0) -> RasaFactors:
    """Random unit columns in B_S and unit rows in A_S, no private terms, and D = 0.

    The first step of a paper sweep is then the private SVD of M_i itself. With `size` > 0 the mixing is random instead,
    so that the pool terms of the layers have size^2 ||M||^2 in all. The same seed gives the same factors on every
    device, and in any number of processes.
    """
    generator = torch.Generator().manual_seed(seed)
    L, (b, a) = stack.layers, stack.shape
    q, R = budget.private_rank, budget.pool_rank(L)
    B_S, A_S, D = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((b, R), (R, a), (L, R)))
    B_S /= torch.linalg.vector_norm(B_S, dim=0)
    A_S /= torch.linalg.vector_norm(A_S, dim=1)[:, None]
    if size == 0.0:
        D.zero_()
    else:
        pool = torch.einsum("lr,rs,ls->", D, (B_S.mT @ B_S) * (A_S @ A_S.mT), D)  # sum_i ||B_S D_i A_S||^2
        D *= size * (stack.norm_squared / pool) ** 0.5
    factors = RasaFactors.from_pool(RankOneTerms(B_S, A_S, D), q, stack.sharding)
    return factors.to(stack.dtype, stack.device)


RANDOM = Start("random", random_start, entries=6)
