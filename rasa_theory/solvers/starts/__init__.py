"""Where an iteration can start: one file each, a function (stack, budget, seed) -> RasaFactors, and its name here.

A start that needs conditions returns None where they do not hold; `PROMISES` says, cheaply, whether it is worth racing.
"""

from __future__ import annotations

from collections.abc import Callable

from rasa_theory.problem import LayerStack, RankBudget, RasaFactors
from rasa_theory.solvers.starts.allocation import allocation_start
from rasa_theory.solvers.starts.common import common_promises, common_start
from rasa_theory.solvers.starts.lora import lora_start
from rasa_theory.solvers.starts.pencil import pencil_promises, pencil_start
from rasa_theory.solvers.starts.random import random_start

STARTS: dict[str, Callable[[LayerStack, RankBudget, int], RasaFactors | None]] = {
    "allocation": allocation_start,
    "lora": lora_start,
    "random": random_start,
    "common": common_start,
    "pencil": pencil_start,
}
PROMISES: dict[str, Callable[[LayerStack, RankBudget], bool]] = {
    "common": common_promises,
    "pencil": pencil_promises,
}

__all__ = ["PROMISES", "STARTS", "allocation_start", "common_start", "lora_start", "pencil_start", "random_start"]
