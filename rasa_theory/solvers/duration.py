"""How long LoRA, the default solver and random attempts take: rules that were measured, for dry runs.

One layer is timed, on the machine and at the time of the dry run; the rest follows from LoRA's time. Large layers take
no SVD, and their rule was measured on two cores with 4 x 512^2 to 32 x 4096^2 (`experiments.at_size`). Small layers
take exact SVDs. Their rule is rough: it rests on the bundled updates (148 s of one core for four stacks, five attempts
each) and on synthetic stacks of 3 x 60 x 50 and 6 x 128^2. The sweeps of a search depend on the updates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rasa_theory.linalg import orthogonal
from rasa_theory.problem import Layered, LayerStack, RankBudget
from rasa_theory.solvers.attempts import AT_LEAST, ITERATIONS
from rasa_theory.solvers.lora import solve_lora
from rasa_theory.solvers.search import EFFORTS, search_operations

TIMES_LORA = 14
"""Solver and closed floor, in units of LoRA's time, without the search on the core, for `TERMS` terms in all layers."""
TERMS = 64
TERMS_POWER = 0.6
"""How `TIMES_LORA` rises with the number L r of terms, beyond `TERMS`: products with M then have more columns."""
SEARCH_SECONDS = 7
"""The search on a small core, in seconds; it does not depend on the size of the layers."""
OPERATIONS_PER_SECOND = 7e9
"""The sweeps on a large core: it has 3/2 L r rows and columns."""
ITERATION_TIMES_LORA = 1.7
"""One iteration of a random attempt, in units of LoRA's time."""

EXACT_TIMES_LORA = 10
"""The same as `TIMES_LORA` for layers with exact SVDs."""
EXACT_ITERATION_TIMES_LORA = 0.5
"""The same as `ITERATION_TIMES_LORA` for layers with exact SVDs."""
EFFORT_TIMES = {"quick": "less than", "default": "some", "thorough": "many times"}
"""What the seconds of the default effort are for another effort, in words."""

_SAMPLE = 1280  # side of the layer that is timed
_EXACT_SAMPLE = 384  # the same, for layers with exact SVDs
_DECAY = -0.7  # its singular values are j^_DECAY, as those of updates about


def solver_seconds(lora_seconds: float, stacks: Sequence[Layered], budget: RankBudget) -> float:
    """The seconds of solver and closed floor for stacks of large layers whose LoRA takes `lora_seconds` in all."""
    entries = [stack.layers * math.prod(stack.shape) for stack in stacks]
    seconds = 0.0
    for stack, count in zip(stacks, entries, strict=True):
        terms = max(1.0, stack.layers * budget.rank / TERMS)
        seconds += TIMES_LORA * terms**TERMS_POWER * lora_seconds * count / sum(entries)
        operations = search_operations(stack.layers, stack.shape, budget, EFFORTS["default"])
        seconds += SEARCH_SECONDS + operations / OPERATIONS_PER_SECOND
    return seconds


def exact_solver_seconds(lora_seconds: float, stacks: Sequence[Layered], rank: int) -> float:
    """The same for layers with exact SVDs, whose search takes the longer the more terms all layers have in all."""
    search = sum(4 + stack.layers * min(rank, *stack.shape) / 5 for stack in stacks)
    return EXACT_TIMES_LORA * lora_seconds + search


def attempt_seconds(lora_seconds: float, exact: bool = False) -> tuple[float, float]:
    """The least and the greatest number of seconds of one random attempt on stacks whose LoRA takes `lora_seconds`."""
    iteration = (EXACT_ITERATION_TIMES_LORA if exact else ITERATION_TIMES_LORA) * lora_seconds
    return AT_LEAST * iteration, ITERATIONS * iteration


def lora_seconds(entries: int, rank: int, dtype: torch.dtype, device: torch.device) -> float:
    """The seconds of LoRA on large layers of `entries` entries in all, by one layer of 1280 x 1280 timed now."""
    lora = partial(solve_lora, rank=rank, method="fast")
    return sample_seconds((_SAMPLE, _SAMPLE), dtype, device, lora) * entries / _SAMPLE**2


def exact_lora_seconds(stacks: Sequence[Layered], rank: int, dtype: torch.dtype, device: torch.device) -> float:
    """The seconds of LoRA on stacks whose layers take exact SVDs, by one layer timed now, of at most 384 x 384."""
    b, a = max((stack.shape for stack in stacks), key=svd_cost)
    sample = (min(b, _EXACT_SAMPLE), min(a, _EXACT_SAMPLE))
    lora = partial(solve_lora, rank=min(rank, *sample), method="exact")
    seconds = sample_seconds(sample, dtype, device, lora)
    return seconds * sum(stack.layers * svd_cost(stack.shape) for stack in stacks) / svd_cost(sample)


def svd_cost(shape: tuple[int, int]) -> int:
    """What the time of an SVD of a layer (b, a) is in proportion to."""
    return math.prod(shape) * min(shape)


def sample_seconds(
    shape: tuple[int, int], dtype: torch.dtype | None, device: torch.device, work: Callable[[LayerStack], Any]
) -> float:
    """The seconds of some work on one layer of this shape, whose singular values fall as those of updates."""
    (b, a), sides = shape, min(shape)
    left, right = _orthogonal(b, sides, 0), _orthogonal(a, sides, 1)
    values = (left * torch.arange(1, sides + 1, dtype=torch.float64) ** _DECAY) @ right.T
    seconds = []
    for _ in range(2):  # libraries initialise in the first
        started = time.perf_counter()
        work(LayerStack(values[None], "sample", dtype, device))
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _orthogonal(rows: int, columns: int, seed: int) -> Tensor:
    normal = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return orthogonal.thin_qr(normal)[0]
