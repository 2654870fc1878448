"""The entry of a start: how it is made, and its part in the race."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rasa_theory.problem import LayerStack, RankBudget, RasaFactors


@dataclass(frozen=True)
class Start:
    """A start by name.

    `make`(unit, budget, seed) returns factors in units of the stack's scale, on which `unit` is, or None where its
    conditions do not hold. `entries` is how often it takes part in a search, each time with another seed; a start
    without random numbers has one entry, and takes part once at every effort. A start with conditions has
    `is_worth_racing`(unit, budget), which is cheap; such starts go first, and race only if they also begin below
    e_alloc(k). `is_at_most_lora` promises an error of at most e_lora, up to rounding.
    """

    name: str
    make: Callable[[LayerStack, RankBudget, int], RasaFactors | None]
    entries: int = 1
    is_worth_racing: Callable[[LayerStack, RankBudget], bool] | None = None
    is_at_most_lora: bool = False
