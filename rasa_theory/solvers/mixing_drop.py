"""The certified drop of the squared error when D alone is re-solved."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.linalg import batched
from rasa_theory.problem import LayerStack, RasaFactors, check_same_layers
from rasa_theory.solvers.accuracy import layer_term_norms, measurable
from rasa_theory.solvers.updates import update_mixing


def resolve_mixing(stack: LayerStack, factors: RasaFactors) -> tuple[RasaFactors, float]:
    """The same factors with D re-solved, in float64, and a certified drop of the squared error: see `mixing_drop`.

    Factors and drop are in units of the input. Two passes over M.
    """
    check_same_layers(stack, factors)
    unit = stack.unit()
    factors = factors.to(torch.float64, stack.device).scaled(1 / stack.scale).normalised()
    MA = torch.zeros(factors.sharding.local_layers, *factors.shared_B.shape, dtype=torch.float64, device=stack.device)
    for tile in unit.tiles():
        MA[tile.layer, tile.rows] = tile.values.double() @ factors.shared_A.mT
    norms = unit.layer_norms(torch.float64)
    solved = update_mixing(MA, norms, factors)
    return solved.scaled(stack.scale), _certified_drop(unit, norms, factors, solved) * stack.scale**2


def _certified_drop(unit: LayerStack, layer_norms: Tensor, factors: RasaFactors, solved: RasaFactors) -> float:
    """sum_i <2 E_i - X_i, X_i> for the change X_i = B_S diag(x_i) A_S of update i, less its rounding; at least 0.

    In exact arithmetic it equals sum_i 2 x_i^T g_i - x_i^T G x_i. This form counts the rounding of pool terms that
    nearly cancel in X_i once, not squared: X_i has an error of eps sum_j |x_ij| in norm, E_i of eps times the size of
    its terms.
    """
    x = solved.mixing - factors.mixing
    drop, E2, X2 = (torch.zeros(factors.sharding.local_layers, dtype=torch.float64) for _ in range(3))
    for i, rows, M in unit.tiles():
        E = M.double() - factors.update(i, rows)
        X = (factors.shared_B[rows] * x[i]) @ factors.shared_A
        for sums, values in ((drop, (2 * E - X) * X), (E2, E * E), (X2, X * X)):
            sums[i] += float(values.sum())
    E_norm, X_norm = E2.sqrt(), X2.sqrt()
    sizes = (layer_norms + layer_term_norms(factors)).cpu()
    error = 2 * (E_norm + X_norm) * x.abs().sum(1).cpu() + 2 * sizes * X_norm
    eps = torch.finfo(torch.float64).eps
    drops, errors = factors.sharding.all_reduce_together(batched.total(drop), batched.total(error))
    return max(float(drops) - linalg.rounding(float(errors), unit.shape, eps), 0.0)


def drop_allowance(stack: LayerStack, factors: RasaFactors, before: float, solved: RasaFactors, after: float) -> float:
    """Tolerance, squared, for comparing the measured decrease `before` - `after` with the drop of `resolve_mixing`.

    Let m be the sum of `measurable` at `factors` and at `solved`, in float64. The two errors are off by at most
    2 sqrt(before) m, 2 sqrt(after) m and m^2 together. The drop is off by its own allowance, at most
    6 (sqrt(before) + sqrt(after)) m, since ||X|| <= sqrt(before) + sqrt(after) and its terms are no larger than in m.
    """
    eps = torch.finfo(torch.float64).eps
    m = measurable(stack, factors, eps) + measurable(stack, solved, eps)
    return 8 * (math.sqrt(before) + math.sqrt(after)) * m + m**2


def mixing_drop(stack: LayerStack, factors: RasaFactors) -> float:
    """Certify the drop of the squared error of `factors` when D alone is re-solved, in closed form less its rounding.

    sum_i g_i^T (B_S^T B_S * A_S A_S^T)^+ g_i with g_i = diag(B_S^T E_i A_S^T). Directions whose g is rounding noise, or
    in which the Gram matrix is numerically singular, count as 0. At the LoRA embedding of Theorem 3.1 (He et al., 2025)
    it is a lower bound on e_lora - e_rasa(k). So it shows that the inequality is strict without subtracting two large
    numbers.

    Arguments:
        stack: the L updates M_i (b, a).
        factors: RaSA factors of the same layers, in units of the input.

    Returns:
        The drop of the squared error, summed over layers, in units of the input; at least 0.

    Raises:
        InputError: factors and stack have different layers or shapes.
    """
    return resolve_mixing(stack, factors)[1]
