"""How long the default solver takes on large layers, from the time of LoRA: a rule that was measured, for dry runs.

Measured on two cores with 4 x 512^2 to 8 x 4096^2 (`experiments.at_size`). Small layers follow no such rule: their
time is that of a search, whose sweeps nobody knows before.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from rasa_theory.linalg import orthogonal
from rasa_theory.problem import LayerStack
from rasa_theory.solvers.attempts import AT_LEAST, ITERATIONS
from rasa_theory.solvers.lora import solve_lora

TIMES_LORA = 14
"""Solver and closed floor, in units of LoRA's time, without the search on the core."""
SEARCH_SECONDS = 5
"""The search on the core, in seconds; it does not depend on the size of the layers."""
ITERATION_TIMES_LORA = 1.7
"""One iteration of a random attempt, in units of LoRA's time."""

_SAMPLE = 1280  # side of the layer that is timed
_DECAY = -0.7  # its singular values are j^_DECAY, as those of updates about


def solver_seconds(lora_seconds: float, stacks: int) -> float:
    """The seconds of solver and closed floor for `stacks` stacks of large layers whose LoRA takes `lora_seconds`."""
    return TIMES_LORA * lora_seconds + SEARCH_SECONDS * stacks


def attempt_seconds(lora_seconds: float) -> tuple[float, float]:
    """The least and the greatest number of seconds of one random attempt on a stack of large layers."""
    return AT_LEAST * ITERATION_TIMES_LORA * lora_seconds, ITERATIONS * ITERATION_TIMES_LORA * lora_seconds


def lora_seconds(entries: int, rank: int, dtype: torch.dtype, device: torch.device) -> float:
    """The seconds of LoRA on large layers of `entries` entries in all, by one layer of 1280 x 1280 timed now."""
    left, right = (_orthogonal(seed) for seed in (0, 1))
    values = (left * torch.arange(1, _SAMPLE + 1, dtype=torch.float64) ** _DECAY) @ right
    seconds = []
    for _ in range(2):  # libraries initialise in the first
        started = time.perf_counter()
        solve_lora(LayerStack(values[None], "sample", dtype, device), rank, "fast")
        seconds.append(time.perf_counter() - started)
    return min(seconds) * entries / math.prod(values.shape)


def _orthogonal(seed: int) -> Tensor:
    normal = torch.randn(_SAMPLE, _SAMPLE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return orthogonal.thin_qr(normal)[0]
