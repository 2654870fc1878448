"""How many iterations a random start needs to beat LoRA: the paper's empirical analysis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rasa_theory import linalg
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors
from rasa_theory.solvers.descent import Callback, Descent
from rasa_theory.solvers.starts import random_start

ITERATIONS, AT_LEAST, AFTER_CROSSING = 60, 30, 10


@dataclass(frozen=True)
class Attempt:
    """One run of paper sweeps from a random start.

    history: the error at the start and after every iteration, squared, in units of the input, each a direct residual;
    iterations: the first with an error below e_lora, None if none was.
    """

    seed: int
    iterations: int | None
    history: list[float]


def random_attempt(
    stack: LayerStack,
    budget: RankBudget,
    e_lora: float,
    seed: int,
    callback: Callback | None = None,
    start: RasaFactors | None = None,
    iterations: int = ITERATIONS,
) -> Attempt:
    """Run at most so many iterations; end 10 after the crossing, but not before the 30th, unless the pool degenerates.

    One iteration is one cycle of private SVDs, D, B_S and A_S (He et al., 2025, Section 3). The start is
    `random_start`: a random pool that nobody uses yet, unless `start` gives another. An error counts as below e_lora
    only if it is so beyond the rounding of float64, 10 max(b, a) eps ||M|| in norm.
    """
    unit = stack.unit()
    factors = random_start(unit, budget, seed) if start is None else start.scaled(1 / stack.scale)
    run = Descent(unit, factors, "paper", "random")
    margin = linalg.rounding(math.sqrt(unit.norm_squared), unit.shape, torch.finfo(torch.float64).eps)
    below = max(math.sqrt(e_lora) / stack.scale - margin, 0.0) ** 2
    crossed: int | None = None
    while run.stop_reason is None and run.sweeps < iterations:
        if crossed is not None and run.sweeps >= max(AT_LEAST, crossed + AFTER_CROSSING):
            break
        run.run(run.sweeps + 1, 0.0, callback, stack.scale)
        if crossed is None and run.history[-1] < below:
            crossed = run.sweeps
    return Attempt(seed, crossed, [e * stack.scale**2 for e in run.history])


def median_iterations(counts: Sequence[int | None]) -> int | None:
    """Lower median of the counts, None standing for never (infinity); None for no counts at all."""
    if not counts:
        return None
    ordered = sorted(math.inf if count is None else count for count in counts)
    middle = ordered[(len(ordered) - 1) // 2]
    return None if middle == math.inf else int(middle)
