"""Tied-LoRA: one A and one B for all layers, and two diagonals for each (arXiv 2311.09578)."""

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
from rasa_theory.methods.products import leading_terms, left, right, seeded, unit_of
from rasa_theory.problem import LayerStack


def fit_tied_lora(stack: LayerStack, rank: int, starts: int = 3, seed: int = 0, max_sweeps: int = 120) -> Fit:
    """Minimise sum_i ||M_i - diag(v_i) B diag(u_i) A||_F^2: Tied-LoRA (Renduchintala et al., NAACL 2024).

    This is the variant that trains all four: B (b, r), A (r, a), v_i (b) and u_i (r), so r (a + b) + L (b + r)
    parameters. Exact least squares for u_i, v_i, B and A alternate; each sweep begins at an extrapolated point.

    The starts are the leading singular terms of all layers, then the common row and column space, then random factors.
    There are many local minima, since the signs of v_i hardly change.

    Arguments:
        stack: the layers M_i, (L, b, a).
        rank: r, at least 1.
        starts: the number of starts, at least 1.
        seed: seed of the random starts.
        max_sweeps: the largest number of sweeps, at least 1.

    Returns:
        A `Fit` with the best solution.

    Raises:
        InputError: an argument is out of its range.
    """
    at_least("rank", rank, 1)
    at_least("starts", starts, 1)
    at_least("max_sweeps", max_sweeps, 1)
    unit = unit_of(stack, rank)
    norms = unit.layer_norms(torch.float64)
    makers = (_leading, _common, *[_random] * starts)[:starts]
    initial = [make(unit, rank, seed + 1000 * n) for n, make in enumerate(makers)]
    steps = Steps(lambda f: _sweep(unit, norms, f), lambda f: residual(unit, f.update), beyond)
    f, history = alternate(unit, steps, initial, max_sweeps, heat=20)
    return measured(
        stack, "tied_lora", {"rank": rank}, Evidence.BEST_FOUND, UnitFit(f.update, f, rank, history=history)
    )


def _sweep(unit: LayerStack, norms: Tensor, f: Diagonals) -> Diagonals:
    """One sweep: the exact minimisers u, v, B and A in turn, in two passes. `norms` (L,) are ||M_i||."""
    MA = right(unit, f.A.mT)  # (L, b, r)
    f = f.refit_u(MA, norms).refit_v(MA, norms)
    size = torch.sqrt((norms**2).sum()) + torch.sqrt((f.norms() ** 2).sum())
    f = f.refit_B(MA, size)
    f = f.refit_A(left(unit, f.scaled_B()).sum(0), size)
    return f.evened()


def _leading(unit: LayerStack, rank: int, seed: int) -> Diagonals:
    """The leading singular terms of all layers, each used by its own layer alone: all v_i = 1."""
    terms = leading_terms(unit, rank, seed)
    return Diagonals(terms.B.new_ones(unit.layers, len(terms.B)), terms.B, terms.D, terms.A).evened()


def _common(unit: LayerStack, rank: int, seed: int) -> Diagonals:
    """Random B and A in the leading common column and row space, which no layer uses yet: all v_i = 1 and u_i = 0."""
    f = _random(unit, rank, seed)
    n = min(rank, *unit.shape)
    U, V = (view.spectra.common(n) for view in (unit, unit.transpose()))
    return f._replace(B=U @ (U.mT @ f.B), A=(f.A @ V) @ V.mT).evened()


def _random(unit: LayerStack, rank: int, seed: int) -> Diagonals:
    """Random B and A in the whole space, which no layer uses yet: all v_i = 1 and u_i = 0."""
    L, (b, a) = unit.layers, unit.shape
    B, A = seeded(unit, 2 * seed, b, rank), seeded(unit, 2 * seed + 1, rank, a)
    return Diagonals(B.new_ones(L, b), B, B.new_zeros(L, rank), A).evened()


def _parameters(layers: int, shape: tuple[int, int], rank: int) -> int:
    return rank * sum(shape) + layers * (shape[0] + rank)


def _configurations(stack: LayerStack, limit: int) -> list[Settings]:
    count = functools.partial(_parameters, stack.layers, stack.shape)
    rank = largest(count, limit, math.prod(stack.shape))
    return [{"rank": rank}] if rank else []


TIED_LORA = Method("tied_lora", "Tied-LoRA", fit_tied_lora, _parameters, _configurations)
