"""The interface of the sweeps that `solve_rasa` runs by name."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol

from rasa_theory.problem import LayerStack, RasaFactors


class RasaSweep(Protocol):
    """A `Sweep` of RasaFactors on a stack in units of its scale, which is `unit`.

    Terms beyond `max_cancellation` times ||M_i|| end a descent. A sweep may stay inside, or ignore that. `heats` are
    the numbers of sweeps after which the race drops runs: first all but two, then all but the best.
    """

    name: ClassVar[str]
    heats: ClassVar[tuple[int, int]]

    def __init__(self, unit: LayerStack, max_cancellation: float = math.inf) -> None: ...

    def begin(self, point: RasaFactors, error: float) -> Any: ...

    def __call__(self, state: Any, /) -> tuple[Any, float]: ...

    def point(self, state: Any) -> RasaFactors: ...


class MemorylessSweep:
    """The part that sweeps without memory have in common: their state is the factors."""

    def begin(self, point: RasaFactors, error: float) -> RasaFactors:
        return point

    def point(self, state: RasaFactors) -> RasaFactors:
        return state
