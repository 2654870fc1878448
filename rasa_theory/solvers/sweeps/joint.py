"""The joint sweep: half of all factors at once, then the other half."""

from __future__ import annotations

import math
from typing import ClassVar

from rasa_theory.problem import LayerStack, RasaFactors
from rasa_theory.solvers import updates
from rasa_theory.solvers.accuracy import trusted_error
from rasa_theory.solvers.sweeps.protocol import MemorylessSweep


class JointSweep(MemorylessSweep):
    """All B~_i, B_S and D at once, then all A~_i, A_S and D: two passes over M.

    The error comes from the products where rounding cannot show in it, otherwise it is the direct residual.
    """

    name: ClassVar[str] = "joint"
    heats: ClassVar[tuple[int, int]] = (12, 48)

    def __init__(self, unit: LayerStack, max_cancellation: float = math.inf) -> None:
        self._unit = unit
        self._layer_norms = unit.layer_norms()

    def begin(self, point: RasaFactors, error: float) -> RasaFactors:
        return updates.with_private_terms(self._unit, point)

    def __call__(self, factors: RasaFactors, /) -> tuple[RasaFactors, float]:
        unit = self._unit
        half = updates.joint_sweep((unit.right, unit.left), self._layer_norms, factors)
        return half.factors, trusted_error(unit, half.factors, float(half.error))
