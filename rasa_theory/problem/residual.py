"""The public checker of solutions: the residual of given factors, written down literally from the paper's equation.

It is independent of the solvers. They minimise and report `squared_error`, with products and updates of their own, and
never call this module. The two share the entries of M (`LayerStack.tiles`) and the check of shapes, nothing else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rasa_theory.problem.factors import LoraFactors, RasaFactors
from rasa_theory.problem.squared_error import check_same_layers
from rasa_theory.problem.stack import LayerStack

_WITH_ROWS = ("B", "private_B", "shared_B")  # factors whose second last axis are the rows of M
_OF_A_LAYER = ("B", "A", "private_B", "private_A", "mixing")  # factors whose first axis are the layers


def layer_errors(stack: LayerStack, factors: RasaFactors | LoraFactors) -> list[float]:
    """Measure the squared error of each layer, independently of the solvers.

    ||M_i - B_i A_i||_F^2 for LoRA, ||M_i - B~_i A~_i - B_S D_i A_S||_F^2 for RaSA (He et al., ICLR 2025, eq. 4), in
    float64 whatever the dtypes are. M is read once, in tiles.

    Arguments:
        stack: the updates M_i, (L, b, a).
        factors: factors of the same layers; with several processes, of the layers of this process.

    Returns:
        The L squared errors, in squared units of the input; the same list in all processes.

    Raises:
        InputError: factors and stack have different layers or shapes.
    """
    check_same_layers(stack, factors)
    tensors = _tensors(factors, stack.device)
    errors: list[list[float]] = [[] for _ in range(stack.sharding.local_layers)]
    for i, rows, M in stack.tiles():
        E = (M.double() - _literal_update(_restricted(tensors, i, rows))[0]) / stack.scale
        errors[i].append(float((E**2).sum()))
    return [e * stack.scale**2 for e in stack.sharding.all_gather_floats([math.fsum(parts) for parts in errors])]


def reconstruction_error(stack: LayerStack, factors: RasaFactors | LoraFactors) -> float:
    """Measure the squared error of all layers together, independently of the solvers.

    sum_i ||M_i - update_i||_F^2 (He et al., ICLR 2025, Section 3), the sum of `layer_errors`.

    Arguments:
        stack: the updates M_i, (L, b, a).
        factors: factors of the same layers; with several processes, of the layers of this process.

    Returns:
        The squared error, in squared units of the input; the same number in all processes.

    Raises:
        InputError: factors and stack have different layers or shapes.
    """
    return math.fsum(layer_errors(stack, factors))


def layer_residuals(values: Tensor, factors: RasaFactors | LoraFactors) -> list[float]:
    """`layer_errors` of a tensor M (L, b, a) instead of a stack: it needs nothing of `LayerStack` at all."""
    M = values.double()
    scale = float(M.abs().max()) or 1.0  # squares of 1e-300 and 1e300 leave the range
    X = _literal_update(_tensors(factors, M.device))
    return [float(e) * scale**2 for e in (((M - X) / scale) ** 2).sum((1, 2))]


def _tensors(factors: RasaFactors | LoraFactors, device: torch.device) -> dict[str, Tensor]:
    """The tensors of the factors by name, in float64."""
    return {name: t.to(device, torch.float64) for name, t in vars(factors).items() if isinstance(t, Tensor)}


def _restricted(tensors: dict[str, Tensor], i: int, rows: slice) -> dict[str, Tensor]:
    """The parts of the factors that give some rows of the update of layer i."""
    layer = {name: t[i : i + 1] if name in _OF_A_LAYER else t for name, t in tensors.items()}
    return {name: t[..., rows, :] if name in _WITH_ROWS else t for name, t in layer.items()}


def _literal_update(tensors: dict[str, Tensor]) -> Tensor:
    """The updates as in the paper's equations, (L, b, a)."""
    if "B" in tensors:
        return tensors["B"] @ tensors["A"]
    pool = torch.einsum("bj,ij,ja->iba", tensors["shared_B"], tensors["mixing"], tensors["shared_A"])
    return tensors["private_B"] @ tensors["private_A"] + pool
