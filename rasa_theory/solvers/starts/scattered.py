"""The start with a random pool as large as the updates."""

from __future__ import annotations

from rasa_theory.problem import LayerStack, RankBudget, RasaFactors
from rasa_theory.solvers.starts.random import random_start
from rasa_theory.solvers.starts.start import Start

_SIZE = 0.7  # of ||M||


def scattered_start(stack: LayerStack, budget: RankBudget, seed: int = 0) -> RasaFactors:
    """`random_start` with random weights, so that the pool's terms are of norm 0.7 ||M|| together."""
    return random_start(stack, budget, seed, _SIZE)


SCATTERED = Start("scattered", scattered_start, entries=6)
