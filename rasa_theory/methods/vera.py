"""VeRA: frozen random A and B, and two trained diagonals for each layer (arXiv 2310.11454)."""

from __future__ import annotations

import math

import torch

from rasa_theory.common import at_least
from rasa_theory.methods import diagonals
from rasa_theory.methods.access import right
from rasa_theory.methods.alternate import Steps, alternate
from rasa_theory.methods.diagonals import Diagonals
from rasa_theory.methods.fit import Evidence, Fit, Found, Method, fitted, residual
from rasa_theory.methods.settings import Settings, largest
from rasa_theory.problem import LayerStack

LARGEST = 1024  # tried in a comparison: each further number catches about 1 / (a b) of the energy, at r^3 operations


def fit_vera(stack: LayerStack, rank: int, seed: int = 0, max_sweeps: int = 8) -> Fit:
    """min sum_i ||M_i - diag(b_i) B diag(d_i) A||_F^2 over b_i, d_i: VeRA (Kopiczko et al., ICLR 2024).

    B (b, r) and A (r, a) are random, frozen, the same for all layers, drawn by Kaiming's uniform rule from `seed`, so
    that L (b + r) numbers are stored. Exact least squares for d_i and b_i in turn, from b_i = 1, so the best found for
    this draw; a rank of a b and more leaves nothing. Raises InputError if rank < 1.
    """
    L, b, unit = stack.layers, stack.shape[0], stack.unit()
    at_least("rank", rank, 1)
    B, A = _kaiming(unit, seed, rank)
    norms, MA = unit.layer_norms(torch.float64), right(unit, A.mT)
    start = Diagonals(B.new_ones(L, b), B, B.new_zeros(L, rank), A)

    def sweep(f: Diagonals) -> Diagonals:
        f = f._replace(u=torch.stack([diagonals.update_u(f, i, MA[i], norms[i]) for i in range(L)]))
        return f._replace(v=diagonals.update_v(f, MA, norms))

    steps = Steps(sweep, lambda f: residual(unit, f.update), diagonals.beyond)
    f, history = alternate(unit, steps, [start], at_least("max_sweeps", max_sweeps, 1))
    found = Found(f.update, (f.v, f.u), rank, history=history)
    return fitted(stack, "vera", {"rank": rank}, Evidence.BEST_FOUND, found)


def _kaiming(unit: LayerStack, seed: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (b, r) and A (r, a): uniform within sqrt(3 / columns), times a gain that the diagonals absorb."""
    generator, (b, a) = torch.Generator().manual_seed(seed), unit.shape
    shapes = ((b, rank), (rank, a))
    B, A = (torch.rand(*shape, generator=generator, dtype=torch.float64).to(unit.device) for shape in shapes)
    return (2 * B - 1) * math.sqrt(3 / rank), (2 * A - 1) * math.sqrt(3 / a)


def _configurations(stack: LayerStack, parameters: int) -> list[Settings]:
    L, (b, a) = stack.layers, stack.shape
    rank = largest(lambda r: L * (b + r), parameters, min(LARGEST, a * b))
    return [{"rank": rank}] if rank else []


VERA = Method(fit_vera, _configurations)
