"""LoRA: every layer its own rank r."""

from __future__ import annotations

import functools

import torch

from rasa_theory.common import at_least
from rasa_theory.methods.fit import Evidence, Fit, Settings, UnitFit, measured
from rasa_theory.methods.method import Method, largest
from rasa_theory.problem import LayerStack, lora_parameters
from rasa_theory.solvers import solve_lora


def fit_lora(stack: LayerStack, rank: int) -> Fit:
    """Minimise sum_i ||M_i - B_i A_i||_F^2: the truncated SVDs of the layers (Eckart-Young). Hu et al., ICLR 2022.

    Stored: B_i (b, r) and A_i (r, a), so L r (a + b) parameters.

    Arguments:
        stack: the layers M_i, (L, b, a).
        rank: r, from 1 to min(b, a).

    Returns:
        A `Fit` with the minimum, in closed form.

    Raises:
        InputError: the rank is out of its range.
    """
    at_least("rank", rank, 1)
    factors = solve_lora(stack.unit(), rank).factors.to(torch.float64)
    solution = UnitFit(factors.update, (factors.B, factors.A), rank)
    return measured(stack, "lora", {"rank": rank}, Evidence.CLOSED_FORM, solution)


def _configurations(stack: LayerStack, limit: int) -> list[Settings]:
    count = functools.partial(lora_parameters, stack.layers, stack.shape)
    rank = largest(count, limit, min(stack.shape))
    return [{"rank": rank}] if rank else []


LORA = Method("lora", "LoRA", fit_lora, lora_parameters, _configurations)
