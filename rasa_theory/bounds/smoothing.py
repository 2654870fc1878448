"""Smoothed sums of eigenvalues, and the captured energy made of them, with gradients.

KF_m(S) = max tr(X S) over 0 <= X <= I with tr X <= m is the sum of the m largest nonnegative eigenvalues of S. It has
no gradient where eigenvalues meet. Less mu/2 ||X||^2 under the maximum it has one, the maximiser X.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.problem import RankBudget


class KyFan(NamedTuple):
    """A sum of eigenvalues of S (.., n, n), added up over the batch.

    - smooth: max tr(X S) - mu/2 ||X||^2, at most mu m / 2 below `exact`.
    - exact: KF_m(S).
    - X: the maximiser (.., n, n) of `smooth`, which is its gradient.
    """

    smooth: float
    exact: float
    X: Tensor


def smoothed_ky_fan(S: Tensor, m: int, mu: float) -> KyFan:
    """KF_m(S) with and without smoothing, S (.., n, n) symmetric.

    X has the eigenvectors of S, and as eigenvalues the `capped_weights` of those of S / mu.
    """
    if m == 0:
        return KyFan(0.0, 0.0, torch.zeros_like(S))
    values, V = linalg.symmetric_eigenpairs(S)
    x = capped_weights(values / mu, m)
    smooth = (x * (values - mu / 2 * x)).sum()
    exact = linalg.largest_nonnegative(values, m).sum()
    return KyFan(float(smooth), float(exact), (V * x[..., None, :]) @ V.mT)


def capped_weights(w: Tensor, m: int) -> Tensor:
    """The point nearest to w (.., n) with 0 <= x <= 1 and sum x <= m: x = clip(w - tau, 0, 1), the least tau >= 0.

    As tau falls, the sum rises with a slope that goes up by 1 at each w_j, and down by 1 at each w_j - 1.
    """
    breaks, order = torch.cat([w, w - 1], -1).sort(-1, descending=True)
    slopes = torch.where(order < w.shape[-1], 1.0, -1.0).to(w.dtype).cumsum(-1)  # below each break
    steps = slopes[..., :-1] * (breaks[..., :-1] - breaks[..., 1:])
    sums = torch.cat([torch.zeros_like(steps[..., :1]), steps.cumsum(-1)], -1)  # at each break
    last = (sums <= m).sum(-1, keepdim=True) - 1
    tau_at_break, slope = breaks.gather(-1, last), slopes.gather(-1, last)
    tau = tau_at_break - (m - sums.gather(-1, last)) / slope.clamp_min(1)
    return (w - tau.clamp_min(0)).clamp(0, 1)


class SmoothedEnergy(NamedTuple):
    """The captured energy with smoothing.

    - smooth, exact: the value with and without smoothing.
    - Z: the gradient of `smooth` in g, (L, n, n).
    - slope_F: the gradient of `smooth` in F, (L, n, p).
    """

    smooth: float
    exact: float
    Z: Tensor
    slope_F: Tensor


def smoothed_energy(g: Tensor, F: Tensor, budget: RankBudget, mu: float) -> SmoothedEnergy:
    """KF_Lr(sum_i Y_i) + sum_i KF_q(g_i - Y_i) + KF_R(sum_i (g_i - Y_i)), Y_i = F_i F_i^T, each sum smoothed by mu.

    `CapturedEnergy` has the same three sums. With the maximisers Q, P_i and P of the three, the gradient is P + P_i in
    g_i and Q - P - P_i in Y_i.
    """
    L = g.shape[0]
    Y = F @ F.mT
    rest = g - Y
    whole = smoothed_ky_fan(Y.sum(0), L * budget.rank if F.shape[2] else 0, mu)
    own = smoothed_ky_fan(rest, budget.private_rank, mu)
    pooled = smoothed_ky_fan(rest.sum(0), budget.pool_rank(L), mu)
    Z = own.X + pooled.X
    sums = (whole, own, pooled)
    slope_F = 2 * (whole.X - Z) @ F
    return SmoothedEnergy(sum(s.smooth for s in sums), sum(s.exact for s in sums), Z, slope_F)
