"""The start at the optimum of LoRA."""

from __future__ import annotations

from rasa_theory.problem import LayerStack, RankBudget, RasaFactors
from rasa_theory.solvers.lora import solve_lora
from rasa_theory.solvers.starts.start import Start


def lora_start(stack: LayerStack, budget: RankBudget, seed: int = 0) -> RasaFactors:
    """The embedding of Theorem 3.1, the k smallest of a layer's r terms in the pool: its error is e_lora.

    `seed` is not used.
    """
    return RasaFactors.from_lora(solve_lora(stack, budget.rank, "exact").factors, budget, pooled="smallest")


LORA = Start("lora", lora_start, is_at_most_lora=True)
