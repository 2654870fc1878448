"""Orthonormal bases of thin matrices and of batches of them, and the completion of such bases."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from rasa_theory.linalg import dense
from rasa_theory.linalg.threads import suitable_threads

# A direction counts as dependent if less than _DEPENDENT eps of a unit column is left outside the others. Rounding
# leaves a few eps of a column that truly depends on them. A larger limit would lose columns at small angles: in float32
# two pool terms at an angle of 3e-5 are still two directions.
_DEPENDENT = 100

# Random columns take the place of dependent ones. They may depend on the others, too: a basis that grew for many rounds
# holds the columns of the same seeds from earlier ones. Each attempt takes the next seed.
_ATTEMPTS = 50

# The second pass of `cholesky_qr` mends the first if Q^T Q is within 1/2 of I, in the Frobenius norm. The condition of
# Q^T Q is then at most 3, so its Cholesky factorisation cannot fail and is accurate to rounding.
_MENDABLE = 0.25  # (1/2)^2


def thin_qr(X: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of X = Q T (..., n, m): orthonormal columns Q (..., n, p), upper triangular T (..., p, m), p = min(n, m).

    On the CPU this is Householder's QR. On a GPU that runs one small kernel after the other for each matrix of a batch.
    `cholesky_qr` is tens of times faster there, and is used if it is sound.
    """
    if X.device.type != "cpu" and X.shape[-1] <= X.shape[-2]:
        Q, T, sound = cholesky_qr(X)
        if bool(sound):
            return Q, T
    with suitable_threads(X):
        Q, T = torch.linalg.qr(X)
    return Q, T


