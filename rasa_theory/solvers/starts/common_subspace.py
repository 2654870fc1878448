"""The start from the column and row spaces that all layers have in common: exact without noise, near with noise."""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.distributed import LayerSharding
from rasa_theory.linalg import orthogonal
from rasa_theory.problem import (
    SVD,
    LayerStack,
    RankBudget,
    RankOneTerms,
    RasaFactors,
    mean_projector,
    projected,
    shared_subspace_spectrum,
    squared_error,
)
from rasa_theory.solvers import updates
from rasa_theory.solvers.starts.pencil import beside_pool, pencil_pool
from rasa_theory.solvers.starts.start import Start

_TRIES = 6  # random pencils, at most
_SWEEPS = 10  # of alternating least squares after each


def common_start(unit: LayerStack, budget: RankBudget, seed: int = 0) -> RasaFactors | None:
    """The factors themselves where M_i = B~_i A~_i + B_S D_i A_S exactly and generically, near them under noise.

    Needs L >= 2, k >= 1 and L q <= (L - 1) (min(b, a) - R). Every column space, of rank q + R, contains span(B_S).
    Modulo that, the private ones are L generic subspaces of dimension q in b - R. They have a common vector only if
    their codimensions L (b - R - q) fall short of b - R, so the condition says that they have none. Then the mean
    of the projectors has exactly R eigenvalues 1, with eigenvectors U_S that span B_S. Likewise V_S spans the rows of
    A_S. In the bases [U_S, U_i'] and [V_S, V_i'], U_i' and V_i' the q leading directions outside U_S and V_S,
        K_i = U_S^T M_i V_S - (U_S^T M_i V_i') (U_i'^T M_i V_i')^-1 (U_i'^T M_i V_S) = (U_S^T B_S) D_i (A_S V_S),
    since the pool is in the first block alone and the Schur complement of a matrix of rank q is 0. There remains a
    CP problem of size R x R x L: see `_solve_pool`.

    Under noise, directions count by their part above it: U_i in the mean projector with weight 1 - (e_i / sigma_ij)^2,
    e_i the next singular value after q + R; U_i' by energy, from (I - U_S U_S^T) U_i diag(sigma_i). Without noise
    neither changes anything. Without those weights a layer whose U_i'^T M_i V_i' is nearly singular can start so far
    off that its own terms stay in a local minimum.

    Recovery stops working where the condition fails. For k = r (plain CP) that is R > min(b, a). Otherwise private
    spaces meet outside the pool, and their common part passes for pool. Whenever L r <= min(b, a) the condition holds,
    since then (L - 1) (min(b, a) - R) >= (L - 1) L q. Pool terms that some layers do not use (d_ij = 0) have
    eigenvalues below 1 and are missed too: there `pencil_start` is exact, if b, a >= L r. Returns None where the
    conditions do not hold, or where every pencil is singular.
    """
    if not _fits(unit, budget):
        return None
    q, R, sharding = budget.private_rank, budget.pool_rank(unit.layers), unit.sharding
    svd, weights = _above_noise(unit, q + R)
    U_S, U_private = _split(svd.U, svd.S, weights, q, R, sharding)
    V_S, V_private = _split(svd.Vh.mT, svd.S, weights, q, R, sharding)
    K = projected(svd, U_S, V_S)
    if q > 0:
        corner = torch.linalg.pinv(projected(svd, U_private, V_private))
        K = K - projected(svd, U_S, V_private) @ corner @ projected(svd, U_private, V_S)
    pool = _solve_pool(sharding.all_gather(K), seed)
    return None if pool is None else beside_pool(unit, RankOneTerms(U_S @ pool.B, pool.A @ V_S.mT, pool.D), q)


def common_is_worth_racing(unit: LayerStack, budget: RankBudget) -> bool:
    """True if the layers share a direction on both sides.

    On each side the largest eigenvalue of the mean projector must pass the midpoint between the level of unrelated
    layers and 1.
    """
    if not _fits(unit, budget):
        return False
    spectrum = shared_subspace_spectrum(unit, budget.private_rank + budget.pool_rank(unit.layers))
    noise = linalg.rounding(1.0, unit.shape, unit.eps)
    sides = zip((spectrum.columns, spectrum.rows), spectrum.unrelated, strict=True)
    return all(float(values[0]) >= (1 + level) / 2 - noise for values, level in sides)


def _fits(unit: LayerStack, budget: RankBudget) -> bool:
    L, q, R = unit.layers, budget.private_rank, budget.pool_rank(unit.layers)
    is_separable = L * q <= (L - 1) * (min(unit.shape) - R)
    return L > 1 and R > 0 and is_separable and unit.norm_squared > 0


def _above_noise(unit: LayerStack, rank: int) -> tuple[SVD, Tensor]:
    """The leading `rank` singular terms of every layer, and the share of its energy by which each exceeds the next one.

    Weights (L, rank): 1 - (sigma_{i,rank+1} / sigma_ij)^2, and 0 for terms at rounding level.
    """
    U, S, Vh = unit.spectra.leading(rank)
    following = unit.spectra.following(rank)[:, None]
    floor = torch.maximum(following, linalg.rounding(1.0, unit.shape, unit.eps) * S[:, :1])
    weights = torch.where(floor < S, 1 - (following / torch.where(S > 0, S, 1)) ** 2, 0)
    return SVD(U, S, Vh), weights


def _split(U: Tensor, S: Tensor, weights: Tensor, q: int, R: int, sharding: LayerSharding) -> tuple[Tensor, Tensor]:
    """U_S (b, R), the directions most in common, and U_i' (L, b, q), the leading ones of M_i outside them."""
    U_S = mean_projector(sharding.all_gather(U * weights.sqrt()[:, None]))[1][:, :R]
    outside = orthogonal.outside(U_S, U) * S[:, None]
    return U_S, linalg.svd(outside)[0][:, :, :q]


def _solve_pool(K: Tensor, seed: int) -> RankOneTerms | None:
    """B, A and D with K_i = B D_i A for all i, (L, R, R), as well as possible; None if all pencils are singular.

    The best of several pencils, each with a few sweeps. With L >= 2 and generic terms every pencil gives the exact
    answer if there is one.
    """
    generator = torch.Generator().manual_seed(seed)
    none = K.new_zeros(*K.shape[:2], 0)
    stack = LayerStack(K)
    norms = stack.layer_norms(K.dtype)
    best, lowest = None, torch.inf
    for _ in range(_TRIES):
        pool = pencil_pool(K, 0, generator)
        if pool is None:
            continue
        factors, error = _sweeps(stack, norms, RasaFactors(none, none.mT, *pool).normalised())
        if error < lowest:
            best, lowest = factors, error
        if lowest**0.5 <= stack.rounding:
            break
    return None if best is None else RankOneTerms(best.shared_B, best.shared_A, best.mixing)


def _sweeps(stack: LayerStack, norms: Tensor, factors: RasaFactors) -> tuple[RasaFactors, float]:
    """The factors after alternating least squares for D, B_S and A_S, no private terms, and their squared error."""
    for _ in range(_SWEEPS):
        for side in (stack, stack.transpose()):
            products = side.right(factors.shared_A.mT)
            factors = updates.update_mixing(products, norms, factors)
            factors = updates.update_shared_B(products, norms, factors).transpose()
        error = squared_error(stack, factors)
        if error**0.5 <= stack.rounding:
            break
    return factors, error


COMMON = Start("common", common_start, is_worth_racing=common_is_worth_racing)
