"""The start from one generalised eigenvalue problem: exact for exact stacks."""

from __future__ import annotations

import math

import scipy.optimize
import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.bounds import allocation_bound, common_count
from rasa_theory.problem import LayerStack, RankBudget, RankOneTerms, RasaFactors, leading_of_all, projected
from rasa_theory.solvers import updates
from rasa_theory.solvers.starts.start import Start

_TRIES = 4  # random pencils, at most


def pencil_start(unit: LayerStack, budget: RankBudget, seed: int = 0) -> RasaFactors | None:
    """The factors themselves where M_i = B~_i A~_i + B_S D_i A_S exactly and generically, L >= 2, b, a >= L r.

    The columns of all layers span L q + R = L r dimensions, and so do the rows: K_i = U^T M_i V, with U and V the
    leading L r singular vectors of the layers side by side and on top of each other, loses nothing, and `pencil_pool`
    reads the pool off the K_i. Private terms are the best of rank q beside it. Of a few random pencils the one with
    the lowest error counts.

    On other stacks K_i is the leading part of M_i, and the result is a start like any other; for k = r and layers with
    common singular bases it is the optimum. Unlike `common_start` it does not ask that every layer uses every pool
    term. With noise it deteriorates quickly, since the L clusters of private eigenvalues crowd the pool's. Returns None
    where the conditions do not hold: k = 0, L = 1, L r > min(b, a), or a stack so degenerate that every pencil is
    singular.
    """
    if not _fits(unit, budget):
        return None
    generator = torch.Generator().manual_seed(seed)
    q = budget.private_rank
    U, V, K = _compressed(unit, budget)
    best, lowest = None, math.inf
    for _ in range(_TRIES):
        pool = pencil_pool(K, q, generator)
        error = math.inf if pool is None else _error_beside(K, pool, q)
        if error < lowest:
            best, lowest = pool, error
        if lowest**0.5 <= unit.rounding:
            break
    return None if best is None else beside_pool(unit, RankOneTerms(U @ best.B, best.A @ V.mT, best.D), q)


def pencil_is_worth_racing(unit: LayerStack, budget: RankBudget) -> bool:
    """True if the pencil can beat allocation: the leading L r rows and columns leave less energy than e_alloc(k)."""
    if not _fits(unit, budget):
        return False
    K = _compressed(unit, budget)[2]
    return unit.norm_squared - float((K * K).sum()) < allocation_bound(unit, budget).value


def _compressed(unit: LayerStack, budget: RankBudget) -> tuple[Tensor, Tensor, Tensor]:
    """U (b, L r) and V (a, L r), leading in all layers together, and K_i = U^T M_i V, (L, L r, L r)."""
    needed = unit.layers * budget.rank
    if unit.spectra.is_leading:
        U, V = (view.spectra.common(common_count(view, budget))[:, :needed] for view in (unit, unit.transpose()))
        return U, V, unit.sharding.all_gather(U.mT @ unit.right(V.to(unit.dtype)).double())
    svd = unit.spectra.svd()
    U, V = leading_of_all(svd, needed, unit.sharding)
    return U, V, unit.sharding.all_gather(projected(svd, U, V))


def _fits(unit: LayerStack, budget: RankBudget) -> bool:
    needed = unit.layers * budget.rank
    return budget.shared_rank > 0 and unit.layers > 1 and needed <= min(unit.shape) and unit.norm_squared > 0


