"""Starts with large rank-one terms of the stack, one after the other: of all layers, or of a few."""

from __future__ import annotations

import torch

from rasa_theory.linalg import suitable_threads
from rasa_theory.problem import LayerStack, RankBudget, RankOneTerms, RasaFactors
from rasa_theory.solvers.rank_one import leading_terms
from rasa_theory.solvers.starts.start import Start

_FEW = 3  # layers, at most


def greedy_start(stack: LayerStack, budget: RankBudget, seed: int = 0) -> RasaFactors:
    """A pool of R terms d x b x a, each a large one of the tensor that those before leave; no private terms.

    The tensor is M, or what the best approximations of rank q leave of it, as the seed decides: private terms take what
    one layer alone has, and the pool is for the rest. For stacks in memory.
    """
    generator = torch.Generator().manual_seed(seed)
    return _pursuit(stack, budget, torch.arange(stack.layers), generator)


def few_layers_start(stack: LayerStack, budget: RankBudget, seed: int = 0) -> RasaFactors:
    """The same with large terms of two or three layers, chosen at random; all layers use them as far as they fit.

    What a few layers share is easier to see in them alone than among all.
    """
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(2, _FEW + 1, (1,), generator=generator))
    return _pursuit(stack, budget, torch.randperm(stack.layers, generator=generator)[:count], generator)


def _pursuit(stack: LayerStack, budget: RankBudget, layers: torch.Tensor, generator: torch.Generator) -> RasaFactors:
    """R large terms of the layers at `layers`, one after the other, with the weights of all layers."""
    L, (b, a), q, R = stack.layers, stack.shape, budget.private_rank, budget.pool_rank(stack.layers)
    first = q if bool(torch.rand(1, generator=generator) < 0.5) else 0
    E = stack.sharding.all_gather(_beyond(stack, first))
    B_S, A_S, D = E.new_zeros(b, R), E.new_zeros(R, a), E.new_zeros(L, R)
    layers = layers.to(E.device)
    with suitable_threads(E.flatten(0, 1)):
        for j in range(R):
            term = leading_terms(E[layers][None], generator)
            B_S[:, j], A_S[j] = term.B[0], term.A[0]
            D[:, j] = (E @ A_S[j]) @ B_S[:, j]
            E = E - D[:, j, None, None] * torch.outer(B_S[:, j], A_S[j])
    factors = RasaFactors.from_pool(RankOneTerms(B_S, A_S, D), q, stack.sharding)
    return factors.to(stack.dtype, stack.device)


def _beyond(stack: LayerStack, rank: int) -> torch.Tensor:
    """What the best approximations of rank `rank` leave of the layers held, (L, b, a) in float64."""
    if stack.spectra.is_leading:
        U, S, Vh = stack.spectra.leading(max(rank, 1))
        return stack.values.double() - (U[:, :, :rank] * S[:, None, :rank]) @ Vh[:, :rank]
    U, S, Vh = stack.spectra.svd()
    return (U[:, :, rank:] * S[:, None, rank:]) @ Vh[:, rank:]


GREEDY = Start("greedy", greedy_start, entries=5)
FEW_LAYERS = Start("few-layers", few_layers_start, entries=3)
