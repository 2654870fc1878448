"""LoRA: every layer its own rank r."""

from __future__ import annotations

import torch

from rasa_theory.common import at_least
from rasa_theory.methods.fit import Evidence, Fit, Found, Method, fitted
from rasa_theory.methods.settings import Settings, largest
from rasa_theory.problem import LayerStack, lora_parameters
from rasa_theory.solvers import solve_lora


def fit_lora(stack: LayerStack, rank: int) -> Fit:
    """min sum_i ||M_i - B_i A_i||_F^2, B_i (b, r), A_i (r, a): truncated SVDs (Eckart-Young). Hu et al., ICLR 2022.

    L r (a + b) parameters. Closed form. Raises InputError unless 1 <= rank <= min(b, a).
    """
    at_least("rank", rank, 1)
    factors = solve_lora(stack.unit(), rank).factors.to(torch.float64)
    found = Found(factors.update, (factors.B, factors.A), rank)
    return fitted(stack, "lora", {"rank": rank}, Evidence.CLOSED_FORM, found)


def _configurations(stack: LayerStack, parameters: int) -> list[Settings]:
    rank = largest(lambda r: lora_parameters(stack.layers, stack.shape, r), parameters, min(stack.shape))
    return [{"rank": rank}] if rank else []


LORA = Method(fit_lora, _configurations)
