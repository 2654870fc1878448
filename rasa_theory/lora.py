"""e_lora in closed form: the truncated SVD of every layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rasa_theory import linalg
from rasa_theory.factors import LoraFactors
from rasa_theory.problem import LayerStack, RankBudget


@dataclass(frozen=True)
class LoraSolution:
    """The optimum of LoRA: `error` = e_lora, squared and summed over layers.

    `interval` holds the exact value in spite of rounding; `layer_errors` are the summands; `factors` B (L, b, r) carry
    the singular values, A (L, r, a) has orthonormal rows, terms in order of falling size.
    """

    error: float
    interval: tuple[float, float]
    layer_errors: list[float]
    factors: LoraFactors


def solve_lora(stack: LayerStack, rank: int) -> LoraSolution:
    """e_lora = min sum_i ||M_i - B_i A_i||_F^2 = sum_i sum_{j>r} sigma_ij^2 (Eckart-Young), with the factors.

    Exact SVDs in float64, computed once per stack. Raises InputError unless 1 <= rank <= min(b, a).
    """
    RankBudget(rank, 0).check_fits(stack)
    U, S, Vh = stack.unit().svd()
    errors = [e * stack.scale**2 for e in linalg.tail_energy(S, rank).tolist()]
    error = math.fsum(errors)
    low, high = math.sqrt(error) - stack.rounding, math.sqrt(error) + stack.rounding
    B = U[:, :, :rank] * (S[:, None, :rank] * stack.scale)
    factors = LoraFactors(B, Vh[:, :rank]).to(stack.dtype, stack.device)
    return LoraSolution(error, (max(low, 0.0) ** 2, high**2), errors, factors)
