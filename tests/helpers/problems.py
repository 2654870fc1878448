"""Instances whose optimum e_rasa(k) is known, and shapes with seeds for those whose optimum is not."""

from typing import NamedTuple

import numpy as np
import torch

from rasa_theory import RankBudget, RasaFactors

#        L, b, a, r, k, seed
SHAPES = [
    (2, 5, 4, 2, 1, 0),
    (3, 6, 8, 3, 1, 1),
    (3, 8, 6, 3, 2, 2),
    (4, 9, 7, 2, 2, 3),
    (3, 5, 7, 4, 2, 4),  # R = 6 exceeds b
    (5, 12, 12, 4, 1, 5),
]


class Problem(NamedTuple):
    """values (L, b, a), the budget, and the optimum."""

    values: np.ndarray
    budget: RankBudget
    e_rasa: float


def noise(L, b, a, seed=0):
    """Independent normal entries."""
    return np.random.default_rng(seed).standard_normal((L, b, a))


def decaying(L=3, b=16, a=18, seed=0):
    """A spectrum like that of fine-tuning updates."""
    return noise(L, b, a, seed) * np.arange(1, a + 1) ** -0.7


def falling(L, b, a, seed=0):
    """Unrelated layers, sigma_j = j^-0.7."""
    U, S, Vh = np.linalg.svd(noise(L, b, a, seed), full_matrices=False)
    return U * np.arange(1, S.shape[1] + 1) ** -0.7 @ Vh


def orthogonal(n, seed=0):
    """A random orthogonal matrix."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def tail(M, rank):
    """What the best rank-`rank` approximation of every layer leaves."""
    return float((np.linalg.svd(M, compute_uv=False)[..., rank:] ** 2).sum())


def one_layer(seed=0):
    """L = 1: sharing with oneself is LoRA."""
    M = noise(1, 7, 6, seed)
    return Problem(M, RankBudget(3, 2), tail(M, 3))


def nothing_shared(seed=0):
    """k = 0 is LoRA."""
    M = noise(3, 7, 6, seed)
    return Problem(M, RankBudget(2, 0), tail(M, 2))


def equal_up_to_scale(seed=0):
    """M_i = c_i M: every layer may use rank q + R, the same for all."""
    c, M = np.array([1.0, -2.0, 0.5]), noise(1, 9, 8, seed)
    return Problem(c[:, None, None] * M, RankBudget(3, 1), float((c**2).sum()) * tail(M, 2 + 3))


def shared_bases(seed=0):
    """M_i = U diag(s_i) V^T, k = r: the R columns of U with the most energy over all layers."""
    s = np.random.default_rng(seed).standard_normal((3, 9))
    values = orthogonal(10, seed)[:, :9] * s[:, None] @ orthogonal(9, seed + 1)
    return Problem(values, RankBudget(2, 2), float(np.sort((s**2).sum(0))[: 9 - 6].sum()))


def orthogonal_columns(seed=0):
    """Column spaces of the layers mutually orthogonal, k = r: nothing to share, the best allocation is the optimum."""
    Q = orthogonal(12, seed)
    M = np.stack([Q[:, 4 * i : 4 * i + 4] @ X for i, X in enumerate(noise(3, 4, 7, seed + 1))])
    M *= np.array([1.0, 2.0, 0.7])[:, None, None]
    kept = np.sort(np.linalg.svd(M, compute_uv=False).ravel() ** 2)[-6:]
    return Problem(M, RankBudget(2, 2), float((M**2).sum() - kept.sum()))


def orthogonal_rows(seed=0):
    """The same with row spaces."""
    values, budget, optimum = orthogonal_columns(seed)
    return Problem(values.transpose(0, 2, 1), budget, optimum)


def planted(seed=0, L=3, b=9, a=8, r=2, k=1):
    """Made of factors of the budget: 0."""
    rng, R, q = np.random.default_rng(seed), L * k, r - k
    pool = np.einsum("bj,ij,ja->iba", *(rng.standard_normal(s) for s in ((b, R), (L, R), (R, a))))
    return Problem(pool + rng.standard_normal((L, b, q)) @ rng.standard_normal((L, q, a)), RankBudget(r, k), 0.0)


def zero():
    """M = 0."""
    return Problem(np.zeros((2, 4, 3)), RankBudget(2, 1), 0.0)


KNOWN = {
    "one layer": one_layer,
    "nothing shared": nothing_shared,
    "equal up to scale": equal_up_to_scale,
    "orthogonal columns": orthogonal_columns,
    "orthogonal rows": orthogonal_rows,
    "zero": zero,
}
"""Those that the default solver reaches whatever the seed; see test_starts.py for `shared_bases` and `planted`."""


def random_factors(L, b, a, r, k, seed=0):
    """Factors of order one with unit pool columns, for any stack of that shape."""
    q, R = r - k, L * k
    shapes = (L, b, q), (L, q, a), (1, b, R), (1, R, a), (1, L, R)
    Bt, At, B_S, A_S, D = (torch.as_tensor(noise(*shape, seed + 10 + n)) for n, shape in enumerate(shapes))
    return RasaFactors(Bt, At, B_S[0], A_S[0], D[0]).normalised()
