"""All factors of an exact stack from one generalised eigenvalue problem."""

from __future__ import annotations

import math
from typing import NamedTuple

import scipy.optimize
import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.bounds import allocation_bound
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors, leading_of_all, projected
from rasa_theory.solvers import updates

_TRIES = 4


class Pool(NamedTuple):
    """Pool terms sum_j d_ij b_j a_j^T: B (n, R), A (R, p), D (L, R)."""

    B: Tensor
    A: Tensor
    D: Tensor


def pencil_start(stack: LayerStack, budget: RankBudget, seed: int = 0) -> RasaFactors | None:
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
    if not _fits(stack, budget):
        return None
    unit, generator = stack.unit(), torch.Generator().manual_seed(seed)
    q, (U, V, K) = budget.private_rank, _compressed(unit, budget)
    best, lowest = None, math.inf
    for _ in range(_TRIES):
        pool = pencil_pool(K, q, generator)
        error = math.inf if pool is None else _error_beside(K, pool, q)
        if error < lowest:
            best, lowest = pool, error
        if lowest**0.5 <= unit.rounding:
            break
    return None if best is None else beside_pool(stack, Pool(U @ best.B, best.A @ V.mT, best.D), q)


def pencil_promises(stack: LayerStack, budget: RankBudget) -> bool:
    """Whether the pencil can beat allocation: what the leading L r rows and columns leave out is below e_alloc(k)."""
    if not _fits(stack, budget):
        return False
    unit = stack.unit()
    K = _compressed(unit, budget)[2]
    return unit.norm_squared - float((K * K).sum()) < allocation_bound(unit, budget).value


def _compressed(unit: LayerStack, budget: RankBudget) -> tuple[Tensor, Tensor, Tensor]:
    """U (b, L r) and V (a, L r), leading in all layers together, and K_i = U^T M_i V, (L, L r, L r)."""
    svd = unit.spectra.svd()
    U, V = leading_of_all(svd, unit.layers * budget.rank, unit.sharding)
    return U, V, unit.sharding.all_gather(projected(svd, U, V))


def _fits(stack: LayerStack, budget: RankBudget) -> bool:
    needed = stack.layers * budget.rank
    return budget.shared_rank > 0 and stack.layers > 1 and needed <= min(stack.shape) and stack.norm_squared > 0


def pencil_pool(K: Tensor, private_rank: int, generator: torch.Generator) -> Pool | None:
    """The pool of K_i = W_i Z_i^T + B D_i A, (L, n, n) with n = L q + R, from one random pencil.

    All K_i are W diag(.) Z^T with the same square W = [W_1 .. W_L, B] and Z, so that for X = Z^-T
        sum_i alpha_i K_i X = sum_i beta_i K_i X diag(lambda).
    Layer i's own space has the q-fold eigenvalue alpha_i / beta_i, which is known; pool term j the simple one
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
        pool = _of_the_pool(x, y, alpha, beta, q)
        at_alpha, at_beta = K_alpha @ X, K_beta @ X
        larger = torch.linalg.vector_norm(at_beta, dim=0) >= torch.linalg.vector_norm(at_alpha, dim=0)
        Y = torch.where(larger, at_beta, at_alpha)
        D = torch.linalg.solve(Y, K @ X).diagonal(dim1=1, dim2=2)
        found = Pool(Y[:, pool], torch.linalg.inv(X)[pool], D[:, pool])
    except linalg.LinAlgError:
        return None
    norms = torch.linalg.vector_norm(found.B, dim=0) * torch.linalg.vector_norm(found.A, dim=1) * found.D.abs()
    if not float(norms.sum()) < float(torch.linalg.vector_norm(K)) / torch.finfo(K.dtype).eps:
        return None
    return Pool(*(t.to(device) for t in found))


def _of_the_pool(x: Tensor, y: Tensor, alpha: Tensor, beta: Tensor, q: int) -> Tensor:
    """Indices of the eigenvalues (x : y) that remain when each layer takes the q nearest to its (alpha_i : beta_i).

    Distances are sines of angles between lines, which need no division; the assignment of least total distance.
    """
    size = torch.sqrt(x.abs() ** 2 + y.abs() ** 2)
    size = torch.where(size > 0, size, 1)
    distance = (x[:, None] * beta - y[:, None] * alpha).abs() / size[:, None]  # (n, L)
    if not bool(torch.isfinite(distance).all()):
        raise linalg.LinAlgError("the pencil is singular")
    taken = scipy.optimize.linear_sum_assignment(distance.repeat_interleave(q, 1).numpy())[0]
    free = torch.ones(len(x), dtype=torch.bool)
    free[torch.as_tensor(taken)] = False
    return torch.nonzero(free)[:, 0]


def _error_beside(K: Tensor, pool: Pool, q: int) -> float:
    """sum_i sum_{j>q} sigma_j(K_i - B D_i A)^2."""
    rest = K - (pool.B * pool.D[:, None]) @ pool.A
    return float(linalg.tail_energy(linalg.svd(rest)[1], q).sum())


def beside_pool(stack: LayerStack, pool: Pool, private_rank: int) -> RasaFactors:
    """Factors with this pool, found in units of `stack.unit()`, and the best private terms of rank q beside it."""
    unit, q, (b, a), sharding = stack.unit(), private_rank, stack.shape, stack.sharding
    none = torch.zeros(sharding.local_layers, b, q), torch.zeros(sharding.local_layers, q, a)
    factors = RasaFactors(*none, pool.B, pool.A, pool.D[sharding.local], sharding=sharding)
    factors = factors.to(torch.float64, stack.device).normalised()
    return updates.update_private(unit, factors.to(stack.dtype)).scaled(stack.scale)
