"""Dense linear algebra shared by the whole package: spectra, leading subspaces, thin products and tolerances."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from rasa_theory.linalg.threads import suitable_threads, suitable_threads_for_scipy

_SUMMATION = 1e-12  # relative: far above the rounding of a sum of energies, far below any useful share of it
# A loss of n eps sigma_1^2 raises the norm of an error sqrt(e) by at most n eps sigma_1^2 / (2 sqrt(e)). For
# e >= sigma_1^2 / 400 this is 10 n eps sigma_1, which `rounding` allows.
_GRAM_MARGIN = 400
# Of `leading_part_from`. Where sigma_j falls as j^-0.6, the error is then within 2e-4 of the best from any guess.
_SUBSPACE_STEPS = 4
_MORE_COLUMNS = 8
LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition (..., b, a) -> U (..., b, m), S (..., m), Vh (..., m, a), m = min(b, a).

    Divide and conquer (LAPACK gesdd) fails on rare finite matrices. QR iteration (gesvd) then takes its place.
    """
    with suitable_threads(matrix):
        try:
            U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
            if bool(torch.isfinite(S).all()):
                return U, S, Vh
        except LinAlgError:
            pass
        return svd_by_qr_iteration(matrix)


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values, falling: (..., b, a) -> (..., min(b, a)). `svd` takes over if divide and conquer fails."""
    with suitable_threads(matrix):
        try:
            S: Tensor = torch.linalg.svdvals(matrix)
            if bool(torch.isfinite(S).all()):
                return S
        except LinAlgError:
            pass
    return svd(matrix)[1]


def svd_by_qr_iteration(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result of `svd` by LAPACK's gesvd on the CPU: slower than divide and conquer, but it hardly ever fails."""
    b, a = matrix.shape[-2:]
    layers = matrix.reshape(-1, b, a).cpu()
    with suitable_threads_for_scipy(layers):
        parts = [scipy.linalg.svd(m.numpy(), full_matrices=False, lapack_driver="gesvd") for m in layers]
    U, S, Vh = (torch.stack([torch.as_tensor(p[j]) for p in parts]).to(matrix.device) for j in range(3))
    lead = matrix.shape[:-2]
    return U.reshape(*lead, *U.shape[1:]), S.reshape(*lead, S.shape[1]), Vh.reshape(*lead, *Vh.shape[1:])


def symmetric_eigenvalues(gram: Tensor) -> Tensor:
    """Eigenvalues of symmetric matrices, ascending: (..., n, n) -> (..., n)."""
    with suitable_threads(gram):
        values: Tensor = torch.linalg.eigvalsh(gram)
    return values


