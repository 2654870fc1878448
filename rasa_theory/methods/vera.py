"""VeRA: frozen random A and B, and two trained diagonals for each layer (arXiv 2310.11454)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from rasa_theory.common import at_least
from rasa_theory.methods.alternate import Steps, alternate
from rasa_theory.methods.diagonals import Diagonals, beyond
from rasa_theory.methods.fit import Evidence, Fit, Settings, UnitFit, measured, residual
from rasa_theory.methods.method import Method, largest
from rasa_theory.methods.products import right
from rasa_theory.problem import LayerStack

# The largest rank tried in a comparison. A rank more catches about 1 / (a b) of the energy, and costs r^3 operations.
LARGEST = 1024


def fit_vera(stack: LayerStack, rank: int, seed: int = 0, max_sweeps: int = 8) -> Fit:
    """Minimise sum_i ||M_i - diag(b_i) B diag(d_i) A||_F^2 over b_i and d_i: VeRA (Kopiczko et al., ICLR 2024).

    B (b, r) and A (r, a) are random, frozen and the same for all layers, drawn by Kaiming's uniform rule. The seed
    makes them again, so only the L (b + r) entries of the diagonals are stored. Exact least squares for d_i and b_i
    alternate, from b_i = 1. A rank of a b or more leaves no error.

    Arguments:
        stack: the layers M_i, (L, b, a).
        rank: r, at least 1.
        seed: seed of B and A.
        max_sweeps: the largest number of sweeps, at least 1.

    Returns:
        A `Fit` with the best solution for these B and A.

    Raises:
        InputError: an argument is out of its range.
    """
    at_least("rank", rank, 1)
    at_least("max_sweeps", max_sweeps, 1)
    L, b, unit = stack.layers, stack.shape[0], stack.unit()
    B, A = _kaiming(unit, seed, rank)
    norms, MA = unit.layer_norms(torch.float64), right(unit, A.mT)
    start = Diagonals(B.new_ones(L, b), B, B.new_zeros(L, rank), A)
    steps = Steps(lambda f: f.refit_u(MA, norms).refit_v(MA, norms), lambda f: residual(unit, f.update), beyond)
    f, history = alternate(unit, steps, [start], max_sweeps)
    solution = UnitFit(f.update, (f.v, f.u), rank, history=history)
    return measured(stack, "vera", {"rank": rank}, Evidence.BEST_FOUND, solution)


def _kaiming(unit: LayerStack, seed: int, rank: int) -> tuple[Tensor, Tensor]:
    """B (b, r) and A (r, a): uniform within sqrt(3 / columns), times a gain that the diagonals absorb."""
    generator, (b, a) = torch.Generator().manual_seed(seed), unit.shape
    shapes = ((b, rank), (rank, a))
    B, A = (torch.rand(*shape, generator=generator, dtype=torch.float64).to(unit.device) for shape in shapes)
    return (2 * B - 1) * math.sqrt(3 / rank), (2 * A - 1) * math.sqrt(3 / a)


def _parameters(layers: int, shape: tuple[int, int], rank: int) -> int:
    return layers * (shape[0] + rank)


def _configurations(stack: LayerStack, limit: int) -> list[Settings]:
    count = functools.partial(_parameters, stack.layers, stack.shape)
    rank = largest(count, limit, min(LARGEST, math.prod(stack.shape)))
    return [{"rank": rank}] if rank else []


VERA = Method("vera", "VeRA", fit_vera, _parameters, _configurations)
