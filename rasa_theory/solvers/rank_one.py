"""Large rank-one terms d x b x a of tensors, by the higher-order power method."""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_theory.linalg import orthogonal
from rasa_theory.problem import RankOneTerms

_PATTERNS = 6  # weights d that the search for one term begins with
_STEPS = 12
_PREFERENCE = 4  # power of the gain by which one is chosen
_FIXED = 2  # steps with the first weights: b and a approach the leading singular vectors of sum_i d_i E_i


def leading_terms(E: Tensor, generator: torch.Generator) -> RankOneTerms:
    """A large rank-one term of each tensor E (S, L, n, m): unit b (S, n) and a (S, m), and d (S, L).

    b <- sum_i d_i E_i a, a <- sum_i d_i E_i^T b, d_i <- b^T E_i a, from random weights d, half of them of one layer
    alone. |d|^2 is the part of ||E||^2 that a term explains. One of a few is returned, large ones more often.
    """
    S, L, n, m = E.shape
    d = torch.randn(S, _PATTERNS, L, generator=generator, dtype=torch.float64)
    alone = torch.nn.functional.one_hot(torch.randint(L, (S, _PATTERNS), generator=generator), L)
    d[:, ::2] *= alone[:, ::2]
    d = d.to(E)
    a = torch.randn(S, _PATTERNS, m, generator=generator, dtype=torch.float64).to(E)
    flat = E.reshape(S, L, n * m)
    for step in range(_STEPS):
        X = (d @ flat).reshape(S, _PATTERNS, n, m)
        b = unit_vectors((X @ a[..., None])[..., 0])
        a = unit_vectors((b[:, :, None] @ X)[:, :, 0])
        if step >= _FIXED:
            d = (b[..., None] * a[:, :, None]).reshape(S, _PATTERNS, n * m) @ flat.mT
    gains = (d * d).sum(2).cpu()
    weights = (gains / gains.amax(1, keepdim=True).clamp_min(torch.finfo(gains.dtype).tiny)) ** _PREFERENCE
    chosen = torch.multinomial(weights + torch.finfo(gains.dtype).tiny, 1, generator=generator)[:, 0].to(E.device)
    row = torch.arange(S, device=E.device)
    return RankOneTerms(b[row, chosen], a[row, chosen], d[row, chosen])


def unit_vectors(x: Tensor) -> Tensor:
    """Vectors (.., n) divided by their norms; zero vectors stay zero."""
    return orthogonal.unit_columns(x[..., None])[..., 0]
