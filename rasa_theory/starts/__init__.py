"""Where an iteration can start: one file each, a function (stack, budget, seed) -> RasaFactors, and its name here."""

from __future__ import annotations

from collections.abc import Callable

from rasa_theory.factors import RasaFactors
from rasa_theory.problem import LayerStack, RankBudget
from rasa_theory.starts.allocation import allocation_start
from rasa_theory.starts.lora import lora_start
from rasa_theory.starts.random import random_start

STARTS: dict[str, Callable[[LayerStack, RankBudget, int], RasaFactors]] = {
    "allocation": allocation_start,
    "lora": lora_start,
    "random": random_start,
}

__all__ = ["STARTS", "allocation_start", "lora_start", "random_start"]