def pencil_pool(K: Tensor, private_rank: int, generator: torch.Generator) -> RankOneTerms | None:
    """The pool of K_i = W_i Z_i^T + B D_i A, (L, n, n) with n = L q + R, from one random pencil.

    All K_i are W diag(.) Z^T with the same square W = [W_1 .. W_L, B] and Z, so that for X = Z^-T
        sum_i alpha_i K_i X = sum_i beta_i K_i X diag(lambda).
    Layer i's own space has the q-fold eigenvalue alpha_i / beta_i, which we choose; pool term j the simple one
    sum_i alpha_i d_ij / sum_i beta_i d_ij. Assigning q eigenvalues to every layer leaves the pool's. Its columns of
    Y = K(beta) X are B up to scale, its rows of X^-1 are A, and d_ij = [Y^-1 K_i X]_jj. With (alpha_i : beta_i) at
    equal angles, in random order, the private clusters are as far apart as L clusters can be. Where noise makes
    eigenvalues complex, the real and the imaginary part of a vector span the same space. Computed on the CPU, returned
    where K lies. None if the pencil is singular, or so nearly that terms of ||K|| / eps would have to cancel.
    """
    L, q, device = K.shape[0], private_rank, K.device
    angle = math.pi / L * (torch.randperm(L, generator=generator) + torch.rand(1, generator=generator)).double()
    gain = (0.5 + torch.rand(L, generator=generator)).double()
    alpha, beta = torch.cos(angle), torch.sin(angle)
    K = K.cpu()
    K_alpha, K_beta = (torch.einsum("l,lnm->nm", gain * c, K) for c in (alpha, beta))
    try:
        x, y, X = linalg.pencil_eigenvectors(K_alpha, K_beta)
        in_pool = _eigenvalues_of_pool(x, y, alpha, beta, q)
        at_alpha, at_beta = K_alpha @ X, K_beta @ X
        is_larger = torch.linalg.vector_norm(at_beta, dim=0) >= torch.linalg.vector_norm(at_alpha, dim=0)
        Y = torch.where(is_larger, at_beta, at_alpha)
        D = torch.linalg.solve(Y, K @ X).diagonal(dim1=1, dim2=2)
        pool = RankOneTerms(Y[:, in_pool], torch.linalg.inv(X)[in_pool], D[:, in_pool])
    except linalg.LinAlgError:
        return None
    norms = torch.linalg.vector_norm(pool.B, dim=0) * torch.linalg.vector_norm(pool.A, dim=1) * pool.D.abs()
    if not float(norms.sum()) < float(torch.linalg.vector_norm(K)) / torch.finfo(K.dtype).eps:
        return None
    return RankOneTerms(*(t.to(device) for t in pool))


def _eigenvalues_of_pool(x: Tensor, y: Tensor, alpha: Tensor, beta: Tensor, q: int) -> Tensor:
    """Indices of the eigenvalues (x : y) that remain when each layer takes the q nearest to its (alpha_i : beta_i).

    Distances are sines of angles between lines, which need no division; the assignment of least total distance.
    """
    size = torch.sqrt(x.abs() ** 2 + y.abs() ** 2)
    size = torch.where(size > 0, size, 1)
    distance = (x[:, None] * beta - y[:, None] * alpha).abs() / size[:, None]  # (n, L)
    if not bool(torch.isfinite(distance).all()):
        raise linalg.LinAlgError("the pencil is singular")
    private = scipy.optimize.linear_sum_assignment(distance.repeat_interleave(q, 1).numpy())[0]
    is_free = torch.ones(len(x), dtype=torch.bool)
    is_free[torch.as_tensor(private)] = False
    return torch.nonzero(is_free)[:, 0]


def _error_beside(K: Tensor, pool: RankOneTerms, q: int) -> float:
    """sum_i sum_{j>q} sigma_j(K_i - B D_i A)^2."""
    rest = K - (pool.B * pool.D[:, None]) @ pool.A
    return float(linalg.tail_energy(linalg.svd(rest)[1], q).sum())


def beside_pool(unit: LayerStack, pool: RankOneTerms, private_rank: int) -> RasaFactors:
    """Factors with this pool, of all layers, and the best private terms of rank q beside it."""
    factors = RasaFactors.from_pool(pool, private_rank, unit.sharding)
    factors = factors.to(torch.float64, unit.device).normalised()
    return updates.update_private(unit, factors.to(unit.dtype))


PENCIL = Start("pencil", pencil_start, is_worth_racing=pencil_is_worth_racing)
