"""The number of iterations that a random start needs to beat LoRA: the paper's empirical analysis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rasa_theory import linalg
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors
from rasa_theory.solvers.rasa_descent import Callback, RasaDescent, in_units
from rasa_theory.solvers.starts import random_start

ITERATIONS = 60
AT_LEAST = 30
AFTER_CROSSING = 10


@dataclass(frozen=True)
class Attempt:
    """One run of paper sweeps from a random start.

    Attributes:
        seed: seed of the random start.
        iterations: the number of the first iteration with an error below e_lora; None if there was none.
        history: the squared error at the start and after every iteration, in units of the input, each a direct
            residual.
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
    """Count the iterations until the error is below e_lora (He et al., 2025, Section 3).

    One iteration is one cycle of private SVDs, D, B_S and A_S. The run ends 10 iterations after the crossing, but not
    before the 30th, unless the pool degenerates. An error counts as below e_lora only if it is so beyond the rounding
    of float64, 10 max(b, a) eps ||M|| in norm.

    Arguments:
        stack: the L updates M_i (b, a).
        budget: r ranks a layer, k of them shared.
        e_lora: the squared error of LoRA, in units of the input.
        seed: seed of the random start.
        callback: called with a `Progress` after every iteration.
        start: RasaFactors in units of the input, instead of a random pool that no layer uses yet (`random_start`).
        iterations: the largest number of iterations.

    Returns:
        The number of iterations and the history.

    Raises:
        InputError: the error of `start` is not finite, or its shapes do not fit the stack.
    """
    with stack.suitable_threads():
        unit = stack.unit()
        factors = random_start(unit, budget, seed) if start is None else start.scaled(1 / stack.scale)
        callback = in_units(stack, callback)
        run = RasaDescent(unit, factors, "paper", "random")
        margin = linalg.rounding(math.sqrt(unit.norm_squared), unit.shape, torch.finfo(torch.float64).eps)
        level = max(math.sqrt(e_lora) / stack.scale - margin, 0.0) ** 2
        crossing: int | None = None
        end = iterations
        while run.stop_reason is None and run.sweeps < end:
            run.run(run.sweeps + 1, 0.0, callback)
            if crossing is None and run.history[-1] < level:
                crossing = run.sweeps
                end = min(iterations, max(AT_LEAST, crossing + AFTER_CROSSING))
    return Attempt(seed, crossing, [error * stack.scale**2 for error in run.history])


def median_iterations(counts: Sequence[int | None]) -> int | None:
    """The lower median of the counts, None standing for never (infinity); None for no counts at all."""
    if not counts:
        return None
    ordered = sorted(math.inf if count is None else count for count in counts)
    middle = ordered[(len(ordered) - 1) // 2]
    return None if middle == math.inf else int(middle)
