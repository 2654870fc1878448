"""The joint sweep: half of all factors at once, then the other half."""

from __future__ import annotations

import torch

from rasa_theory.problem import LayerStack, RasaFactors
from rasa_theory.solvers import updates
from rasa_theory.solvers.accuracy import trusted_error


def joint_iteration(unit: LayerStack, layer_norms: torch.Tensor, factors: RasaFactors) -> tuple[RasaFactors, float]:
    """All B~_i, B_S and D at once, then all A~_i, A_S and D: two passes over M.

    The squared error comes from the products, where it can be trusted.
    """
    factors, error = updates.joint_sweep((unit.right, unit.left), layer_norms, factors)
    return factors, trusted_error(unit, factors, float(error))