def cholesky_qr(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of X = Q T by Cholesky factors of X^T X, twice, in float64; and a boolean tensor: True if they are sound.

    After the first pass, Q^T Q differs from I by eps times the squared condition of X. The second pass mends this
    (Yamamoto et al., Roundoff error analysis of the CholeskyQR2 algorithm, 2015). The result is sound if Q^T Q is
    within 1/2 of I after the first pass. No flag of a failed factorisation is needed, since X = Q T for any
    invertible T. Nothing here waits for a GPU.
    """
    eye = torch.eye(X.shape[-1], dtype=torch.float64, device=X.device)
    Q, first = _by_gram(X.double())
    sound = ((Q.mT @ Q - eye) ** 2).sum() < _MENDABLE  # False for NaN
    Q, second = _by_gram(Q)
    return Q.to(X.dtype), (second @ first).to(X.dtype), sound


def _by_gram(X: Tensor) -> tuple[Tensor, Tensor]:
    """One pass of QR by the Cholesky factor T of X^T X: Q = X T^-1 and T."""
    T = torch.linalg.cholesky_ex(X.mT @ X)[0].mT
    return torch.linalg.solve_triangular(T, X, upper=True, left=False), T


def orthonormal_rows(A: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of A = T Q with orthonormal rows in Q: (..., q, a), q <= a -> T (..., q, q), Q (..., q, a).

    If A has dependent rows, Q holds further directions, and its row space contains the row space of A.
    """
    Q, T = thin_qr(A.mT)
    return T.mT, Q.mT


def orthonormal_columns(X: Tensor, seeds: Iterator[int] | None = None) -> Tensor:
    """Orthonormal Q (..., n, min(n, m)): its first j columns span the first j columns of X (..., n, m), for every j.

    A column that depends on earlier ones is replaced by a random one before the factorisation, of the next of `seeds`.
    QR would put an arbitrary direction in its place, and later columns would lose their part along that direction.
    """
    X = unit_columns(X)
    for seed in itertools.islice(seeds or itertools.count(X.shape[-1]), _ATTEMPTS):
        Q, T = thin_qr(X)
        depends = T.diagonal(dim1=-2, dim2=-1).abs() <= _dependent(X)
        if not bool(depends.any()):
            return Q
        depends = torch.nn.functional.pad(depends, (0, X.shape[-1] - depends.shape[-1]))
        X = torch.where(depends.unsqueeze(-2), random_columns(X, seed), X)
    raise dense.LinAlgError("no orthonormal basis was found; are the columns finite?")


def unit_columns(X: Tensor) -> Tensor:
    """The columns of X (..., n, m) divided by their norms; zero columns stay zero."""
    norms = torch.linalg.vector_norm(X, dim=-2, keepdim=True)
    unit: Tensor = X / torch.where(norms > 0, norms, 1)
    return unit


def _dependent(X: Tensor) -> float:
    """Greatest part of a unit column outside the span of others if it counts as dependent on them."""
    return _DEPENDENT * float(torch.finfo(X.dtype).eps)


def random_columns(X: Tensor, seed: int) -> Tensor:
    """Seeded unit columns (n, m) in general position for X (..., n, m), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return unit_columns(torch.randn(X.shape[-2:], generator=generator, dtype=torch.float64)).to(X)


def completed(C: Tensor, X: Tensor) -> Tensor:
    """C (..., n, c) with orthonormal columns, extended by orthonormal columns that span X too: at most n in all."""
    return torch.cat([C, orthonormal_columns(torch.cat([C, X], -1))[..., C.shape[-1] :]], -1)


def extended(C: Tensor, n: int) -> Tensor:
    """C (..., b, c) with orthonormal columns, extended to n orthonormal columns, c <= n <= b: (..., b, n).

    The new columns are columns c + 1 .. n of the product of the Householder reflections that make C upper triangular.
    """
    b, c = C.shape[-2:]
    unit = torch.eye(b, n, dtype=C.dtype, device=C.device)[:, c:].expand(*C.shape[:-2], b, n - c)
    with suitable_threads(unit):
        return torch.cat([C, torch.ormqr(*torch.geqrf(C), unit)], -1)


def complement(C: Tensor) -> Tensor:
    """Orthonormal columns (..., n, n - c) of the complement of C (..., n, c), whose columns are orthonormal."""
    with suitable_threads(C):
        Q: Tensor = torch.linalg.qr(C, mode="complete")[0]
    return Q[..., C.shape[-1] :]


def orthonormal_beside(U: Tensor, X: Tensor) -> Tensor:
    """Orthonormal columns Q orthogonal to U (..., b, n), n + m <= b, such that U and Q together span X (..., b, m).

    If a column of X depends on U and on earlier columns, a random one takes its place. This is block Gram-Schmidt. The
    second pass makes the columns orthogonal to rounding. Passes that insert random columns need others after them.
    """
    if U.shape[-1] == 0 or X.shape[-1] == 0:
        return orthonormal_columns(X)
    seeds = itertools.count(U.shape[-1])
    X = unit_columns(X)
    for n in range(_ATTEMPTS):
        inside = U.mT @ X
        if n >= 2 and bool((inside.abs() <= _dependent(X)).all()):  # also of no matrices at all
            return X
        rest = X - U @ inside
        depends = torch.linalg.vector_norm(rest, dim=-2, keepdim=True) <= _dependent(X)
        X = orthonormal_columns(torch.where(depends, random_columns(X, next(seeds)), rest), seeds)
    raise dense.LinAlgError("no basis beside the given one was found; are both finite, and is there room for it?")


def outside(U: Tensor, X: Tensor) -> Tensor:
    """The part (I - U U^T) X outside the orthonormal columns U: (..., n, c), (..., n, m) -> (..., n, m)."""
    return X - U @ (U.mT @ X)


def truncated_product(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` approximation of B A: (.., b, n), (.., n, a) -> (.., b, rank), (.., rank, a) orthonormal."""
    U, S, Vh = product_svd(B, A)
    return U[..., :rank] * S[..., None, :rank], Vh[..., :rank, :]


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of B A without forming it: (.., b, n), (.., n, a) -> U (.., b, n), S (.., n), Vh (.., n, a)."""
    T, Q = orthonormal_rows(A)
    U, S, Vh = dense.svd(B @ T)
    return U, S, Vh @ Q
