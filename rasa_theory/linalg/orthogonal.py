"""Orthonormal bases: of thin matrices and batches of them, beside other bases, completed."""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_theory.linalg import dense


def thin_qr(X: Tensor) -> tuple[Tensor, Tensor]:
    """X = Q T, Q (..., n, p) with orthonormal columns, T (..., p, m) upper triangular; (..., n, m), p = min(n, m).

    By Householder's QR on the CPU. On a GPU a batch of those costs one small kernel after the other; `cholesky_qr` is
    tens of times faster there, and taken where it is sound.
    """
    if X.device.type != "cpu" and X.shape[-1] <= X.shape[-2]:
        Q, T, sound = cholesky_qr(X)
        if bool(sound):
            return Q, T
    Q, T = torch.linalg.qr(X)
    return Q, T


def cholesky_qr(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X = Q T by Cholesky factors of X^T X, twice, in float64; and whether that is sound, a boolean tensor.

    The first time leaves columns that are orthonormal to eps times the squared condition of X, the second mends it
    (Yamamoto et al., Roundoff error analysis of the CholeskyQR2 algorithm, 2015). Sound if what the first leaves is
    within 1/2 of orthonormal; whether a factorisation failed need not be asked, for X = Q T whatever T is. Nothing here
    waits for a GPU.
    """
    eye = torch.eye(X.shape[-1], dtype=torch.float64, device=X.device)
    Q, first = _by_gram(X.double())
    sound = ((Q.mT @ Q - eye) ** 2).sum() < 0.25  # not where it is NaN
    Q, second = _by_gram(Q)
    return Q.to(X.dtype), (second @ first).to(X.dtype), sound


def _by_gram(X: Tensor) -> tuple[Tensor, Tensor]:
    T = torch.linalg.cholesky_ex(X.mT @ X)[0].mT
    return torch.linalg.solve_triangular(T, X, upper=True, left=False), T


def orthonormal_rows(A: Tensor) -> tuple[Tensor, Tensor]:
    """A = T Q with orthonormal rows in Q: (..., q, a) -> T (..., q, q), Q (..., q, a); needs q <= a.

    Where A has dependent rows, Q holds further directions, so that its row space contains that of A.
    """
    Q, T = thin_qr(A.mT)
    return T.mT, Q.mT


def orthonormal_columns(X: Tensor) -> Tensor:
    """Orthonormal Q (..., n, min(n, m)) whose first j columns span those of X (..., n, m), for every j.

    A column that depends on those before is replaced by a random one before the factorisation: QR would put some
    direction in its place, and later columns would lose their part along it.
    """
    X = unit_columns(X)
    Q, T = thin_qr(X)
    depends = T.diagonal(dim1=-2, dim2=-1).abs() <= _dependent(X)
    if bool(depends.any()):
        depends = torch.nn.functional.pad(depends, (0, X.shape[-1] - depends.shape[-1]))
        Q, T = thin_qr(torch.where(depends.unsqueeze(-2), random_columns(X, X.shape[-1]), X))
    return Q


def unit_columns(X: Tensor) -> Tensor:
    """The columns of X (..., n, m) divided by their norms; zero columns stay zero."""
    norms = torch.linalg.vector_norm(X, dim=-2, keepdim=True)
    unit: Tensor = X / torch.where(norms > 0, norms, 1)
    return unit


def _dependent(X: Tensor) -> float:
    """What is left of a unit column beside others, if it depends on them."""
    return 100 * float(torch.finfo(X.dtype).eps)


def random_columns(X: Tensor, seed: int) -> Tensor:
    """Unit columns in general position, of the shape of X but for its batch, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return unit_columns(torch.randn(X.shape[-2:], generator=generator, dtype=torch.float64)).to(X)


def completed(C: Tensor, X: Tensor) -> Tensor:
    """C (..., n, c) with orthonormal columns, and beside them orthonormal ones for those of X, n in all at most."""
    return torch.cat([C, orthonormal_columns(torch.cat([C, X], -1))[..., C.shape[-1] :]], -1)


def extended(C: Tensor, n: int) -> Tensor:
    """C (..., b, c) with orthonormal columns, and n - c orthonormal ones beside them, c <= n <= b: (..., b, n).

    The others are columns c + 1 .. n of the product of the Householder reflections that make C upper triangular.
    """
    b, c = C.shape[-2:]
    unit = torch.eye(b, n, dtype=C.dtype, device=C.device)[:, c:].expand(*C.shape[:-2], b, n - c)
    return torch.cat([C, torch.ormqr(*torch.geqrf(C), unit)], -1)


def complement(C: Tensor) -> Tensor:
    """Orthonormal columns (..., n, n - c) orthogonal to the orthonormal ones of C (..., n, c)."""
    Q: Tensor = torch.linalg.qr(C, mode="complete")[0]
    return Q[..., C.shape[-1] :]


def orthonormal_beside(U: Tensor, X: Tensor) -> Tensor:
    """Orthonormal columns orthogonal to those of U (..., b, n) that span with them those of X (..., b, m); n + m <= b.

    Where a column of X depends on U and the columns before, a random one takes its place. Block Gram-Schmidt, and again
    to be orthogonal to rounding; a third time, since random columns may come in at the first.
    """
    X = unit_columns(X)
    left = torch.linalg.vector_norm(outside(U, X), dim=-2, keepdim=True)
    if bool((depends := left <= _dependent(X)).any()):
        X = torch.where(depends, random_columns(X, U.shape[-1]), X)
    for _ in range(3):
        X = orthonormal_columns(outside(U, X))
    return X


def outside(U: Tensor, X: Tensor) -> Tensor:
    """(I - U U^T) X: orthonormal (..., n, c), (..., n, m) -> (..., n, m)."""
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
