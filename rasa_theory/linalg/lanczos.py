"""The leading part of one large matrix without its SVD, and a proved upper bound on the energy of any such part.

M is (b, a), G = M^T M with eigenvalues lambda_1 >= lambda_2 >= .., V (a, m) has orthonormal columns, Theta = V^T G V,
R = G V - V Theta, and E = M (I - V V^T). Everything except the search for V is in float64.

**The certificate.** Let ||E||_2^2 <= tau < t. Then, with C = Theta - t I + R^T R / (t - tau),

    sum_{j<=r} lambda_j <= r t + KF_r(C),    KF_r the sum of the r largest nonnegative eigenvalues.

Proof: G <= t I + V C V^T. In the basis [V, W], where W completes V to an orthonormal basis, the difference has the
blocks C + t I - Theta, -V^T G W and t I - W^T E^T E W >= (t - tau) I. So its Schur complement is at least
C + t I - Theta - R^T R / (t - tau) = 0. The sum of the r largest eigenvalues rises with the matrix, and the
eigenvalues of t I + V C V^T are t + eig(C), and t. No gap after r is needed, only tau < t. At t = theta_r the bound
exceeds the energy in V by about sum_{j<=r} ||R_j||^2 / (t - tau), which is quadratic in the residual.

**tau.** Omega (a, p) has independent normal entries, drawn after V. H = E^T E has the largest eigenvalue lambda with
unit eigenvector u. ||u^T Omega||^2 is chi^2_p: it falls below its quantile c with the allowed probability of failure.
Otherwise, for the Chebyshev polynomial T_k, Y_k = T_k(2 H / beta - I) Omega, any beta > 0, and lambda >= beta,

    ||E Y_k||_F >= sqrt(lambda) T_k(2 lambda / beta - 1) sqrt(c),

for every k and beta at once. Solving for lambda gives tau (or beta itself, if larger). Bounds from random vectors are
due to Dixon (SIAM J. Numer. Anal. 20, 1983), who uses powers of H. The polynomials give the rate of Kuczynski and
Wozniakowski (SIAM J. Matrix Anal. Appl. 13, 1992).

**Rounding.** g = max(b, a) eps exceeds the relative error, in norm, of a product of inner length at most max(b, a).
- V is orthonormal to sqrt(m) g in norm (checked), so each of Theta, R, ||M||^2 and the captured energy is off by less
  than 5 sqrt(m) g ||M||^2. KF_r changes by at most sqrt(r) times as much, so `ALLOWANCE` sqrt(r m) g ||M||^2 is taken
  off. R^T R, which is divided by t - tau, is replaced by 1.1 R^T R + 11 d^2 I, where d is the error of R.
- A product with E is off by at most kappa ||y||, kappa = 5 sqrt(m) g ||M||, hence one with H by
  kappa (sqrt(lambda) + kappa) ||y||, and a step of the recurrence by 8 (lambda / beta) s (1 + s) ||Y_j||,
  s = kappa / sqrt(beta). Such an error reaches Y_k through U_{k-1-j}, and (lambda / beta) U_{k-1-j} <= k T_k at
  2 lambda / beta - 1 >= 1. So sqrt(c) becomes sqrt(c) - 8 k s (1 + s) sum_{j<k} ||Y_j||, and ||E Y_k|| becomes
  ||E Y_k|| + kappa ||Y_k||.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import scipy.special
import torch
from torch import Tensor

from rasa_theory.linalg import dense, orthogonal
from rasa_theory.linalg.chebyshev import largest_argument
from rasa_theory.linalg.krylov import BlockLanczos, Operator
from rasa_theory.linalg.majorant import (
    ATTEMPTS,
    BETA_ABOVE_LAST,
    LARGEST_FORMED,
    LEAST_BETA,
    PROBES,
    SEARCH_SHARE,
    STEPS,
    Majorant,
)

ALLOWANCE = 20.0  # for rounding in the captured energy, see "Rounding" above

# The numbers below decide how often a certificate is reached and how much work it takes. None of them decides whether a
# certificate is valid: it holds for every V, every beta and every tau that `norm_bounds` yields.
_USEFUL_TAU = 0.1  # of the goal per rank: a tau below it is tried even if it is not below theta_r
_MEASURE_BELOW = 1e-7  # relative error below which it is measured: single precision, and norm^2 - captured, end here


class LeadingPart(NamedTuple):
    """Factors B (b, r) and A (r, a), A with orthonormal rows, and their error ||M - B A||_F^2.

    `low` and `high` enclose the least error of rank r. All three are squared. `majorant` is that of M^T M.
    """

    B: Tensor
    A: Tensor
    error: float
    low: float
    high: float
    majorant: Majorant


class RitzBasis(NamedTuple):
    """The matrices V (a, m), M V (b, m), Theta (m, m) and R^T R (m, m) of the certificate, see the module.

    theta (m,) holds the eigenvalues of Theta, falling, and S (m, m) its eigenvectors. deviation = ||V^T V - I||_F.
    """

    V: Tensor
    MV: Tensor
    Theta: Tensor
    RtR: Tensor
    theta: Tensor
    S: Tensor
    deviation: float


class Certificate(NamedTuple):
    """What is known of M from a basis: its leading terms hold the energy `captured`, and no others more than `most`.

    tau is at least ||E||_2^2, see the module.
    """

    basis: RitzBasis
    captured: float
    most: float
    tau: float


def _sizes(rank: int) -> tuple[int, int]:
    """The width of a block, and the number m of columns of V."""
    return rank + 8, 2 * (rank + 8)


def worth_it(shape: tuple[int, int], rank: int) -> bool:
    """True if (b, a) is so large against `rank` that `leading_part` may be faster than an SVD. Else it returns None."""
    return 4 * _sizes(rank)[1] <= min(shape)


# Why not simply iterate until the Ritz values settle? They would estimate the error, but a direction that the random
# start nearly misses would stay unseen, and nothing would tell. So the search is only a guess, in the precision of M.
# V is then made orthonormal in float64, and fresh random probes bound the norm of what V leaves out, with a known
# probability of failure. Longer polynomials usually give a lower tau, so they grow until the certificate meets the
# goal. If it does not, the search continues from where it stopped. After `ATTEMPTS` bases an SVD is taken instead, but
# for a large layer, where a certificate that is less close does.


def leading_part(
    M: Tensor,
    rank: int,
    goal: float,
    failure: float,
    generator: torch.Generator,
    probes: int = PROBES,
    tolerance: float = 1.0,
) -> LeadingPart | None:
    """A rank-`rank` approximation of M (b, a) in float64, with an error proved within `goal` ||M||^2 of the least.

    The interval low .. high misses the least error with probability `failure` at most, over `generator`. The result is
    None if the goal is not reached, or if M is too small for `worth_it`. Where M has more than `LARGEST_FORMED` rows
    and columns, an attempt that comes no closer than `tolerance` times the goal counts as well. The largest entry of M
    should be near 1.
    """
    b, a = M.shape
    width, columns = _sizes(rank)
    single, M = M.float(), M.double()
    norm_squared = float((torch.linalg.vector_norm(M, dim=1) ** 2).sum())
    if norm_squared == 0:
        return _zero_part(M, rank)
    if not worth_it((b, a), rank):
        return None
    tolerance = tolerance if min(b, a) > LARGEST_FORMED else 1.0
    precision = max(b, a) * float(torch.finfo(M.dtype).eps)
    allowance = ALLOWANCE * math.sqrt(rank * columns) * precision * norm_squared
    if 4 * allowance > tolerance * goal * norm_squared:
        return None
    goal = max(goal, 4 * allowance / norm_squared)
    quantile = 2 * float(scipy.special.gammaincinv(probes / 2, failure / ATTEMPTS))
    search = BlockLanczos(_gram(single, norm_squared), width, generator)
    best: Certificate | None = None
    least = tolerance * goal * norm_squared
    for _ in range(ATTEMPTS):
        if not search.run(rank, columns, SEARCH_SHARE * goal * norm_squared) and tolerance == 1:
            return None
        basis = ritz(M, search.vectors(columns).double())
        if not basis.deviation <= math.sqrt(columns) * precision:
            return None
        captured = float(basis.theta[:rank].sum())
        target, last = float(basis.theta[rank - 1]), float(basis.theta[-1])
        beta = max(last + BETA_ABOVE_LAST * (target - last), LEAST_BETA * goal * norm_squared / rank)
        omega = torch.randn(a, probes, generator=generator, dtype=M.dtype).to(M.device)
        for tau in norm_bounds(M, basis.V, omega, beta, quantile, math.sqrt(norm_squared)):
            useful = max(target, _USEFUL_TAU * goal * norm_squared / rank) if tolerance == 1 else math.inf
            if tau >= useful:
                continue
            most = most_captured(basis, rank, tau, 5 * math.sqrt(columns) * precision * norm_squared)
            excess = most - captured + 2 * allowance
            if excess <= least:
                best, least = Certificate(basis, captured, most, tau), excess
            if excess <= goal * norm_squared:
                break
        if best is not None:
            return _part(M, rank, best, norm_squared, allowance)
    return None


def _part(M: Tensor, rank: int, found: Certificate, norm_squared: float, allowance: float) -> LeadingPart:
    """The leading part that a certificate is for."""
    basis = found.basis
    B = basis.MV @ basis.S[:, :rank]
    A = (basis.V @ basis.S[:, :rank]).mT
    error = norm_squared - found.captured
    if error < _MEASURE_BELOW * norm_squared:
        B, A = _refined(M, B)
        error = float(((M - B @ A) ** 2).sum())
    low = max(norm_squared - found.most - allowance, 0.0)
    majorant = _majorant(basis, found.tau, norm_squared, max(M.shape))
    return LeadingPart(B, A, error, min(low, error), error + allowance, majorant)


def _zero_part(M: Tensor, rank: int) -> LeadingPart:
    """The leading part of zeros (b, a), in the directions of the axes."""
    V = torch.eye(M.shape[1], rank, dtype=M.dtype, device=M.device)
    nothing = Majorant(V, V.new_zeros(rank), V.new_zeros(rank, rank), 0.0, 0.0)
    return LeadingPart(V.new_zeros(M.shape[0], rank), V.mT, 0.0, 0.0, 0.0, nothing)


def leading_part_by_svd(M: Tensor, rank: int) -> LeadingPart:
    """The best approximation of M (b, a) in float64, from its SVD."""
    U, S, Vh = dense.svd(M)
    b, a = M.shape
    eps = float(torch.finfo(M.dtype).eps)
    norm = float(torch.linalg.vector_norm(S))
    error = float(dense.tail_energy(S, rank))
    low, high = dense.widened(error, dense.rounding(norm, (b, a), eps))
    tau = float(S[rank]) ** 2 if rank < len(S) else 0.0
    Vh = Vh[:rank].clone()  # without the other rows, which a view would keep
    V, theta = Vh.mT, S[:rank] ** 2
    rounding = ALLOWANCE * math.sqrt(rank) * max(b, a) * eps * norm**2
    majorant = Majorant(V, theta, S.new_zeros(len(theta), len(theta)), tau, rounding)
    return LeadingPart(U[:, :rank] * S[:rank], Vh, error, low, high, majorant)


def _majorant(basis: RitzBasis, tau: float, norm_squared: float, longest: int) -> Majorant:
    """The majorant that the certificate rests on, in the basis of the Ritz vectors."""
    columns = len(basis.theta)
    rounding = math.sqrt(columns) * longest * float(torch.finfo(basis.V.dtype).eps) * norm_squared
    eye = torch.eye(columns, dtype=basis.V.dtype, device=basis.V.device)
    square = 1.1 * basis.S.mT @ basis.RtR @ basis.S + 11 * (5 * rounding) ** 2 * eye
    return Majorant(basis.V @ basis.S, basis.theta, square, tau, ALLOWANCE * rounding)


def _refined(M: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """One step of subspace iteration in the precision of M."""
    V = orthogonal.thin_qr(dense.product(M.mT, B))[0]
    U, S, Wh = dense.svd(dense.product(M, V))
    return U * S, Wh @ V.mT


def most_captured(basis: RitzBasis, rank: int, tau: float, residual_error: float) -> float:
    """The certificate: an upper bound on sum_{j<=r} lambda_j if ||E||_2^2 <= tau, the better of two t."""
    eye = torch.eye(len(basis.theta), dtype=basis.Theta.dtype, device=basis.Theta.device)
    square = 1.1 * basis.RtR + 11 * residual_error**2 * eye
    leading = basis.S[:, :rank]
    balance = math.sqrt(float((leading * (square @ leading)).sum()) / rank)  # minimises r d + sum ||R_j||^2 / d
    gaps = {balance, float(basis.theta[rank - 1]) - tau}
    bounds = []
    for gap in (gap for gap in gaps if gap > 0):
        t = tau + gap
        C = basis.Theta - t * eye + square / gap
        bounds.append(rank * t + float(dense.ky_fan((C + C.mT) / 2, rank)))
    return min(bounds, default=math.inf)


def norm_bounds(M: Tensor, V: Tensor, omega: Tensor, beta: float, quantile: float, norm: float) -> Iterator[float]:
    """Upper bounds tau on ||M (I - V V^T)||_2^2 for k = 0, 1, ... All hold unless ||u^T omega||^2 < quantile.

    Each k costs one more product with M and one with M^T. A bound is inf where rounding permits no conclusion.
    """
    kappa = 5 * math.sqrt(V.shape[1]) * max(M.shape) * float(torch.finfo(M.dtype).eps) * norm
    s = kappa / math.sqrt(beta)
    before, Y = torch.zeros_like(omega), orthogonal.outside(V, omega)
    sizes = 0.0
    for k in range(STEPS + 1):
        size = float(torch.linalg.matrix_norm(Y))
        EY = dense.product(M, orthogonal.outside(V, Y))
        floor = math.sqrt(quantile) - 8 * k * s * (1 + s) * sizes
        value = (float(torch.linalg.matrix_norm(EY)) + kappa * size) / floor if floor > 0 else math.inf
        yield largest_argument(k, beta, value, 0.5)
        HY = orthogonal.outside(V, dense.product(M.mT, EY))
        before, Y = Y, (2 / beta) * HY - Y if k == 0 else (4 / beta) * HY - 2 * Y - before
        sizes += size


def _gram(M: Tensor, norm_squared: float) -> Operator:
    """M^T M, applied."""

    def apply(X: Tensor) -> Tensor:
        return dense.product(M.mT, dense.product(M, X))

    return Operator(apply, M.shape[1], norm_squared, 0.0, M.dtype, M.device, min(M.shape))


def ritz(M: Tensor, V: Tensor) -> RitzBasis:
    """Make V (a, m) orthonormal and compute the matrices of the certificate: one product with M, one with M^T."""
    V = orthogonal.thin_qr(V)[0]
    MV = dense.product(M, V)
    GV = dense.product(M.mT, MV)
    Theta = MV.mT @ MV
    R = orthogonal.outside(V, GV)
    theta, S = dense.symmetric_eigenpairs(Theta)
    eye = torch.eye(V.shape[1], dtype=V.dtype, device=V.device)
    deviation = float(torch.linalg.matrix_norm(V.mT @ V - eye))
    return RitzBasis(V, MV, Theta, R.mT @ R, theta.flip(0), S.flip(1), deviation)
