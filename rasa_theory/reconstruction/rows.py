"""Rows of the results as plain data, as in data/results.schema.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rasa_theory.bounds import Bound, allocation_bound
from rasa_theory.problem import LayerStack, RankBudget, lora_parameters
from rasa_theory.reconstruction.study_settings import StudySettings
from rasa_theory.reconstruction.theorem import check_theorem, verdict
from rasa_theory.solvers import Attempt, LoraSolution, RasaSolution, median_iterations


def new_results(settings: StudySettings, source: str = "", command: Sequence[str] = ()) -> dict[str, Any]:
    """The results of a study that has finished no stack."""
    return {
        "schema": 1,
        "command": list(command),
        "rank": settings.rank,
        "source": source,
        "weight": settings.weight,
        "seed": settings.solver.seed,
        "environment": None,
        "stacks": [],
        "left_out": [],
        "theorem_3_1": "undecided",
    }


def stack_row(stack: LayerStack, lora: LoraSolution, e_lora_next: float) -> dict[str, Any]:
    """The row of a stack, still without its runs, one for each k; `e_lora_next` is LoRA's error at rank r + 1."""
    return {
        "name": stack.name,
        "layers": stack.layers,
        "shape": list(stack.shape),
        "norm_squared": stack.norm_squared,
        "layer_norms_squared": stack.layer_norms_squared,
        "e_lora": lora.error,
        "e_lora_interval": list(lora.interval),
        "e_lora_next": e_lora_next,
        "runs": [],
    }


@dataclass(frozen=True)
class StudyPoint:
    """The answers of a study for one stack and one k; `seconds` is the time of the solver."""

    stack: LayerStack
    budget: RankBudget
    lora: LoraSolution
    solution: RasaSolution
    attempts: list[Attempt]
    floor: Bound
    seconds: float

    def row(self, settings: StudySettings) -> dict[str, Any]:
        """The point as plain data, with the laws behind Theorem 3.1 checked."""
        solution, lora, solver = self.solution, self.lora, settings.solver
        drop, checks = check_theorem(self.stack, self.budget, lora, solution, self.floor)
        lora_size = lora_parameters(self.stack.layers, self.stack.shape, self.budget.rank)
        return {
            "k": self.budget.shared_rank,
            "e_rasa": solution.error,
            "layer_errors": solution.layer_errors,
            "e_allocation": allocation_bound(self.stack, self.budget).value,
            "ratio": solution.error / lora.error if lora.error > 0 else None,
            "lower_bound": self.floor.value,
            "lower_bound_name": self.floor.name,
            "lower_bound_failure": self.floor.failure,
            "mixing_drop": drop,
            "start": solution.start,
            "sweep": solution.sweep,
            "sweeps": solution.sweeps,
            "stop_reason": solution.stop_reason.name,
            "seconds": self.seconds,
            "data_passes": solution.data_passes,
            "cancellation": solution.cancellation,
            "max_cancellation": solver.max_cancellation if math.isfinite(solver.max_cancellation) else None,
            "effort": solver.effort,
            "search": None if solution.search is None else dataclasses.asdict(solution.search),
            "history": solution.history,
            "iterations_to_beat_lora": median_iterations([attempt.iterations for attempt in self.attempts]),
            "attempts": [
                {"start": "random", "seed": a.seed, "sweep": "paper", "iterations": a.iterations, "history": a.history}
                for a in self.attempts
            ],
            "parameters": {
                "lora": lora_size,
                "rasa": solution.factors.parameters,
                "extra_percent": 100 * (solution.factors.parameters - lora_size) / lora_size,
            },
            "update_rank": solution.factors.update_rank,
            "checks": checks,
            "theorem_3_1": verdict(checks, solver.start),
        }
