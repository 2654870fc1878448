"""The squared error that solvers minimise and report, measured directly from the entries of M."""

from __future__ import annotations

import math

import torch

from rasa_theory.common import InputError
from rasa_theory.problem.factors import LoraFactors, RasaFactors
from rasa_theory.problem.stack import LayerStack


def check_same_layers(stack: LayerStack, factors: RasaFactors | LoraFactors) -> None:
    """Raise InputError if the factors are for other layers or another shape than those of the stack."""
    L, b, a = stack.layers, *stack.shape
    left, right = (factors.B, factors.A) if isinstance(factors, LoraFactors) else (factors.shared_B, factors.shared_A)
    rows, columns = left.shape[-2], right.shape[-1]
    if (factors.sharding, rows, columns) != (stack.sharding, b, a):
        raise InputError(
            f"the factors are of {factors.layers} layers of {rows} x {columns}, "
            f"stack {stack.name!r} has {L} of {b} x {a}"
        )


def squared_errors(stack: LayerStack, factors: RasaFactors | LoraFactors) -> list[float]:
    """||M_i - update_i||_F^2 of each of the L layers, tile by tile in float64, whatever the dtypes are. One pass.

    The difference is formed before it is squared: ||M||^2 - 2 <M, X> + ||X||^2 would lose half of the digits.
    """
    check_same_layers(stack, factors)
    exact = factors.to(torch.float64, stack.device)
    errors = [0.0] * stack.sharding.local_layers
    for tile in stack.cached_tiles():
        residual = exact.update(tile.layer, tile.rows).sub_(tile.values.double()).div_(stack.scale)
        errors[tile.layer] += float(residual.mul_(residual).sum())
    return [e * stack.scale**2 for e in stack.sharding.all_gather_floats(errors)]


def squared_error(stack: LayerStack, factors: RasaFactors | LoraFactors) -> float:
    """The sum of `squared_errors` over the layers."""
    return math.fsum(squared_errors(stack, factors))
