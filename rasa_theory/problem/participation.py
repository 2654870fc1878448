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

    weights (L, R): d_ij^2 ||b_j||^2 ||a_j||^2, the squared norm of term j in layer i. losses (L, R): what layer i loses
    without term j once its private terms have taken up what they can, see `layer_losses`. by_weight and by_loss (R,):
    their participation ratios over the layers, (sum_i x_i)^2 / sum_i x_i^2, 1 where one layer alone uses the term, L
    where all do equally, 0 where none does. owners (R,): the layer that loses most.

    The two differ where a term cancels against private ones: that makes its weight in that layer large, and its loss
    not. Both weigh squares, so a term in one layer and at a tenth of the size in each of ten others counts as 1.2.
    """

    weights: Tensor
    losses: Tensor
    by_weight: Tensor
    by_loss: Tensor
    owners: Tensor


def pool_participation(factors: RasaFactors) -> PoolParticipation:
    """Measure whether the pool is shared, or each of its terms serves one layer. Computed in float64.

    **Arguments:**

    - `factors`: RaSA factors; the scale of their pool columns does not matter.

    **Returns:**

    - `PoolParticipation`: weights and losses of all terms in all layers, and their participation ratios.
    """
    f = factors.to(torch.float64).normalised()
    weights, losses = f.mixing**2, layer_losses(f)
    return PoolParticipation(
        weights, losses, participation_ratio(weights), participation_ratio(losses), losses.argmax(0)
    )


def participation_ratio(x: Tensor) -> Tensor:
    """(sum_i x_i)^2 / sum_i x_i^2 over the first axis, x >= 0: (L, ...) -> (...), in [1, L], and 0 where all are 0."""
    p = x / torch.where((total := x.sum(0)) > 0, total, 1)  # no square of a small number is lost
    squares: Tensor = (p**2).sum(0)
    return torch.where(squares > 0, 1 / torch.where(squares > 0, squares, 1), 0)


def layer_losses(factors: RasaFactors) -> Tensor:
    """Upper bound on the squared cost of leaving pool term j out of layer i, (L, R).

    It is sigma_{q+1}(B~_i A~_i + d_ij b_j a_j^T)^2. Private terms take up what they can of the term, the other pool
    terms stay. Where private terms and D
    minimise the error, the residual is orthogonal to the private spaces and to the term, so that the error does not
    rise by more; by less where private terms find something better in the residual. Pool columns are
    of unit norm. With B~_i A~_i = U diag(S) V^T, x = U^T b_j, y = V^T a_j and x', y' the norms of what b_j and a_j have
    outside U and V, the singular values are those of the (q + 1) x (q + 1) matrix
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
    """Coordinates x (L, q, R) of unit vectors -> (L, R, q + 1), the norm of the rest beside them."""
    rest = (1 - (x * x).sum(1, keepdim=True)).clamp_min(0).sqrt()
    return torch.cat([x, rest], 1).mT
