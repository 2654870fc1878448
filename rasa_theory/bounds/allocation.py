"""The greedy allocation of rank-one terms: the layers share a budget, and the most valuable terms get it.

The terms of a stack are the singular terms sigma_ij u_ij v_ij^T of its layers, sigma (L, m) falling along each layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.common import InputError, at_least
from rasa_theory.problem import SVD, LayerStack, RankBudget

_AHEAD = 4  # terms of a layer beyond r that are taken at first


def greedy_order(worth: Tensor) -> Tensor:
    """Indices of all terms, the most valuable first: (N,) -> (N,). Terms of equal worth keep their order."""
    return worth.argsort(descending=True, stable=True)


def largest_terms(sigma: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Layer and index of the `count` largest sigma_ij, largest first: (L, m) -> (n,), (n,), n = min(count, L m)."""
    order = greedy_order(sigma.flatten())[:count]
    m = sigma.shape[1]
    return order // m, order % m


def allocate_pool(sigma: Tensor, budget: RankBudget) -> tuple[Tensor, Tensor]:
    """Give the R places of the pool to the largest sigma_ij with j > q, whichever layer they are in.

    Returns layer and index of these terms, (R,) each. There are always enough, since R = L k and k <= m - q.
    """
    q, L = budget.private_rank, len(sigma)
    layer, index = largest_terms(sigma[:, q:], budget.pool_rank(L))
    return layer, q + index


def terms_within_reach(stack: LayerStack, budget: RankBudget) -> SVD:
    """Leading singular terms of the layers held, among which are all that `allocate_pool` can choose."""
    q, R = budget.private_rank, budget.pool_rank(stack.layers)
    most = min(q + R, *stack.shape)
    return _within_reach(stack, q, R, most if most <= 2 * budget.rank else budget.rank + _AHEAD)


def terms_among_largest(stack: LayerStack, count: int) -> SVD:
    """Leading singular terms of the layers held, among which are the `count` largest of all layers."""
    return _within_reach(stack, 0, count, math.ceil(count / stack.layers) + _AHEAD)


def _within_reach(stack: LayerStack, skipped: int, wanted: int, first: int) -> SVD:
    """At least `first` leading terms of each layer; beyond `skipped` of each, the `wanted` largest are among them.

    Where terms come from products, more are taken as long as the next one of some layer could be among these.
    """
    most = min(skipped + wanted, *stack.shape)
    count = min(first, most)
    while True:
        svd = stack.spectra.leading(count)
        S, following = (stack.sharding.all_gather(x) for x in (svd.S, stack.spectra.following(count)))
        least = S[:, skipped:].flatten().sort(descending=True).values[:wanted]
        if count >= most or wanted == 0 or bool((following <= least[-1]).all()):
            return svd
        count = min(2 * count, most)


@dataclass(frozen=True)
class RankTarget:
    """The goal that the ranks of all layers reach together.

    - energy: the least share of sum_ij sigma_ij^2 that they keep, 0 < energy <= 1.
    - parameters: the greatest number of parameters that they take, at least 1.

    Raises InputError unless exactly one of the two is set, and in its range.
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

    def count(self, energy: Tensor, cost: Tensor) -> int:
        """Number of leading terms that reach the goal, their energy and their cost (N,) in greedy order."""
        if self.energy is None:
            return int((cost.cumsum(0) <= (self.parameters or 0)).sum())
        total = float(energy.sum())
        return linalg.terms_reaching(energy.cumsum(0), self.energy * total) if total > 0 else 0


def allocate_ranks(sigmas: Sequence[Tensor], costs: Sequence[int], target: RankTarget) -> list[list[int]]:
    """Rank of every layer of every stack that reaches `target`: sigmas[s] (L_s, m_s), a term costs costs[s] = a + b.

    The greedy solution of a knapsack: terms in falling order of sigma_ij^2 per parameter, which within a layer is the
    order of its sigma_ij. No other ranks with the same number of parameters keep more energy. Ranks that keep at least
    the same energy cost less by one term at most. Terms with sigma_ij = 0 are left out.
    """
    energy = torch.cat([(sigma.double() ** 2).flatten().cpu() for sigma in sigmas])
    cost = torch.cat([torch.full((sigma.numel(),), float(c)).double() for sigma, c in zip(sigmas, costs, strict=True)])
    order = greedy_order(energy / cost)
    chosen = order[: target.count(energy[order], cost[order])]
    is_chosen = torch.zeros(len(energy), dtype=torch.bool)
    is_chosen[chosen] = energy[chosen] > 0
    per_stack = torch.split(is_chosen, [sigma.numel() for sigma in sigmas])
    return [flags.reshape(sigma.shape).sum(1).tolist() for flags, sigma in zip(per_stack, sigmas, strict=True)]
