"""The equations read literally: plain numpy in float64, every least-squares problem by one `lstsq`. Slow, and meant so.

Imports nothing of the package. M (L, b, a); factors are Bt (L, b, q), At (L, q, a), B_S (b, R), A_S (R, a), D (L, R).
"""

from typing import NamedTuple

import numpy as np


class Factors(NamedTuple):
    """The five factors, in the order of the package."""

    Bt: np.ndarray
    At: np.ndarray
    B_S: np.ndarray
    A_S: np.ndarray
    D: np.ndarray


def lstsq(K, y):
    """The least-squares solution x of K x = y."""
    return np.linalg.lstsq(K, y, rcond=None)[0]


def residuals(M, Bt, At, B_S, A_S, D):
    """E_i = M_i - B~_i A~_i - B_S D_i A_S."""
    return np.stack([m - B @ A - B_S @ np.diag(d) @ A_S for m, B, A, d in zip(M, Bt, At, D, strict=True)])


def error(M, Bt, At, B_S, A_S, D):
    """sum_i ||E_i||_F^2."""
    return float((residuals(M, Bt, At, B_S, A_S, D) ** 2).sum())


# ---- blocks


def dyads(B_S, A_S):
    """The vectorised b_j a_j as columns, (b a, R)."""
    return np.einsum("bj,ja->baj", B_S, A_S).reshape(len(B_S) * A_S.shape[1], len(A_S))


def private(M, q, B_S, A_S, D):
    """The best rank-q approximation of every M_i - B_S D_i A_S, by its full SVD."""
    U, S, Vh = np.linalg.svd(np.stack([m - B_S @ np.diag(d) @ A_S for m, d in zip(M, D, strict=True)]))
    return U[:, :, :q] * S[:, None, :q], Vh[:, :q]


def mixing(M, Bt, At, B_S, A_S):
    """Every d_i from the vectorised dyads b_j a_j."""
    return np.stack([lstsq(dyads(B_S, A_S), (m - B @ A).ravel()) for m, B, A in zip(M, Bt, At, strict=True)])


def shared_B(M, Bt, At, A_S, D):
    """B_S [D_1 A_S, .., D_L A_S] = [M_1 - B~_1 A~_1, ..]."""
    K = np.hstack([np.diag(d) @ A_S for d in D])
    return lstsq(K.T, np.hstack(list(M - Bt @ At)).T).T


def shared_A(M, Bt, At, B_S, D):
    """[B_S D_1; ..; B_S D_L] A_S = [M_1 - B~_1 A~_1; ..]."""
    return lstsq(np.vstack([B_S @ np.diag(d) for d in D]), np.vstack(list(M - Bt @ At)))


def all_B(M, At, A_S, D):
    """B_S and every B~_i at once: [B_S, B~_1, .., B~_L] K = [M_1, .., M_L]."""
    L, q, _ = At.shape
    K = np.vstack(
        [np.hstack([np.diag(d) @ A_S for d in D])]
        + [np.hstack([At[i] if i == j else np.zeros_like(At[i]) for j in range(L)]) for i in range(L)]
    )
    X = lstsq(K.T, np.hstack(list(M)).T).T
    R = len(A_S)
    return X[:, :R], np.stack([X[:, R + i * q : R + (i + 1) * q] for i in range(L)])


def private_B_and_mixing(M, At, B_S, A_S):
    """Every (B~_i, d_i) at once, from one system on the vectorised unknowns of each layer."""
    b, q = len(B_S), At.shape[1]
    Bt, D = [], []
    for m, A in zip(M, At, strict=True):
        x = lstsq(np.hstack([np.kron(np.eye(b), A.T), dyads(B_S, A_S)]), m.ravel())
        Bt.append(x[: b * q].reshape(b, q))
        D.append(x[b * q :])
    return np.stack(Bt), np.stack(D)


# ---- sweeps


def paper_sweep(M, Bt, At, B_S, A_S, D):
    """One iteration of the paper: private SVDs, D, B_S, A_S."""
    Bt, At = private(M, Bt.shape[2], B_S, A_S, D)
    D = mixing(M, Bt, At, B_S, A_S)
    B_S = shared_B(M, Bt, At, A_S, D)
    A_S = shared_A(M, Bt, At, B_S, D)
    return Factors(Bt, At, B_S, A_S, D)


