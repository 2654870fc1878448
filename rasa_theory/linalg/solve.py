"""Least-squares increments from normal equations that may be singular to rounding.

**The equation.** An update adds x to a block of factors. With the Gram matrix G and the gradient g of the residual, the
squared error changes by

    f(x) = tr(x^T G x) - 2 tr(x^T g).

All functions here lower f as far as rounding lets one trust.

**The scaling.** Columns of very unequal size are no reason to drop the small ones. So G and g are scaled by
s = 1 / sqrt(size) from both sides, where `size` is the diagonal that G would have without cancellation. The diagonal of
the scaled G is then about 1, and one tolerance fits all columns. A column of size 0 is dead and gets x = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory.distributed import LayerSharding
from rasa_theory.linalg.threads import suitable_threads

# Why not simply solve G x = g, or use a pseudo-inverse? Two kinds of directions would do harm:
# - Where an eigenvalue of G is within its rounding error, dividing by it gives an arbitrary length.
# - Where v^T g is within its rounding error, even its sign is arbitrary, and the step may go uphill.
# Both are cut in the eigenvectors v of G. Along every other v, f falls by (v^T g)^2 / eigenvalue. So no update by such
# an x raises the error, whatever the cut drops. This is why an update solves for its increment, from the residual's g:
# a solution for the whole block would lose what the cut drops.
#
# Cholesky factors are much cheaper than eigenvectors, and they are used where both cuts are idle:
# - trace(G^-1) < 1 / (_REGULAR n eps) implies that the least eigenvalue exceeds _REGULAR n eps, ten times the cut.
# - With _GAIN_PER_LOSS losses within the gain, f falls by three quarters of the gain or more, in expectation.
_RANK_CUT = 10  # in units of n eps: the rounding error of the eigenvalues of the scaled G, with a margin
_REGULAR = 100  # in units of n eps: ten times the cut
_GAIN_PER_LOSS = 4


class CholeskySolution(NamedTuple):
    """The solution of G x = g by Cholesky factors, and the quantities by which it is trusted.

    - x: G^-1 g.
    - regular: whether G is far from singular in the whole batch.
    - loss: expected amount that rounding of g costs, summed over the batch.
    - gain: g^T G^-1 g, the decrease of f at its minimum, summed over the batch.
    """

    x: Tensor
    regular: Tensor
    loss: Tensor
    gain: Tensor


def solve_increment(gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor) -> Tensor:
    """An x that lowers x^T G x - 2 x^T g as far as rounding permits: (..., n, n), (..., n, m) -> (..., n, m).

    It is G^-1 g in the scaled coordinates if G is far from singular there and the gain is at least four times the loss
    by rounding. Otherwise it is the minimum-norm solution in the span of the eigenvectors v of G for which

    - the eigenvalue exceeds the rounding error of G, 10 n eps, and
    - |v^T g| exceeds the rounding error of g.

    `size` (..., n) holds the diagonal that G would have without cancellation. `noise` (..., n) is the rounding error of
    the rows of g, in norm. Batches broadcast.
    """
    s, scaled, y, variance = _in_units(gram, rhs, size, noise)
    x, sound = solve_by_cholesky(scaled, y, variance)
    if not bool(sound):
        x = solve_by_eigenvectors(scaled, y, variance)
    return s.unsqueeze(-1) * x


def solve_layers(
    gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor, sharding: LayerSharding, measure: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return x as from `solve_increment` for a batch of layers, and the sum of `measure`(x), (), over all processes.

    All processes choose the same way, by the loss and gain of all L layers. Both travel in the reduction of the
    measure, so the choice costs no reduction of its own.
    """
    s, scaled, y, variance = _in_units(gram, rhs, size, noise)
    x, regular, loss, gain = cholesky_solution(scaled, y, variance)
    x = s.unsqueeze(-1) * x
    value = measure(x)
    if sharding.alone:
        sound = regular & (_GAIN_PER_LOSS * loss <= gain)
    else:
        irregular, loss, gain, value = sharding.all_reduce(torch.stack([(~regular).to(value.dtype), loss, gain, value]))
        sound = (irregular == 0) & (_GAIN_PER_LOSS * loss <= gain)
    if bool(sound):
        return x, value
    x = s.unsqueeze(-1) * solve_by_eigenvectors(scaled, y, variance)
    return x, sharding.all_reduce(measure(x))


def increment_by_cholesky(gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """G^-1 g for the arguments of `solve_increment`, and a boolean tensor: True if `solve_increment` returns the same.

    Nothing here waits for a GPU.
    """
    s, scaled, y, variance = _in_units(gram, rhs, size, noise)
    x, sound = solve_by_cholesky(scaled, y, variance)
    return s.unsqueeze(-1) * x, sound


def _in_units(gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s = 1 / sqrt(size), or 0 where size is 0, and G, g and the squared noise in the coordinates scaled by s."""
    s = torch.where(size > 0, size, 1).rsqrt() * (size > 0)
    return s, s.unsqueeze(-1) * gram * s.unsqueeze(-2), s.unsqueeze(-1) * rhs, (s * noise) ** 2


def solve_by_cholesky(gram: Tensor, y: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """G^-1 y in scaled coordinates, and a boolean tensor: True if it can be trusted."""
    x, regular, loss, gain = cholesky_solution(gram, y, variance)
    return x, regular & (_GAIN_PER_LOSS * loss <= gain)


def cholesky_solution(gram: Tensor, y: Tensor, variance: Tensor) -> CholeskySolution:
    """Solve G x = y by Cholesky factors; `variance` (..., n) is the squared rounding error of the rows of y.

    An error e of y leaves the quadratic e^T G^-1 e above its minimum. The loss is the expected value of this for
    independent entries: sum_j variance_j (G^-1)_jj.
    """
    n, eps = gram.shape[-1], torch.finfo(gram.dtype).eps
    with suitable_threads(gram):
        L, failed = torch.linalg.cholesky_ex(gram)
        eye = torch.eye(n, dtype=gram.dtype, device=gram.device).expand(gram.shape)
        K = torch.linalg.solve_triangular(L, eye, upper=False)  # L^-1
    Ky, inverse = K @ y, (K * K).sum(-2)  # the diagonal of G^-1
    loss, gain = (inverse * variance).sum(), (Ky * Ky).sum()
    regular = (failed == 0).all() & (inverse.sum(-1) < 1 / (_REGULAR * max(n, 1) * eps)).all()
    return CholeskySolution(K.mT @ Ky, regular, loss, gain)


def solve_by_eigenvectors(gram: Tensor, y: Tensor, variance: Tensor) -> Tensor:
    """Minimum-norm solution of G x = y in the eigenvectors of G that rounding leaves meaningful: (..., n, m)."""
    n, eps = gram.shape[-1], torch.finfo(gram.dtype).eps
    with suitable_threads(gram):
        values, V = torch.linalg.eigh(gram)
    Vy = V.mT @ y  # (..., n, m)
    noise = ((V * V).mT @ variance.unsqueeze(-1)).squeeze(-1).sqrt()
    keep = (values > _RANK_CUT * n * eps) & (torch.linalg.vector_norm(Vy, dim=-1) > noise)
    x: Tensor = V @ (torch.where(keep, 1 / torch.where(keep, values, 1), 0).unsqueeze(-1) * Vy)
    return x
