"""The points from which an iteration can start. A new start is a file, its import and its place in `STARTS`."""

from __future__ import annotations

from rasa_theory.solvers.starts.allocation import ALLOCATION, allocation_start
from rasa_theory.solvers.starts.common_subspace import COMMON, common_start
from rasa_theory.solvers.starts.greedy import FEW_LAYERS, GREEDY, few_layers_start, greedy_start
from rasa_theory.solvers.starts.lora import LORA, lora_start
from rasa_theory.solvers.starts.near_allocation import NEAR_ALLOCATION, near_allocation_start
from rasa_theory.solvers.starts.pencil import PENCIL, pencil_start
from rasa_theory.solvers.starts.random import RANDOM, random_start
from rasa_theory.solvers.starts.scattered import SCATTERED, scattered_start
from rasa_theory.solvers.starts.start import Start
from rasa_theory.solvers.starts.subspace import SUBSPACE, subspace_start

STARTS: dict[str, Start] = {
    start.name: start
    for start in (ALLOCATION, LORA, RANDOM, COMMON, PENCIL, NEAR_ALLOCATION, SCATTERED, GREEDY, FEW_LAYERS, SUBSPACE)
}

__all__ = [
    "STARTS", "Start", "allocation_start", "common_start", "few_layers_start", "greedy_start", "lora_start",
    "near_allocation_start", "pencil_start", "random_start", "scattered_start", "subspace_start",
]  # fmt: skip
