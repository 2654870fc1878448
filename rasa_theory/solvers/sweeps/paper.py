"""The sweep of the paper: private SVDs, then D, B_S and A_S."""

from __future__ import annotations

import torch

from rasa_theory.problem import LayerStack, RasaFactors, squared_error
from rasa_theory.solvers import updates


def paper_sweep(unit: LayerStack, layer_norms: torch.Tensor, factors: RasaFactors) -> tuple[RasaFactors, float]:
    """One iteration of the paper (Section 3): private SVDs, then D, B_S and A_S, each exact. Four passes over M.

    The squared error that comes back is the direct residual.
    """
    factors = updates.update_private(unit, factors)
    MA = unit.right(factors.shared_A.mT)
    factors = updates.update_mixing(MA, layer_norms, factors)
    factors = updates.update_shared_B(MA, layer_norms, factors)
    MB = unit.left(factors.shared_B)
    factors = updates.update_shared_B(MB, layer_norms, factors.transpose()).transpose()
    return factors, squared_error(unit, factors)
