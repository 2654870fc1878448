"""The exact block updates, one per equation: (products with M, factors) -> factors.

E_i = M_i - B~_i A~_i - B_S D_i A_S is the residual, `*` the elementwise product. Every update is an *increment* from
the residual by `linalg.solve_increment`, so that the error never rises, even where directions of a singular Gram
matrix are dropped. All are written for the B side; the A side is the same update of the transposed stack and factors.
Nothing here knows of time, stopping or devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.distributed import LayerSharding
from rasa_theory.linalg import Algebra, Checked, batched, lanczos
from rasa_theory.problem import LayerStack, RasaFactors, scale_into_mixing
from rasa_theory.solvers.accuracy import layer_term_norms, residual_noise

_CHECKED = Checked()
_PRIVATE_GOAL = 1e-8  # of ||E||^2: what a private SVD from products may leave more than the best one
_PRIVATE_FAILURE = 1e-10  # the probability that it leaves more


def update_private(stack: LayerStack, factors: RasaFactors, exact: bool = False) -> RasaFactors:
    """B~_i A~_i = the best rank-q approximation of M_i - B_S D_i A_S, for every i: the paper's SVD step.

    The one update that needs M itself. `exact` takes full SVDs; otherwise `linalg.best_low_rank` decides.
    """
    b, q = stack.shape[0], factors.private_B.shape[2]
    if q == 0:
        return factors
    B_S, A_S, D = factors.shared_B, factors.shared_A, factors.mixing
    Bt, At = torch.empty_like(factors.private_B), torch.empty_like(factors.private_A)
    for i, _, M in stack.tiles(rows=b):
        E = M - (B_S * D[i]) @ A_S
        part = _by_products(E, q) if stack.spectra.is_leading and not exact else None
        Bt[i], At[i] = linalg.best_low_rank(E, q, exact=exact) if part is None else part
    return dataclasses.replace(factors, private_B=Bt, private_A=At)


def _by_products(E: Tensor, q: int) -> tuple[Tensor, Tensor] | None:
    """The best rank-q approximation of E from products, to rounding; None where only a decomposition can tell."""
    size = 2.0 ** math.frexp(float(E.abs().max()))[1]
    part = lanczos.leading_part(E / size, q, _PRIVATE_GOAL, _PRIVATE_FAILURE, torch.Generator().manual_seed(0))
    return None if part is None else ((part.B * size).to(E), part.A.to(E))


def with_private_terms(stack: LayerStack, factors: RasaFactors) -> RasaFactors:
    """Return `factors`. If all private terms are zero, set them by `update_private` first: sweeps need row spaces."""
    private = factors.private_A.abs().amax((1, 2)) if factors.private_A.shape[1] else factors.mixing.new_zeros(0)
    return update_private(stack, factors) if factors.sharding.all_reduce_max(private) == 0 else factors


def mixing_system(MA: Tensor, factors: RasaFactors) -> tuple[Tensor, Tensor]:
    """G = B_S^T B_S * A_S A_S^T (R, R) and g_i = diag(B_S^T E_i A_S^T) as rows (L, R), from MA_i = M_i A_S^T.

    Along d_i + x the error is ||E_i||^2 - 2 x^T g_i + x^T G x.
    """
    Bt, At, B_S, A_S, D = factors.named().values()
    G = (B_S.mT @ B_S) * (A_S @ A_S.mT)
    g = (B_S * MA).sum(1) - ((B_S.mT @ Bt) * (A_S @ At.mT)).sum(2) - D @ G
    return G, g


def update_mixing(MA: Tensor, layer_norms: Tensor, factors: RasaFactors) -> RasaFactors:
    """Minimise over every D_i, the other factors held fixed.

    Adds to d_i the solution of (B_S^T B_S * A_S A_S^T) x = diag(B_S^T E_i A_S^T). MA_i = M_i A_S^T, (L, b, R);
    `layer_norms` (L,) are the ||M_i||. Pool columns are of unit norm.
    """
    G, g = mixing_system(MA, factors)
    noise = residual_noise(layer_norms + layer_term_norms(factors), factors)[:, None]

    def no_measure(x: Tensor) -> Tensor:
        return x.new_zeros(())

    step, _ = linalg.solve_layers(G[None], g[..., None], G.diagonal(), noise, factors.sharding, no_measure)
    return dataclasses.replace(factors, mixing=factors.mixing + step[..., 0])


def update_shared_B(MA: Tensor, layer_norms: Tensor, factors: RasaFactors) -> RasaFactors:
    """Minimise over B_S, the other factors held fixed.

    Adds to B_S the solution X of X [(A_S A_S^T) * (D^T D)] = sum_i E_i A_S^T D_i. MA_i = M_i A_S^T, (L, b, R);
    `layer_norms` (L,) are the ||M_i||. Pool columns are of unit norm before and after.
    """
    Bt, At, B_S, A_S, D = factors.named().values()
    AA = A_S @ A_S.mT  # (R, R)
    EA = MA - Bt @ (A_S @ At.mT).mT - (B_S * D[:, None]) @ AA  # (L, b, R): E_i A_S^T
    noise = residual_noise(layer_norms + layer_term_norms(factors), factors)[:, None]
    G, g, noise = factors.sharding.all_reduce_together(  # (R, R), (b, R), (R,)
        AA * batched.outer(D[..., None], D[..., None]), batched.weighted(EA, D), batched.total(noise * D.abs())
    )
    X = linalg.solve_increment(G, g.mT, G.diagonal(), math.sqrt(len(g)) * noise).mT
    return dataclasses.replace(factors, shared_B=B_S + X).normalised()


Product = Callable[[Tensor], Tensor]


class JointHalf(NamedTuple):
    """Factors after a half or a whole joint sweep, and their squared error from the products alone."""

    factors: RasaFactors
    error: Tensor


class HalfProducts(NamedTuple):
    """Products in both problems of a joint half; A~_i (q, a), orthonormal rows, and A_S (R, a) are fixed.

    MA_i = M_i A_S^T (L, b, R), MAt_i = M_i A~_i^T (L, b, q), W_i = A_S A~_i^T (L, R, q), AA = A_S A_S^T (R, R),
    C_i = AA - W_i W_i^T (L, R, R), or (1, R, R) if q = 0; `noise` (L, 1) is the rounding of u^T E_i v for unit u, v.
    """

    MA: Tensor
    MAt: Tensor
    W: Tensor
    AA: Tensor
    C: Tensor
    noise: Tensor
    sharding: LayerSharding


def joint_half(
    MA: Tensor,
    MAt: Tensor,
    layer_norms: Tensor,
    factors: RasaFactors,
    leading: int | None = None,
    algebra: Algebra = _CHECKED,
) -> JointHalf:
    """With A~_i and A_S fixed: minimise over B_S and all B~_i at once, then over all D_i and B~_i.

    The rows of A~_i are orthonormal, columns of B_S and rows of A_S of unit norm; B~_i is not read. MA_i = M_i A_S^T
    (L, b, R), MAt_i = M_i A~_i^T (L, b, q). With `leading`, only that many rows of B_S move: each row is a
    least-squares problem of its own.
    """
    # The block updates of the paper crawl where a pool term and a private one nearly agree, since each can only move
    # as far as the other lets it. Here the private terms are eliminated. For fixed A~_i the best B~_i is
    # (M_i - B_S D_i A_S) A~_i^T whatever B_S and D_i are, and it leaves the residual product
    #     E_i A_S^T = P_i - B_S D_i C_i,    P_i = M_i A_S^T - (M_i A~_i^T) W_i^T,
    # so that the rest is two linear problems: `solve_pool_side` and `solve_mixing_side`. P_i is never formed: writing
    # an (L, b, R) array takes as long as the product itself.
    _, At, B_S, A_S, D = factors.named().values()
    W = A_S @ At.mT
    AA = A_S @ A_S.mT
    C = AA - W @ W.mT if W.shape[2] else AA[None]
    noise = residual_noise(2 * layer_norms + D.abs().sum(1), factors)[:, None]  # ||M_i A~_i^T|| <= ||M_i||
    products = HalfProducts(MA, MAt, W, AA, C, noise, factors.sharding)
    B_S, D = solve_pool_side(products, B_S, D, leading, algebra)
    D, error = solve_mixing_side(products, B_S, D, layer_norms, algebra)
    private_B = MAt - batched.each(B_S, D[:, :, None] * W)
    return JointHalf(dataclasses.replace(factors, private_B=private_B, shared_B=B_S, mixing=D), error)


def solve_pool_side(
    products: HalfProducts, B_S: Tensor, D: Tensor, leading: int | None, algebra: Algebra
) -> tuple[Tensor, Tensor]:
    """B_S (b, R) with unit columns and D (L, R), after minimising over the leading rows of B_S and all B~_i.

    Adds to B_S the solution X of X G = sum_i P_i D_i - B_S G, G = sum_i D_i C_i D_i (R, R).
    """
    MA, MAt, W, AA, _, noise, sharding = products
    DW = D[:, :, None] * W  # (L, R, q)
    G, PD, size, noise_B = sharding.all_reduce_together(  # (R, R), (b, R), (R,), (R,)
        AA * batched.outer(D[..., None], D[..., None]) - batched.outer(DW, DW),
        (batched.weighted(MA, D) - batched.outer(MAt, DW))[:leading],
        batched.total(D * D),
        batched.total(noise * D.abs()),
    )
    g = PD - (B_S @ G)[:leading]  # (b, R)
    X = algebra.solve_increment(G, g.mT, size, math.sqrt(len(g)) * noise_B).mT
    return scale_into_mixing(B_S + torch.nn.functional.pad(X, (0, 0, 0, len(B_S) - len(X))), D)


def solve_mixing_side(
    products: HalfProducts, B_S: Tensor, D: Tensor, layer_norms: Tensor, algebra: Algebra
) -> tuple[Tensor, Tensor]:
    """D (L, R) after minimising over all d_i and B~_i, and the squared error of the result.

    Adds to d_i the solution of G_i x = p_i - G_i d_i, G_i = B_S^T B_S * C_i (R, R), p_i = diag(B_S^T P_i). The error is
    sum_i ||M_i||^2 - ||M_i A~_i^T||^2 - 2 d_i . p_i + d_i^T G_i d_i, exact to a few eps (||M||^2 + the squared norms of
    the terms).
    """
    MA, MAt, W, _, C, noise, sharding = products
    G = (B_S.mT @ B_S) * C  # (L, R, R)
    p = column_products(B_S, MA) - ((B_S.mT @ MAt) * W).sum(2)  # (L, R)
    g = p - (G @ D[..., None])[..., 0]  # (L, R)
    private_energy = (MAt * MAt).sum((1, 2))  # (L,)

    def error_after(x: Tensor) -> Tensor:
        d = D + x[..., 0]
        explained = private_energy + (d * (2 * p - (G @ d[..., None])[..., 0])).sum(1)  # (L,)
        return batched.total(layer_norms**2 - explained)

    x, error = algebra.solve_layers(G, g[..., None], D.new_ones(D.shape[1]), noise, sharding, error_after)
    return D + x[..., 0], error


def column_products(B: Tensor, X: Tensor) -> Tensor:
    """diag(B^T X_i): (n, m), (L, n, m) -> (L, m)."""
    products = X.new_zeros(X.shape[0], X.shape[2])
    for rows in batched.row_blocks(X):
        products += (B[rows] * X[:, rows]).sum(1)
    return products


def joint_sweep(
    sides: tuple[Product, Product],
    layer_norms: Tensor,
    factors: RasaFactors,
    leading: tuple[int | None, int | None] = (None, None),
    algebra: Algebra = _CHECKED,
) -> JointHalf:
    """`joint_half` on the B side and then on the A side, each with one product: `sides` are X -> M_i X and M_i^T X.

    `leading` are the numbers of rows of B_S and of columns of A_S that may move; None: all.
    """
    error = layer_norms.new_zeros(())
    for multiply, rows in zip(sides, leading, strict=True):
        held, R = factors.mixing.shape
        Q = algebra.orthonormal(factors.private_A.mT)  # (L, a, q)
        A_S = factors.shared_A.expand(held, -1, -1)
        products = multiply((torch.cat([A_S, Q.mT], 1) if Q.shape[2] else A_S).mT)  # (L, b, R + q)
        factors = dataclasses.replace(factors, private_A=Q.mT)  # B~_i follows from the others
        half = joint_half(products[:, :, :R], products[:, :, R:], layer_norms, factors, rows, algebra)
        factors, error = half.factors.transpose(), half.error
    return JointHalf(factors, error)
