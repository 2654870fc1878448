"""Shared bases for the factors of given LoRAs, as of SHARE (arXiv 2602.06043), lorashare and vlora."""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.common import InputError, at_least, one_of
from rasa_theory.methods.fit import Evidence, Fit, Found, Method, fitted
from rasa_theory.methods.settings import Settings, at_most, largest
from rasa_theory.problem import LayerStack, LoraFactors, RankBudget, balanced, lora_parameters
from rasa_theory.solvers import solve_lora

BASES = ("columns", "whole")


def fit_share_basis(
    stack: LayerStack, rank: int, components: int, basis: str = "columns", factors: LoraFactors | None = None
) -> Fit:
    """Updates B^_i A^_i: the factors B_i (b, r), A_i (r, a) of LoRAs, each side projected on a basis of its own.

    The L LoRAs are `factors`, or else the optimum of rank r on the stack with b_j and a_j of equal norm. No side knows
    of the other: the error of the factors is minimised, not that of their product, which is what is reported here.

    - basis "columns" (SHARE, Kaushik et al., 2026; package lorashare 0.1.3): B^_i = U U^T B_i, U (b, p) the top p
      eigenvectors of the covariance of all columns of the B_i, their mean taken off; A_i likewise by rows.
      The mean is not stored, and is lost where the basis does not hold it. p (a + b) + 2 L r p parameters.
    - basis "whole" (package vlora-dev 1.0.0): every B_i is one vector of b r numbers, B^_i = mean + sum_j c_ij C_j, C_j
      (b, r) the top p principal components; A_i likewise. (p + 1) r (a + b) + 2 L p parameters.

    Raises InputError unless 1 <= rank <= min(b, a), 1 <= p, p at most b and a ("columns") or L ("whole"), and where
    `factors` are of another shape than stack and rank.
    """
    L, (b, a), p = stack.layers, stack.shape, at_least("components", components, 1)
    RankBudget(at_least("rank", rank, 1), 0).check_fits(stack)
    one_of("basis", basis, BASES)
    at_most("components", p, min(b, a) if basis == "columns" else L, stack)
    given = _own(stack, rank) if factors is None else _checked(stack, rank, factors)
    project = _columns if basis == "columns" else _whole
    (B, stored_B), (A, stored_A) = project(given.B, p), project(given.A.mT, p)
    found = Found(lambda i: B[i] @ A[i].mT, (*stored_B, *stored_A), min(rank, p) if basis == "columns" else rank)
    settings: Settings = {"rank": rank, "components": p, "basis": basis}
    return fitted(stack, "share_basis", settings, Evidence.OF_FACTORS, found)


def _own(stack: LayerStack, rank: int) -> LoraFactors:
    lora = solve_lora(stack.unit(), rank).factors.to(torch.float64)
    return LoraFactors(*balanced(lora.B, lora.A))


def _checked(stack: LayerStack, rank: int, factors: LoraFactors) -> LoraFactors:
    L, (b, a) = stack.layers, stack.shape
    found = tuple(factors.B.shape), tuple(factors.A.shape)
    if found != ((L, b, rank), (L, rank, a)):
        raise InputError(
            f"the LoRA factors have shapes {found[0]} and {found[1]}, stack {stack.name!r} and rank {rank} need "
            f"{(L, b, rank)} and {(L, rank, a)}"
        )
    root = stack.scale**0.5
    f = factors.to(torch.float64, stack.device)
    return LoraFactors(f.B / root, f.A / root)


def _columns(X: Tensor, p: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """X_i (L, n, r) -> U U^T X_i, and what is stored of it: U (n, p) and U^T X_i (L, p, r)."""
    columns = X.transpose(0, 1).flatten(1)  # (n, L r)
    centred = columns - columns.mean(1, keepdim=True)
    U = linalg.leading_eigenpairs(centred @ centred.mT, p)[1]
    loadings = U.mT @ X
    return U @ loadings, (U, loadings)


def _whole(X: Tensor, p: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """X_i (L, n, r) -> mean + sum_j c_ij C_j, and what is stored of it: the mean, C (p, n r) and c (L, p)."""
    vectors = X.flatten(1)
    mean = vectors.mean(0)
    C = linalg.svd(vectors - mean)[2][:p]
    loadings = (vectors - mean) @ C.mT
    return (mean + loadings @ C).reshape(X.shape), (mean, C, loadings)


def _configurations(stack: LayerStack, parameters: int) -> list[Settings]:
    """LoRAs of the rank that costs as much, and of twice that, compressed by half; no bases that hold all of them."""
    L, (b, a) = stack.layers, stack.shape
    own = largest(lambda r: lora_parameters(L, (b, a), r), parameters, min(b, a))
    found: list[Settings] = []
    for rank in sorted({max(own, 1), min(max(2 * own, 1), b, a)}):
        p = largest(lambda p, r=rank: p * (a + b + 2 * L * r), parameters, min(b, a, L * rank - 1))  # type: ignore[misc]
        whole = largest(lambda p, r=rank: (p + 1) * r * (a + b) + 2 * L * p, parameters, L - 2)  # type: ignore[misc]
        found += [{"rank": rank, "components": p, "basis": "columns"}] if p else []
        found += [{"rank": rank, "components": whole, "basis": "whole"}] if whole else []
    return found


SHARE_BASIS = Method(fit_share_basis, _configurations)
