"""LoRA with one budget of ranks for all layers, spent on the layers that gain most."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rasa_theory.bounds import RankTarget, allocate_ranks, terms_among_largest
from rasa_theory.common import at_least
from rasa_theory.methods.fit import Evidence, Fit, Settings, UnitFit, measured
from rasa_theory.methods.method import Method, at_most
from rasa_theory.methods.products import unit_of
from rasa_theory.problem import LayerStack


def fit_allocated(stack: LayerStack, terms: int) -> Fit:
    """Minimise sum_i ||M_i - B_i A_i||_F^2 over factors and ranks r_i with sum_i r_i <= `terms`.

    By Eckart-Young each layer keeps its leading singular terms, and the largest sigma_ij of all layers lose least. This
    measures what unequal ranks alone are worth; AdaLoRA (Zhang et al., ICLR 2023) looks for such ranks in training.
    Stored: B_i (b, r_i) and A_i (r_i, a), so sum_i r_i (a + b) parameters. Terms with sigma_ij = 0 are not stored.

    Arguments:
        stack: the layers M_i, (L, b, a).
        terms: the largest sum of the ranks, from 1 to L min(b, a).

    Returns:
        A `Fit` with the minimum, in closed form.

    Raises:
        InputError: `terms` is out of its range.
    """
    at_most("terms", at_least("terms", terms, 1), stack.layers * min(stack.shape), stack)
    layers = largest_term_factors(unit_of(stack, math.ceil(terms / stack.layers)), terms)
    stored, rank = [factor for pair in layers for factor in pair], max(len(A) for _, A in layers)
    solution = UnitFit(lambda i: torch.mm(*layers[i]), tuple(stored), rank)
    return measured(stack, "allocated", {"terms": terms}, Evidence.CLOSED_FORM, solution)


def largest_term_factors(unit: LayerStack, terms: int) -> list[tuple[Tensor, Tensor]]:
    """Factors B_i (b, r_i) and A_i (r_i, a) of every layer that hold the `terms` largest singular terms of all layers.

    Terms with sigma_ij = 0 are left out.
    """
    U, S, Vh = terms_among_largest(unit, terms)
    cost = sum(unit.shape)
    [ranks] = allocate_ranks([S], [cost], RankTarget(parameters=terms * cost))
    return [(U[i, :, :n] * S[i, :n], Vh[i, :n]) for i, n in enumerate(ranks)]


def _parameters(layers: int, shape: tuple[int, int], terms: int) -> int:
    return terms * sum(shape)


def _configurations(stack: LayerStack, limit: int) -> list[Settings]:
    terms = min(limit // sum(stack.shape), stack.layers * min(stack.shape))
    return [{"terms": terms}] if terms else []


ALLOCATED = Method("allocated", "allocated", fit_allocated, _parameters, _configurations)
