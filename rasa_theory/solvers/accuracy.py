"""The accuracy of errors at given factors, and the cancellation of their terms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.linalg import batched
from rasa_theory.problem import LayerStack, RasaFactors, squared_error


def _pool_term_norms(factors: RasaFactors) -> Tensor:
    """|d_ij| ||b_j|| ||a_j||: (L, R)."""
    nB = torch.linalg.vector_norm(factors.shared_B, dim=0)
    nA = torch.linalg.vector_norm(factors.shared_A, dim=1)
    norms: Tensor = factors.mixing.abs() * (nB * nA)
    return norms


def term_norms(factors: RasaFactors) -> Tensor:
    """Per layer, the sum of the norms of its pool terms, sum_j |d_ij| ||b_j|| ||a_j||: (L,)."""
    return _pool_term_norms(factors).sum(1)


def layer_term_norms(factors: RasaFactors) -> Tensor:
    """Per layer, ||B~_i|| ||A~_i|| plus the norms of its pool terms: (L,)."""
    private: Tensor = torch.linalg.matrix_norm(factors.private_B) * torch.linalg.matrix_norm(factors.private_A)
    return private + term_norms(factors)


def cancellation(stack: LayerStack, factors: RasaFactors) -> float:
    """The largest norm of B~_i A~_i or of a pool term d_ij b_j a_j^T in any layer, over ||M_i|| as in `layer_sizes`.

    At most about 1 where nothing cancels.
    """
    return largest_excess(factors, layer_sizes(stack))


def layer_sizes(stack: LayerStack) -> Tensor:
    """||M_i|| of the layers held, or the rounding level of the stack where that is larger, (L,) in float64."""
    return stack.layer_norms(torch.float64).clamp_min(stack.rounding)


def largest_excess(factors: RasaFactors, limits: Tensor) -> float:
    """The largest norm of B~_i A~_i or of a pool term of layer i over `limits` (L,), where 0 counts as 1."""
    Bt, At, *_ = factors.named().values()
    private = ((Bt.mT @ Bt) * (At @ At.mT)).sum((1, 2)).clamp_min(0).sqrt()
    terms = torch.cat([private[:, None], _pool_term_norms(factors)], 1).amax(1)
    return factors.sharding.all_reduce_max(terms / torch.where(limits > 0, limits, 1))


def term_size(stack: LayerStack, factors: RasaFactors) -> float:
    """||M|| plus the norms of all terms of the updates: in units of norm, larger than ||M|| where terms cancel."""
    squares = (layer_term_norms(factors.to(dtype=torch.float64)) / stack.scale) ** 2
    terms = factors.sharding.all_reduce(batched.total(squares))
    return (math.sqrt(stack.unit().norm_squared) + math.sqrt(float(terms))) * stack.scale


def measurable(stack: LayerStack, factors: RasaFactors, eps: float | None = None) -> float:
    """The tolerance of an error measured at `factors`, in units of norm.

    Updates are accurate to eps times the size of their terms, not of their sum: `stack.rounding` where no terms cancel.
    `eps` is the stack's unless another precision was used.
    """
    return linalg.rounding(term_size(stack, factors), stack.shape, stack.eps if eps is None else eps)


def unresolved(stack: LayerStack, factors: RasaFactors) -> float:
    """How far from an exact fit sweeps may end by rounding, in units of norm.

    They take no step along b^T E_i a below `residual_noise`. For each of the q + R terms these are b + a numbers. Where
    columns of the pool are nearly dependent, a residual in their span exceeds these numbers by up to 1/sigma. Here
    sigma is the smallest singular value of the unit columns, or of the unit rows if it is larger.
    """
    terms = factors.private_B.shape[2] + factors.shared_B.shape[1]
    size = torch.tensor([term_size(stack, factors)], dtype=torch.float64)
    noise = float(residual_noise(size, factors.to(torch.float64))) * stack.eps / torch.finfo(torch.float64).eps
    sigma = max(_smallest_singular_value(side, stack.eps) for side in (factors.shared_B.mT, factors.shared_A))
    return math.sqrt(terms * sum(stack.shape)) * noise / sigma


def _smallest_singular_value(vectors: Tensor, eps: float) -> float:
    """The smallest singular value of the rows of `vectors` (R, n), made unit vectors: at most 1.

    Below sqrt(eps) of the largest the rows count as dependent: a fit through such a direction would have terms that
    cancel to nothing, and an allowance for it would pass everything.
    """
    norms = torch.linalg.vector_norm(vectors.to(torch.float64), dim=1, keepdim=True)
    values: list[float] = torch.linalg.svdvals(vectors / torch.where(norms > 0, norms, 1)).tolist()
    threshold = math.sqrt(eps) * max(values, default=0.0)
    return min([1.0, *(value for value in values if value > threshold)])


def trusted_error(unit: LayerStack, factors: RasaFactors, error: float) -> float:
    """`error`, a squared error that was put together from products, or the direct residual where rounding could show.

    Let T be the squared norms of M and of the pool's terms; a private term is at most as large as M_i. The rounding
    error eps T stays below `LayerStack.rounding` in norm as long as T <= 20 max(b, a) ||M|| ||E||. From a fifth of that
    on the residual is computed, which costs a pass.
    """
    norm = math.sqrt(unit.norm_squared)
    size = norm**2 + float(factors.sharding.all_reduce(batched.total(term_norms(factors) ** 2)))
    if size <= 4 * max(unit.shape) * norm * math.sqrt(max(error, 0.0)):
        return error
    return squared_error(unit, factors)


def residual_noise(sizes: Tensor, factors: RasaFactors) -> Tensor:
    """Rounding error of b^T E_i a for unit b, a, when it is put together from products: (L,).

    `sizes` (L,) are at least ||M_i|| + ||B~_i A~_i|| + sum_j |d_ij| ||b_j|| ||a_j||. Each of the three is a sum over b
    or a entries, whose rounding errors add up like their square root; the factor 4 covers the several products that
    lead to each. Too small a value does harm: in a direction of eigenvalue w, noise e in g costs e^2 / w.
    """
    b, a = factors.shared_B.shape[0], factors.shared_A.shape[1]
    return 4 * math.sqrt(max(b, a)) * float(torch.finfo(factors.mixing.dtype).eps) * sizes
