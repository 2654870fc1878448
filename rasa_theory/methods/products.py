"""Products with M in float64, seeded random numbers, and the leading terms that several methods start from."""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_theory.bounds import largest_terms, terms_among_largest
from rasa_theory.problem import LayerStack, RankBudget, RankOneTerms


def unit_of(stack: LayerStack, rank: int) -> LayerStack:
    """`stack.unit()` with directions for rank `rank`: from SVDs, or from products where layers are large."""
    return stack.with_spectra("auto", RankBudget(max(rank, 1), 0)).unit()


def right(stack: LayerStack, X: Tensor) -> Tensor:
    """M_i X in float64: X (a, n) or (L, a, n) -> (L, b, n)."""
    return stack.right(X.to(stack.dtype)).double()


def left(stack: LayerStack, Y: Tensor) -> Tensor:
    """M_i^T Y in float64: Y (b, n) or (L, b, n) -> (L, a, n)."""
    return stack.left(Y.to(stack.dtype)).double()


def seeded(stack: LayerStack, seed: int, *shape: int) -> Tensor:
    """Standard normal numbers in float64 on the device of the stack. They do not depend on the device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(stack.device)


def leading_terms(unit: LayerStack, count: int, seed: int) -> RankOneTerms:
    """The `count` largest singular terms of all layers, each used by its own layer alone.

    If all layers together have fewer terms, random ones that no layer uses fill up the rest.
    """
    U, S, Vh = terms_among_largest(unit, count)
    layer, index = largest_terms(S, count)
    missing = count - len(layer)
    D = S.new_zeros(unit.layers, count)
    D[layer, torch.arange(len(layer), device=S.device)] = S[layer, index]
    B = torch.cat([U[layer, :, index].mT, seeded(unit, 2 * seed, unit.shape[0], missing)], 1)
    A = torch.cat([Vh[layer, index], seeded(unit, 2 * seed + 1, missing, unit.shape[1])])
    return RankOneTerms(B, A, D)