def joint_sweep(M, Bt, At, B_S, A_S, D):
    """B_S and all B~_i; all B~_i and D_i; A_S and all A~_i; all A~_i and D_i."""
    T = M.transpose(0, 2, 1)
    B_S, Bt = all_B(M, At, A_S, D)
    Bt, D = private_B_and_mixing(M, At, B_S, A_S)
    A_S, At = (X.swapaxes(-1, -2) for X in all_B(T, Bt.transpose(0, 2, 1), B_S.T, D))
    At, D = private_B_and_mixing(T, Bt.transpose(0, 2, 1), A_S.T, B_S.T)
    return Factors(Bt, At.transpose(0, 2, 1), B_S, A_S, D)


# ---- values


def e_lora(M, r):
    """sum_i sum_{j>r} sigma_ij^2."""
    return float((np.linalg.svd(M, compute_uv=False)[:, r:] ** 2).sum())


def allocation_bound(M, r, k):
    """sum_i sum_{j>q} sigma_ij^2 less the L k largest of them."""
    rest = np.sort((np.linalg.svd(M, compute_uv=False)[:, r - k :] ** 2).ravel())
    return float(rest[: len(rest) - len(M) * k].sum())


def ky_fan(S, m):
    """The sum of the m largest nonnegative eigenvalues of S."""
    return float(np.clip(np.sort(np.linalg.eigvalsh(S))[::-1][:m], 0, None).sum())


def rank_bound(M, r, k):
    """sum_i sum_{j>q+R} sigma_ij^2."""
    return e_lora(M, r - k + len(M) * k)


def stack_bound(M, r):
    """sum_{j>Lr} sigma_j([M_1 .. M_L])^2."""
    return float((np.linalg.svd(np.hstack(list(M)), compute_uv=False)[len(M) * r :] ** 2).sum())


def captured(g, Y, r, k):
    """KF_Lr(sum_i Y_i) + sum_i KF_q(g_i - Y_i) + KF_R(sum_i (g_i - Y_i))."""
    rest, L = g - Y, len(g)
    return ky_fan(Y.sum(0), L * r) + sum(ky_fan(G, r - k) for G in rest) + ky_fan(rest.sum(0), L * k)


def dual_bound(M, Y, r, k):
    """||M||^2 - C({M_i M_i^T}, Y) with C as in `captured`, for any Y_i >= 0."""
    return float((M**2).sum()) - captured(M @ M.transpose(0, 2, 1), Y, r, k)


def two_sided_bound(M, T, U, s, Y, Y_rows, r, k):
    """||M||^2 - C({M_i (I - T T^T) M_i^T + U_i U_i^T / s_i}) - C({V_i^T V_i / (1 - s_i)}), where U_i + V_i = M_i T."""
    V = M @ T - U
    s = s[:, None, None]
    columns = M @ (np.eye(len(T)) - T @ T.T) @ M.transpose(0, 2, 1) + U @ U.transpose(0, 2, 1) / s
    rows = V.transpose(0, 2, 1) @ V / (1 - s)
    return float((M**2).sum()) - captured(columns, Y, r, k) - captured(rows, Y_rows, r, k)


def clipped_Y(M, q):
    """The part of the top q eigenvalues of every Gamma_i that stands above the next one."""
    U, S, _ = np.linalg.svd(M, full_matrices=False)
    following = S[:, q] ** 2 if q < S.shape[1] else np.zeros(len(M))
    return np.einsum("ibj,ij,icj->ibc", U[:, :, :q], S[:, :q] ** 2 - following[:, None], U[:, :, :q])


def capping(M, index):
    """N^{1/2} for N = min(1, t/S), S = sum_i M_i^T M_i, t its eigenvalue number index + 1; None where t = 0."""
    values, X = np.linalg.eigh((M.transpose(0, 2, 1) @ M).sum(0))
    if index >= len(values) or values[-1 - index] <= 1e-12 * values[-1]:
        return None
    return X @ np.diag(np.sqrt(np.minimum(1, values[-1 - index] / np.maximum(values, 1e-300)))) @ X.T


def split_bound(M, T, r, k):
    """What columns leave of M (I - T T^T)^{1/2} plus what rows leave of M T, both by their clipped bounds."""
    values, X = np.linalg.eigh(np.eye(len(T)) - T @ T.T)
    K = X @ np.diag(np.sqrt(np.maximum(values, 0))) @ X.T
    sides = (M @ K, (M @ T).transpose(0, 2, 1))
    return sum(dual_bound(side, clipped_Y(side, r - k), r, k) for side in sides)
