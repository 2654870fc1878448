"""The sweep of the paper: private SVDs, then D, B_S and A_S."""

from __future__ import annotations

import math
from typing import ClassVar

from rasa_theory.problem import LayerStack, RasaFactors, squared_error
from rasa_theory.solvers import updates
from rasa_theory.solvers.sweeps.protocol import MemorylessSweep


class PaperSweep(MemorylessSweep):
    """One iteration of the paper (He et al., 2025, Section 3): private SVDs, then D, B_S and A_S, each exact.

    Four passes over M with the error, which is the direct residual.
    """

    name: ClassVar[str] = "paper"
    heats: ClassVar[tuple[int, int]] = (12, 48)

    def __init__(self, unit: LayerStack, max_cancellation: float = math.inf) -> None:
        self._unit = unit
        self._layer_norms = unit.layer_norms()

    def __call__(self, factors: RasaFactors, /) -> tuple[RasaFactors, float]:
        unit, norms = self._unit, self._layer_norms
        factors = updates.update_private(unit, factors)
        MA = unit.right(factors.shared_A.mT)
        factors = updates.update_mixing(MA, norms, factors)
        factors = updates.update_shared_B(MA, norms, factors)
        MB = unit.left(factors.shared_B)
        factors = updates.update_shared_B(MB, norms, factors.transpose()).transpose()
        return factors, squared_error(unit, factors)
