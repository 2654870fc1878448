"""The start with a random pool in the directions that the layers have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.linalg import batched, orthogonal
from rasa_theory.problem import LayerStack, RankBudget, RankOneTerms, RasaFactors
from rasa_theory.solvers.starts.start import Start

_RIDGE = 1e-6  # of unit terms' Gram matrix


def subspace_start(stack: LayerStack, budget: RankBudget, seed: int = 0) -> RasaFactors:
    """A random pool in the R leading directions of sum_i U_i diag(sigma_i^2p) U_i^T, and likewise of the rows.

    U_i are the q + R leading singular vectors of a layer. The random power p in [0, 1] decides whether a direction
    counts by how many layers have it (p = 0) or by its energy (p = 1). The mixing is the best one without private
    terms, which are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    (b, a), q, R = stack.shape, budget.private_rank, budget.pool_rank(stack.layers)
    all_gather = stack.sharding.all_gather
    m = min(q + R, b, a)
    U, S, Vh = (all_gather(part) for part in stack.spectra.leading(m))
    power = float(torch.rand(1, generator=generator, dtype=torch.float64))

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(S)

    def common(W: Tensor) -> Tensor:
        joined = batched.beside(W * S[:, None] ** power)
        vectors = linalg.symmetric_eigenpairs(joined @ joined.mT)[1]
        return vectors[:, -min(R, len(vectors)) :]

    columns, rows = common(U), common(Vh.mT)
    B_S = orthogonal.unit_columns(columns @ noise(columns.shape[1], R))
    A_S = orthogonal.unit_columns(rows @ noise(rows.shape[1], R)).mT
    G = (B_S.mT @ B_S) * (A_S @ A_S.mT) + _RIDGE * torch.eye(R, dtype=S.dtype, device=S.device)
    g = ((B_S.mT @ U) * S[:, None] * (A_S @ Vh.mT)).sum(2)  # diag(B_S^T M_i A_S^T): (L, R)
    D = torch.linalg.solve(G, g.mT).mT
    factors = RasaFactors.from_pool(RankOneTerms(B_S, A_S, D), q, stack.sharding)
    return factors.to(stack.dtype, stack.device)


SUBSPACE = Start("subspace", subspace_start, entries=5)
