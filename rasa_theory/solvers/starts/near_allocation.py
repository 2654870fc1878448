"""Starts near that of the allocation bound: its pool, turned at random."""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_theory.problem import LayerStack, RankBudget, RasaFactors
from rasa_theory.solvers.starts.allocation import allocation_start
from rasa_theory.solvers.starts.start import Start

_TURN = 0.3  # tangent of the angle, and the weights of other layers over that of the owner


def near_allocation_start(stack: LayerStack, budget: RankBudget, seed: int = 0) -> RasaFactors:
    """`allocation_start` with its pool turned at random by some 17 degrees, and used by all layers a little.

    Sweeps cannot leave the allocation start in directions that have no gradient there: terms that no other layer uses.
    """
    factors = allocation_start(stack, budget).gathered()
    generator = torch.Generator().manual_seed(seed)

    def noise(X: Tensor) -> Tensor:
        return torch.randn(X.shape, generator=generator, dtype=torch.float64).to(X)

    B_S, A_S, D = factors.shared_B, factors.shared_A, factors.mixing
    size = D.abs().amax(0) if len(D) else D.new_zeros(D.shape[1])
    turned = RasaFactors(
        factors.private_B,
        factors.private_A,
        B_S + _TURN / len(B_S) ** 0.5 * noise(B_S),
        A_S + _TURN / A_S.shape[1] ** 0.5 * noise(A_S),
        D + _TURN / 2 * size * noise(D),
    )
    return turned.sharded(stack.sharding)


NEAR_ALLOCATION = Start("near-allocation", near_allocation_start, entries=6)
