"""The one residual: how far given factors are from the stack. Shares no code with the solvers that made them."""

from __future__ import annotations

import math

import torch

from rasa_theory.common import InputError
from rasa_theory.problem.factors import LoraFactors, RasaFactors
from rasa_theory.problem.stack import LayerStack


def layer_errors(stack: LayerStack, factors: RasaFactors | LoraFactors) -> list[float]:
    """||M_i - update_i||_F^2 of each of the L layers: direct, tile by tile, in float64 whatever the dtypes are.

    Raises InputError if the factors are of another shape than the stack.
    """
    L, b, a = stack.layers, *stack.shape
    left, right = (factors.B, factors.A) if isinstance(factors, LoraFactors) else (factors.shared_B, factors.shared_A)
    rows, columns = left.shape[-2], right.shape[-1]
    if (factors.sharding, rows, columns) != (stack.sharding, b, a):
        raise InputError(
            f"the factors are of {factors.layers} layers of {rows} x {columns}, "
            f"stack {stack.name!r} has {L} of {b} x {a}"
        )
    factors = factors.to(torch.float64, stack.device)
    errors = [0.0] * stack.sharding.local_layers
    for tile in stack.tiles():
        residual = (tile.values.double() - factors.update(tile.layer, tile.rows)) / stack.scale
        errors[tile.layer] += float((residual * residual).sum())
    return [e * stack.scale**2 for e in stack.sharding.all_gather_floats(errors)]


def reconstruction_error(stack: LayerStack, factors: RasaFactors | LoraFactors) -> float:
    """sum_i ||M_i - update_i||_F^2 (He et al., ICLR 2025, Section 3): squared, in the units of the input.

    The public checker of every solution: `layer_errors`, summed. Raises InputError if the shapes disagree.
    """
    return math.fsum(layer_errors(stack, factors))