def symmetric_eigenpairs(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of symmetric matrices, ascending, and their eigenvectors: (..., n, n) -> (..., n), (..., n, n)."""
    with suitable_threads(gram):
        values, vectors = torch.linalg.eigh(gram)
    return values, vectors


def pencil_eigenvectors(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (x : y) of y X v = x Y v, and a real basis of eigenvectors: (n, n) twice -> x, y (n,), V (n, n).

    x and y are complex. The two columns of a complex pair are the real and the imaginary part of its eigenvector.
    Columns have unit norm. It runs on the CPU in float64, and raises LinAlgError if the iteration fails.
    """
    X, Y = X.cpu(), Y.cpu()
    try:
        with suitable_threads_for_scipy(X):
            (x, y), V = scipy.linalg.eig(X.numpy(), Y.numpy(), homogeneous_eigvals=True)
    except (np.linalg.LinAlgError, ValueError) as error:  # no convergence; entries that are not finite
        raise LinAlgError(str(error)) from None
    real = np.where(x.imag < 0, V.imag, V.real)
    norms = np.linalg.norm(real, axis=0)
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(real / np.where(norms > 0, norms, 1))


def ky_fan(symmetric: Tensor, m: int) -> Tensor:
    """The Ky Fan sum KF_m(S) of the m largest nonnegative eigenvalues of S: (..., n, n) -> (...).

    It is the maximum of tr(X S) over 0 <= X <= I with tr X <= m, so it rises with S and is subadditive.
    """
    if m == 0:
        return symmetric.new_zeros(symmetric.shape[:-2])
    return largest_nonnegative(symmetric_eigenvalues(symmetric), m)


def largest_nonnegative(values: Tensor, m: int) -> Tensor:
    """Sum of the m largest nonnegative entries of `values` (..., n), which are ascending: (...)."""
    return values[..., max(values.shape[-1] - m, 0) :].clamp_min(0).sum(-1)


def tail_energy(sigma: Tensor, rank: int) -> Tensor:
    """Sum of the squared singular values after the first `rank`: (..., m) -> (...).

    By Eckart-Young it is the least squared Frobenius error of any rank-`rank` approximation.
    """
    return (sigma[..., rank:] ** 2).sum(-1)


def terms_reaching(cumulative: Tensor, energy: float) -> int:
    """Number of leading terms whose cumulative energy (N,) reaches `energy`, up to the rounding of the sum.

    An exact comparison with a share of 100 % could require N + 1 terms.
    """
    return int((cumulative < energy * (1 - _SUMMATION)).sum()) + 1


def best_low_rank(matrix: Tensor, rank: int, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` approximation of one matrix: (b, a) -> B (b, rank), A (rank, a), one of them orthonormal.

    The leading eigenvectors of the smaller Gram matrix are several times cheaper than the SVD. They can lose up to
    n eps sigma_1^2 of energy, where n is the size of the Gram matrix. This is harmless unless the remaining error is
    itself small. Below sigma_1^2 / 400 the loss could exceed `rounding`, so the SVD is computed instead. `exact`
    requests the SVD at once.
    """
    b, a = matrix.shape
    if rank == 0:
        return matrix.new_zeros(b, 0), matrix.new_zeros(0, a)
    if not exact and rank < min(b, a):
        wide = a > b
        tall = matrix.mT if wide else matrix  # (m, n), n <= m
        energy, V = leading_eigenpairs(tall.mT @ tall, rank)  # (rank,), (n, rank)
        left = tall @ V  # (m, rank)
        remaining = float((matrix * matrix).sum() - (left * left).sum())
        if remaining > float(energy[-1]) / _GRAM_MARGIN > 0:
            return (V, left.mT) if wide else (left, V.mT)
    U, S, Vh = svd(matrix)
    return U[:, :rank] * S[:rank], Vh[:rank]


def leading_part_from(matrix: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Subspace iteration for the best rank-q approximation: (.., b, a), rows (.., q, a) -> B (.., b, q), A (.., q, a).

    The rows of the new A are orthonormal. The result is at least as good as the best one in the given row space: with
    the orthonormal X of each step, no singular value of `matrix X` is below that of the step before. Some random
    columns beside A let it leave a row space that is orthogonal to what is missing.
    """
    q, a = A.shape[-2:]
    random = torch.randn(a, _MORE_COLUMNS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = torch.cat([A.mT, random.to(A).expand(*A.shape[:-2], -1, -1)], -1)
    with suitable_threads(matrix):
        X = torch.linalg.qr(X)[0]
        for _ in range(_SUBSPACE_STEPS):
            X = torch.linalg.qr(matrix.mT @ torch.linalg.qr(matrix @ X)[0])[0]
        Y, T = torch.linalg.qr(matrix @ X)
        U, S, Vh = svd(T)
    return Y @ U[..., :q] * S[..., None, :q], Vh[..., :q, :] @ X.mT


def leading_eigenpairs(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenpairs of one symmetric matrix, ascending: (n, n) -> (count,), (n, count)."""
    n = gram.shape[0]
    if gram.device.type == "cpu" and 4 * count < n:
        with suitable_threads_for_scipy(gram):
            values, vectors = scipy.linalg.eigh(
                gram.numpy(), subset_by_index=[n - count, n - 1], driver="evr", check_finite=False
            )
        if len(values) == count:  # LAPACK syevr sometimes returns too few where eigenvalues coincide
            return torch.from_numpy(values), torch.from_numpy(vectors)
    values_, vectors_ = symmetric_eigenpairs(gram)
    return values_[-count:], vectors_[:, -count:]


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Context in which float32 products on CUDA may round their factors to TF32 (10 bits), if `allowed`."""
    if not allowed:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def product(M: Tensor, X: Tensor) -> Tensor:
    """The products M_i X for small n: (L, b, a) and (a, n) or (L, a, n) -> (L, b, n).

    They are formed as (X^T M_i^T)^T. BLAS is faster if the thin factor stands first, up to ten times on the CPU.
    """
    with suitable_threads(M):
        return (X.mT @ M.mT).mT


def rounding(norm: float, shape: tuple[int, int], eps: float) -> float:
    """The tolerance 10 max(b, a) eps ||M|| of every comparison between errors, in units of norm (not squared)."""
    return 10 * max(shape) * eps * norm


def widened(error: float, rounding: float) -> tuple[float, float]:
    """The interval of squared errors whose roots are within `rounding` of the root of `error`."""
    root = math.sqrt(error)
    return max(root - rounding, 0.0) ** 2, (root + rounding) ** 2


def not_above(x: float, y: float, tolerance: float) -> bool:
    """True if the squared error x is at most y, up to a `tolerance` in units of norm. NaN is above everything."""
    return math.sqrt(max(x, 0.0)) <= math.sqrt(max(y, 0.0)) + tolerance if x == x and y == y else False
