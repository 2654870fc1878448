"""Which rank each layer gets where not all get the same: the leading terms of all layers, by what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory.common import InputError, at_least
from rasa_theory.problem import RankBudget


@dataclass(frozen=True)
class RankTarget:
    """What the ranks of all layers together must reach: a share of the energy, or at most so many parameters.

    Raises InputError unless exactly one is given, 0 < energy <= 1 or parameters >= 1.
    """

    energy: float | None = None
    parameters: int | None = None

    def __post_init__(self) -> None:
        if (self.energy is None) == (self.parameters is None):
            raise InputError("a target for ranks is either an energy or a number of parameters")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InputError(f"energy must be above 0 and at most 1, got {self.energy}", "energy")
        if self.parameters is not None:
            at_least("parameters", self.parameters, 1)


def allocate_ranks(sigmas: Sequence[Tensor], costs: Sequence[int], target: RankTarget) -> list[list[int]]:
    """The rank of every layer of every stack: sigma_s (L_s, m_s) falling, a term of stack s costs costs[s] = a + b.

    The terms are taken in falling order of sigma_ij^2 per parameter, a layer's own in order of its sigma_ij. So no
    other ranks of as many parameters keep more energy, and none that keep as much cost less by more than one term (the
    greedy solution of a knapsack).
    """
    energy = torch.cat([(sigma.double() ** 2).flatten().cpu() for sigma in sigmas])
    cost = torch.cat([torch.full((sigma.numel(),), float(c)).double() for sigma, c in zip(sigmas, costs, strict=True)])
    order = (energy / cost).argsort(descending=True, stable=True)
    if target.energy is not None:
        wanted = target.energy * float(energy.sum()) * (1 - 1e-12)
        count = int((energy[order].cumsum(0) < wanted).sum()) + 1 if wanted > 0 else 0
    else:
        assert target.parameters is not None
        count = int((cost[order].cumsum(0) <= target.parameters).sum())
    kept = torch.zeros(len(energy), dtype=torch.bool)
    kept[order[:count]] = energy[order[:count]] > 0
    ranks, start = [], 0
    for sigma in sigmas:
        ranks.append(kept[start : start + sigma.numel()].reshape(sigma.shape).sum(1).tolist())
        start += sigma.numel()
    return ranks


def allocate(S: Tensor, budget: RankBudget) -> tuple[Tensor, Tensor]:
    """Hand the R places of the pool to the largest sigma_ij with j > q, whichever layer they are in.

    S (L, m) holds the singular values of each layer, falling. Returns layer and index of the chosen ones, (R,) each;
    there are always enough, since R = L k and k <= m - q.
    """
    q, (L, m) = budget.private_rank, S.shape
    chosen = torch.topk(S[:, q:].reshape(-1), budget.pool_rank(L)).indices
    width = max(m - q, 1)
    return chosen // width, q + chosen % width
