"""Participation in the pool: the number of layers that each term serves, by its weight and by the loss without it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.linalg import orthogonal
from rasa_theory.problem.factors import RasaFactors


@dataclass(frozen=True)
class PoolParticipation:
    """The number of layers in which every pool term is at work, and its weight in each.

    The participation ratio over the layers is (sum_i x_i)^2 / sum_i x_i^2. It is 1 if a single layer uses the term, L
    if all layers use it equally, and 0 if none does. Since x_i is a square, a term that is ten times smaller in ten
    other layers than in the first has the ratio 1.2.

    Ratios by weight and by loss differ where a pool term cancels against private terms of a layer. Cancellation makes
    its weight in that layer large, but not its loss.

    Attributes:
        weights: d_ij^2 ||b_j||^2 ||a_j||^2, the squared norm of term j in layer i, (L, R) in squared units.
        losses: upper bound on the squared error that layer i gains without term j, (L, R) in squared units. Private
            terms replace as much of the term as they can.
        by_weight: participation ratios of `weights` over the layers, (R,).
        by_loss: participation ratios of `losses` over the layers, (R,).
        owners: the index of the layer with the largest loss, (R,).
    """

    weights: Tensor
    losses: Tensor
    by_weight: Tensor
    by_loss: Tensor
    owners: Tensor


def pool_participation(factors: RasaFactors) -> PoolParticipation:
    """Measure whether the pool is shared, or each of its terms serves one layer. Computed in float64.

    Arguments:
        factors: RaSA factors; the scale of their pool columns does not matter.

    Returns:
        Weights and losses of every term in every layer, and their participation ratios.
    """
    f = factors.to(torch.float64).normalised()
    weights, losses = f.mixing**2, layer_losses(f)
    return PoolParticipation(
        weights, losses, participation_ratio(weights), participation_ratio(losses), losses.argmax(0)
    )


def participation_ratio(x: Tensor) -> Tensor:
    """Return (sum_i x_i)^2 / sum_i x_i^2 over the first axis: x >= 0, (L, ...) -> (...).

    It lies in [1, L], and is 0 where all x_i are 0. Shares of the sum are squared, since the squares of small x_i
    would underflow.
    """
    p = x / torch.where((total := x.sum(0)) > 0, total, 1)
    squares: Tensor = (p**2).sum(0)
    return torch.where(squares > 0, 1 / torch.where(squares > 0, squares, 1), 0)


def layer_losses(factors: RasaFactors) -> Tensor:
    """Return sigma_{q+1}(B~_i A~_i + d_ij b_j a_j^T)^2, the loss of layer i without pool term j, (L, R).

    Without the term, the q private terms of the layer are replaced by the best q terms of their sum with it. The other
    pool terms stay. If private terms and D minimise the error, the residual is orthogonal to the private spaces and to
    the term. The error then rises by at most this loss, and by less if private terms fit the residual better.

    Pool columns must have unit norm. Let B~_i A~_i = U diag(S) V^T, x = U^T b_j, y = V^T a_j, and let x' and y' be the
    norms of the parts of b_j and a_j outside U and V. The sum has the singular values of the (q + 1) x (q + 1) matrix
    diag(S, 0) + d_ij [x; x'] [y; y']^T.
    """
    Bt, At, B_S, A_S, D = factors.named().values()
    U, S, Vh = orthogonal.product_svd(Bt, At)
    x, y = _bordered(U.mT @ B_S), _bordered(Vh @ A_S.mT)  # (L, R, q + 1)
    X = D[..., None, None] * x[..., :, None] * y[..., None, :]
    X = X + torch.diag_embed(torch.nn.functional.pad(S, (0, 1)))[:, None]
    smallest: Tensor = linalg.svd(X)[1][..., -1]
    return smallest**2


def _bordered(x: Tensor) -> Tensor:
    """Append to the coordinates of unit vectors the norm of their orthogonal rest: (L, q, R) -> (L, R, q + 1)."""
    rest = (1 - (x * x).sum(1, keepdim=True)).clamp_min(0).sqrt()
    return torch.cat([x, rest], 1).mT
