"""Shared bases for the factors of LoRAs that exist already: SHARE (arXiv 2602.06043), lorashare and vlora."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.common import InputError, at_least, one_of
from rasa_theory.methods.fit import Evidence, Fit, Settings, UnitFit, measured
from rasa_theory.methods.method import Method, at_most, largest
from rasa_theory.problem import LayerStack, LoraFactors, RankBudget, balanced, lora_parameters
from rasa_theory.solvers import solve_lora

BASES = ("columns", "whole")


def fit_share_basis(
    stack: LayerStack, rank: int, components: int, basis: str = "columns", factors: LoraFactors | None = None
) -> Fit:
    """Project the factors B_i (b, r) and A_i (r, a) of L LoRAs on a basis for each side: updates B^_i A^_i.

    Each side is projected without regard to the other. The methods minimise the error of the factors; here the error of
    their product is measured.

    - basis "columns" (SHARE, Kaushik et al., 2026; package lorashare 0.1.3): B^_i = U U^T B_i. U (b, p) holds the top p
      eigenvectors of the covariance of all columns of the B_i, with their mean taken off; A_i likewise, by rows. The
      mean is not stored, and is lost where the basis does not hold it. p (a + b) + 2 L r p parameters.
    - basis "whole" (package vlora-dev 1.0.0): every B_i is one vector with b r entries, and
      B^_i = mean + sum_j c_ij C_j. The C_j (b, r) are the top p principal components; A_i likewise.
      (p + 1) r (a + b) + 2 L p parameters.

    Arguments:
        stack: the layers M_i, (L, b, a), from which the error is measured.
        rank: r, from 1 to min(b, a).
        components: p, from 1 to min(b, a) for "columns", and to L for "whole".
        basis: "columns" or "whole".
        factors: the LoRAs, in units of the stack. None: the optimum of rank r on the stack, with b_j and a_j of equal
            norm.

    Returns:
        A `Fit`, whose error is an upper bound on the minimum over all bases.

    Raises:
        InputError: an argument is out of its range, or the factors have another shape than stack and rank.
    """
    L, (b, a), p = stack.layers, stack.shape, at_least("components", components, 1)
    RankBudget(at_least("rank", rank, 1), 0).check_fits(stack)
    one_of("basis", basis, BASES)
    at_most("components", p, min(b, a) if basis == "columns" else L, stack)
    loras = _optimum(stack, rank) if factors is None else _in_units(stack, rank, factors)
    project = _project_columns if basis == "columns" else _project_whole
    B, stored_B = project(loras.B, p)
    A, stored_A = project(loras.A.mT, p)
    solution = UnitFit(lambda i: B[i] @ A[i].mT, (*stored_B, *stored_A), min(rank, p) if basis == "columns" else rank)
    settings: Settings = {"rank": rank, "components": p, "basis": basis}
    return measured(stack, "share_basis", settings, Evidence.OF_FACTORS, solution)


def _optimum(stack: LayerStack, rank: int) -> LoraFactors:
    lora = solve_lora(stack.unit(), rank).factors.to(torch.float64)
    return LoraFactors(*balanced(lora.B, lora.A))


def _in_units(stack: LayerStack, rank: int, factors: LoraFactors) -> LoraFactors:
    """The factors in units of `stack.unit()`, half of the scale taken from each side; raises for other shapes."""
    L, (b, a) = stack.layers, stack.shape
    shapes = tuple(factors.B.shape), tuple(factors.A.shape)
    if shapes != ((L, b, rank), (L, rank, a)):
        raise InputError(
            f"the LoRA factors have shapes {shapes[0]} and {shapes[1]}, stack {stack.name!r} and rank {rank} need "
            f"{(L, b, rank)} and {(L, rank, a)}"
        )
    root = stack.scale**0.5
    f = factors.to(torch.float64, stack.device)
    return LoraFactors(f.B / root, f.A / root)


def _project_columns(X: Tensor, p: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """X_i (L, n, r) -> U U^T X_i, and the tensors stored for it: U (n, p) and U^T X_i (L, p, r)."""
    columns = X.transpose(0, 1).flatten(1)  # (n, L r)
    centred = columns - columns.mean(1, keepdim=True)
    U = linalg.leading_eigenpairs(centred @ centred.mT, p)[1]
    loadings = U.mT @ X
    return U @ loadings, (U, loadings)


def _project_whole(X: Tensor, p: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """X_i (L, n, r) -> mean + sum_j c_ij C_j, and the tensors stored for it: the mean, C (p, n r) and c (L, p)."""
    vectors = X.flatten(1)
    mean = vectors.mean(0)
    C = linalg.svd(vectors - mean)[2][:p]
    loadings = (vectors - mean) @ C.mT
    return (mean + loadings @ C).reshape(X.shape), (mean, C, loadings)


def _parameters(layers: int, shape: tuple[int, int], rank: int, components: int, basis: str) -> int:
    if basis == "columns":
        return components * (sum(shape) + 2 * layers * rank)
    return (components + 1) * rank * sum(shape) + 2 * layers * components


def _configurations(stack: LayerStack, limit: int) -> list[Settings]:
    """LoRAs of the rank that fits uncompressed, and of twice that rank.

    Bases that hold all factors are left out, since they store the LoRAs and compress nothing: L r columns, and L - 1
    components beside the mean.
    """
    L, (b, a) = stack.layers, stack.shape
    own = largest(functools.partial(lora_parameters, L, (b, a)), limit, min(b, a))
    configurations: list[Settings] = []
    for rank in sorted({max(own, 1), min(max(2 * own, 1), b, a)}):
        for basis, most in (("columns", min(b, a, L * rank - 1)), ("whole", L - 2)):
            p = largest(functools.partial(_parameters, L, (b, a), rank, basis=basis), limit, most)
            if p:
                configurations.append({"rank": rank, "components": p, "basis": basis})
    return configurations


SHARE_BASIS = Method("share_basis", "SHARE", fit_share_basis, _parameters, _configurations)
