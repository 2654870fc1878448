"""The exact block updates, one per equation: (products with M, factors) -> factors.

E_i = M_i - B~_i A~_i - B_S D_i A_S is the residual, `*` the elementwise product. Every update is an *increment* from
the residual by `linalg.solve_increment`, so that the error never rises, whatever a singular Gram matrix makes it drop.
All are written for the B side; the A side is the same update of the transposed stack and factors.
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
from rasa_theory.linalg import batched
from rasa_theory.linalg.recording import Algebra, Checked
from rasa_theory.problem.factors import RasaFactors
from rasa_theory.problem.residual import reconstruction_error
from rasa_theory.problem.stack import LayerStack

_CHECKED = Checked()


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
        Bt[i], At[i] = linalg.best_low_rank(M - (B_S * D[i]) @ A_S, q, exact=exact)
    return dataclasses.replace(factors, private_B=Bt, private_A=At)


def normalise_pool(factors: RasaFactors) -> RasaFactors:
    """The same updates with unit columns in B_S and unit rows in A_S, their scale in D; zero columns stay zero."""
    B_S, D = _unit_columns(factors.shared_B, factors.mixing)
    A_S, D = _unit_columns(factors.shared_A.mT, D)
    return dataclasses.replace(factors, shared_B=B_S, shared_A=A_S.mT, mixing=D)


def _unit_columns(X: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """X (n, R) with unit columns, and D (L, R) with their norms; zero columns stay zero."""
    norms = torch.linalg.vector_norm(X, dim=0)
    return X / torch.where(norms > 0, norms, 1), D * norms


def _pool_term_norms(factors: RasaFactors) -> Tensor:
    """|d_ij| ||b_j|| ||a_j||: (L, R)."""
    nB = torch.linalg.vector_norm(factors.shared_B, dim=0)
    nA = torch.linalg.vector_norm(factors.shared_A, dim=1)
    norms: Tensor = factors.mixing.abs() * (nB * nA)
    return norms


def term_norms(factors: RasaFactors) -> Tensor:
    """Per layer, the sum of the norms of its pool terms, sum_j |d_ij| ||b_j|| ||a_j||: (L,)."""
    return _pool_term_norms(factors).sum(1)


def layer_term_norms(factors: RasaFactors) -> Tensor:
    """Per layer, ||B~_i|| ||A~_i|| plus the norms of its pool terms: (L,)."""
    private: Tensor = torch.linalg.matrix_norm(factors.private_B) * torch.linalg.matrix_norm(factors.private_A)
    return private + term_norms(factors)


def cancellation(stack: LayerStack, factors: RasaFactors) -> float:
    """The largest norm of B~_i A~_i or of a pool term d_ij b_j a_j^T in any layer, over ||M_i||.

    At most about 1 where nothing cancels. A layer whose norm is within rounding of 0 counts as if it had that norm.
    """
    f = factors.scaled(1 / stack.scale)
    norms = stack.unit().layer_norms(torch.float64).clamp_min(stack.unit().rounding)
    private = ((f.private_B.mT @ f.private_B) * (f.private_A @ f.private_A.mT)).sum((1, 2)).clamp_min(0).sqrt()
    terms = torch.cat([private[:, None], _pool_term_norms(f)], 1).amax(1)
    return factors.spread.largest(terms / torch.where(norms > 0, norms, 1))


def term_size(stack: LayerStack, factors: RasaFactors) -> float:
    """||M|| plus the norms of all terms of the updates: in units of norm, larger than ||M|| where terms cancel."""
    squares = layer_term_norms(factors.to(dtype=torch.float64).scaled(1 / stack.scale)) ** 2
    terms = factors.spread.total(batched.total(squares))
    return (math.sqrt(stack.unit().norm_squared) + math.sqrt(float(terms))) * stack.scale


def measurable(stack: LayerStack, factors: RasaFactors, eps: float | None = None) -> float:
    """The tolerance of an error measured at `factors`, in units of norm.

    Updates are known to eps times the size of their terms, not of their sum: `stack.rounding` where no terms cancel.
    `eps` is the stack's unless another precision was used.
    """
    return linalg.rounding(term_size(stack, factors), stack.shape, stack.eps if eps is None else eps)


def trusted_error(unit: LayerStack, factors: RasaFactors, error: float) -> float:
    """A squared error that was put together from products, unless rounding could show in it: then the direct residual.

    An error of eps T, with T the squared norms of M and of the pool's terms (a private term is at most as large as
    M_i), stays below `LayerStack.rounding` in norm as long as T <= 20 max(b, a) ||M|| ||E||. From a fifth of that on
    the residual is taken, one pass more.
    """
    norm = math.sqrt(unit.norm_squared)
    size = norm**2 + float(factors.spread.total(batched.total(term_norms(factors) ** 2)))
    if size <= 4 * max(unit.shape) * norm * math.sqrt(max(error, 0.0)):
        return error
    return reconstruction_error(unit, factors)


def residual_noise(sizes: Tensor, factors: RasaFactors) -> Tensor:
    """Rounding error of b^T E_i a for unit b, a, when it is put together from products: (L,).

    `sizes` (L,) are ||M_i|| + ||B~_i A~_i|| + sum_j |d_ij| ||b_j|| ||a_j||, or more: three terms, each a sum over b or
    a entries whose rounding errors add up like their square root; 4 covers the several products that lead to each. Too
    small a value is not harmless: in a direction of eigenvalue w an error e of g taken for signal costs e^2 / w.
    """
    b, a = factors.shared_B.shape[0], factors.shared_A.shape[1]
    return 4 * math.sqrt(max(b, a)) * float(torch.finfo(factors.mixing.dtype).eps) * sizes


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
    none = noise.new_zeros(())
    step, _ = linalg.solve_layers(G[None], g[..., None], G.diagonal(), noise, factors.spread, lambda _: none)
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
    G, g, noise = factors.spread.totals(  # (R, R), (b, R), (R,)
        AA * batched.outer(D[..., None], D[..., None]), batched.weighted(EA, D), batched.total(noise * D.abs())
    )
    X = linalg.solve_increment(G, g.mT, G.diagonal(), math.sqrt(len(g)) * noise).mT
    return normalise_pool(dataclasses.replace(factors, shared_B=B_S + X))


Product = Callable[[Tensor], Tensor]


class JointHalf(NamedTuple):
    """Factors after one half of a joint sweep, or both, and their squared error from the products alone."""

    factors: RasaFactors
    error: Tensor


def joint_half(
    MA: Tensor,
    MAt: Tensor,
    layer_norms: Tensor,
    factors: RasaFactors,
    leading: int | None = None,
    algebra: Algebra = _CHECKED,
) -> JointHalf:
    """Minimise over B_S and all B~_i at once, then over all B~_i and D_i, A~_i and A_S held fixed.

    With `leading`, only so many rows of B_S move (the least-squares problem falls apart into rows).

    The rows of A~_i are orthonormal, pool columns of unit norm; B~_i is not read. MA_i = M_i A_S^T (L, b, R), MAt_i =
    M_i A~_i^T (L, b, q). With W_i = A_S A~_i^T and C_i = A_S A_S^T - W_i W_i^T, the best B~_i is (M_i - B_S D_i A_S)
    A~_i^T whatever B_S and D_i are; what it leaves has the residual product E_i A_S^T = P_i - B_S D_i C_i with P_i =
    M_i A_S^T - (M_i A~_i^T) W_i^T, so that
        (increment of B_S) sum_i D_i C_i D_i = sum_i P_i D_i - B_S sum_i D_i C_i D_i,
        (B_S^T B_S * C_i) (increment of d_i) = diag(B_S^T P_i) - (B_S^T B_S * C_i) d_i.
    No P_i is formed. The error of the result is ||M||^2 - sum_i ||M_i A~_i^T||^2 - 2 sum_i d_i . diag(B_S^T P_i)
    + sum_i d_i^T (B_S^T B_S * C_i) d_i, exact to a few eps (||M||^2 + the squared norms of the terms).
    """
    _, At, B_S, A_S, D = factors.named().values()
    W = A_S @ At.mT  # (L, R, q)
    AA = A_S @ A_S.mT
    C = AA - W @ W.mT if W.shape[2] else AA[None]  # (L, R, R), or the same for all layers
    noise = residual_noise(2 * layer_norms + D.abs().sum(1), factors)[:, None]  # (L, 1); ||M_i A~_i^T|| <= ||M_i||

    DW = D[:, :, None] * W  # (L, R, q)
    G, g, size, noise_B = factors.spread.totals(  # (R, R), (b, R), (R,), (R,)
        AA * batched.outer(D[..., None], D[..., None]) - batched.outer(DW, DW),
        (batched.weighted(MA, D) - batched.outer(MAt, DW))[:leading],
        batched.total(D * D),
        batched.total(noise * D.abs()),
    )
    g = g - (B_S @ G)[:leading]
    X = algebra.solve_increment(G, g.mT, size, math.sqrt(len(g)) * noise_B).mT
    B_S, D = _unit_columns(B_S + torch.nn.functional.pad(X, (0, 0, 0, len(B_S) - len(X))), D)

    G = (B_S.mT @ B_S) * C  # (L, R, R)
    p = column_products(B_S, MA) - ((B_S.mT @ MAt) * W).sum(2)  # (L, R): diag(B_S^T P_i)
    g = p - (G @ D[..., None])[..., 0]
    before, energy = D, (MAt * MAt).sum((1, 2))

    def remaining(x: Tensor) -> Tensor:
        D = before + x[..., 0]
        explained = energy + (D * (2 * p - (G @ D[..., None])[..., 0])).sum(1)  # (L,)
        return batched.total(layer_norms**2 - explained)

    x, error = algebra.solve_layers(G, g[..., None], torch.ones_like(size), noise, factors.spread, remaining)
    D = before + x[..., 0]
    private_B = MAt - batched.each(B_S, D[:, :, None] * W)
    return JointHalf(dataclasses.replace(factors, private_B=private_B, shared_B=B_S, mixing=D), error)


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

    `leading` says how many rows of B_S, and columns of A_S, may move.
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


def resolve_mixing(stack: LayerStack, factors: RasaFactors) -> tuple[RasaFactors, float]:
    """The same factors with D re-solved, in float64, and a certified drop of the squared error: see `mixing_drop`.

    Reads M twice.
    """
    unit = stack.unit()
    factors = normalise_pool(factors.to(torch.float64, stack.device).scaled(1 / stack.scale))
    MA = torch.zeros(factors.spread.held, *factors.shared_B.shape, dtype=torch.float64, device=stack.device)
    for tile in unit.tiles():
        MA[tile.layer, tile.rows] = tile.values.double() @ factors.shared_A.mT
    norms = unit.layer_norms(torch.float64)
    solved = update_mixing(MA, norms, factors)
    return solved.scaled(stack.scale), _certified_drop(unit, norms, factors, solved) * stack.scale**2


def _certified_drop(unit: LayerStack, layer_norms: Tensor, factors: RasaFactors, solved: RasaFactors) -> float:
    """sum_i <2 E_i - X_i, X_i> for the change X_i = B_S diag(x_i) A_S of update i, less its rounding; at least 0.

    That is sum_i 2 x_i^T g_i - x_i^T G x_i, but where pool terms nearly cancel in X_i their rounding counts once, not
    squared: X_i is known to eps sum_j |x_ij| in norm, E_i to eps times the size of its own terms.
    """
    x = solved.mixing - factors.mixing
    drop, E2, X2 = (torch.zeros(factors.spread.held, dtype=torch.float64) for _ in range(3))
    for i, rows, M in unit.tiles():
        E = M.double() - factors.update(i, rows)
        X = (factors.shared_B[rows] * x[i]) @ factors.shared_A
        for sums, values in ((drop, (2 * E - X) * X), (E2, E * E), (X2, X * X)):
            sums[i] += float(values.sum())
    E_norm, X_norm = E2.sqrt(), X2.sqrt()
    sizes = (layer_norms + layer_term_norms(factors)).cpu()
    error = 2 * (E_norm + X_norm) * x.abs().sum(1).cpu() + 2 * sizes * X_norm
    eps = torch.finfo(torch.float64).eps
    drops, errors = factors.spread.totals(batched.total(drop), batched.total(error))
    return max(float(drops) - linalg.rounding(float(errors), unit.shape, eps), 0.0)


def drop_allowance(stack: LayerStack, factors: RasaFactors, before: float, solved: RasaFactors, after: float) -> float:
    """How far before - after may be from the drop that `resolve_mixing` certifies, squared.

    With m the sum of what errors at `factors` and `solved` are known to in norm (`measurable`, in float64): the two
    errors are off by at most 2 sqrt(before) m, 2 sqrt(after) m and m^2 in all, the drop by its own allowance, whose
    ||X|| is at most sqrt(before) + sqrt(after) and whose terms are those of m: 6 (sqrt(before) + sqrt(after)) m.
    """
    eps = torch.finfo(torch.float64).eps
    m = measurable(stack, factors, eps) + measurable(stack, solved, eps)
    return 8 * (math.sqrt(before) + math.sqrt(after)) * m + m**2


def mixing_drop(stack: LayerStack, factors: RasaFactors) -> float:
    """By how much re-solving D alone lowers the squared error of `factors`, in closed form, less its rounding.

    sum_i g_i^T (B_S^T B_S * A_S A_S^T)^+ g_i with g_i = diag(B_S^T E_i A_S^T). Directions whose g is rounding noise, or
    in which the Gram matrix is numerically singular, count as 0. At the LoRA embedding of Theorem 3.1 it is a lower
    bound on e_lora - e_rasa(k), and it shows that the inequality is strict without subtracting two large numbers.
    """
    return resolve_mixing(stack, factors)[1]
