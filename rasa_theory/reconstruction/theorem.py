"""The laws behind the verdict on Theorem 3.1, evaluated anew from the factors, so that each can fail."""

from __future__ import annotations

from typing import Any

from rasa_theory import linalg
from rasa_theory.bounds import Bound
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors, reconstruction_error
from rasa_theory.solvers import LoraSolution, RasaSolution, drop_allowance, is_at_most_lora, resolve_mixing


def check_theorem(
    stack: LayerStack, budget: RankBudget, lora: LoraSolution, solution: RasaSolution, floor: Bound
) -> tuple[float, dict[str, bool]]:
    """Evaluate the laws behind the verdict from the factors, with the direct residual.

    Returns mixing_drop at the LoRA embedding, and the result of each law by name. The embedding pools the k smallest or
    the k largest terms of each layer; mixing_drop is the larger one of the two.
    """
    tolerance = stack.rounding
    answer = reconstruction_error(stack, solution.factors)
    drops = []
    embedded_well = True
    drops_well = True
    for pooled in ("smallest", "largest"):
        embedding = RasaFactors.from_lora(lora.factors, budget, pooled)
        before = reconstruction_error(stack, embedding)
        embedded_well &= linalg.not_above(before, lora.error, tolerance)
        embedded_well &= linalg.not_above(lora.error, before, tolerance)
        solved, drop = resolve_mixing(stack, embedding)
        after = reconstruction_error(stack, solved)
        allowance = drop_allowance(stack, embedding, before, solved, after)
        drops_well &= drop >= 0 and abs((before - after) - drop) <= allowance
        drops.append(drop)
    return max(drops), {
        "embedding_reproduces_eckart_young": embedded_well,
        "answer_is_not_above_e_lora": linalg.not_above(answer, lora.error, tolerance),
        "floor_is_not_above_answer": linalg.not_above(floor.value, answer, tolerance),
        "mixing_drop_is_what_solving_d_gives": drops_well,
    }


def verdict(checks: dict[str, bool], start: str | RasaFactors) -> str:
    """Return "holds", "violated" or "undecided" for one run from its laws and its start."""
    failed = {law for law, holds in checks.items() if not holds}
    # A local minimum above e_lora contradicts the theorem only if the start promises e_lora.
    promises_nothing = not is_at_most_lora(start)
    if promises_nothing and failed == {"answer_is_not_above_e_lora"}:
        return "undecided"
    return "violated" if failed else "holds"


def overall_verdict(results: dict[str, Any]) -> str:
    """The verdict on all runs: the worst one. While stacks are left (`unfinished`), it is "undecided" at best."""
    verdicts = {run["theorem_3_1"] for row in results["stacks"] for run in row["runs"]}
    verdicts |= {"undecided"} if "unfinished" in results else set()
    return next((v for v in ("violated", "undecided") if v in verdicts), "holds")
