"""Rank-safe solutions of least-squares increments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rasa_theory.distributed import LayerSharding
from rasa_theory.linalg.dense import suitable_threads


def solve_increment(gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor) -> Tensor:
    """x that lowers x^T G x - 2 x^T g as far as rounding lets one trust: (..., n, n), (..., n, m) -> (..., n, m).

    In the coordinates scaled by 1 / sqrt(size), where G is far from singular and the gain g^T G^-1 g, summed over the
    batch, at least four times what the rounding error of g costs, the solution of G x = g. Otherwise its minimum-norm
    solution restricted to the eigenvectors v of G for which
    - the eigenvalue exceeds the rounding error of G, 10 n eps, and
    - |v^T g| exceeds the rounding error of g.
    Along each that is kept the quadratic falls (by (v^T g)^2 / eigenvalue), so an update by such an x never raises the
    error, whatever the cut drops: the reason why updates are solved for their increment, from the residual's g.

    `size` (..., n) holds the diagonal that G would have without cancellation; entries of size 0 (dead columns) stay
    0. `noise` (..., n) is the rounding error of the rows of g, in norm. Batches broadcast.
    """
    s, scaled, y, variance = _in_units(gram, rhs, size, noise)
    x, sound = _by_cholesky(scaled, y, variance)
    if not bool(sound):
        x = _by_eigenvectors(scaled, y, variance)
    return s.unsqueeze(-1) * x


def solve_layers(
    gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor, sharding: LayerSharding, measure: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """x as from `solve_increment`, the batch one of layers, and the sum over all processes of `measure`(x), ().

    All take the same way, that of all L layers together; what decides it goes through the reduction of the measure.
    """
    s, scaled, y, variance = _in_units(gram, rhs, size, noise)
    x, regular, loss, gain = _cholesky_solution(scaled, y, variance)
    x = s.unsqueeze(-1) * x
    value = measure(x)
    if sharding.alone:
        sound = regular & (4 * loss <= gain)
    else:
        irregular, loss, gain, value = sharding.all_reduce(torch.stack([(~regular).to(value.dtype), loss, gain, value]))
        sound = (irregular == 0) & (4 * loss <= gain)
    if bool(sound):
        return x, value
    x = s.unsqueeze(-1) * _by_eigenvectors(scaled, y, variance)
    return x, sharding.all_reduce(measure(x))


def increment_by_cholesky(gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What `solve_increment` returns where it takes G^-1 g, and whether it does (a boolean tensor).

    Nothing here waits for a GPU.
    """
    s, scaled, y, variance = _in_units(gram, rhs, size, noise)
    x, sound = _by_cholesky(scaled, y, variance)
    return s.unsqueeze(-1) * x, sound


def _in_units(gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s = 1 / sqrt(size), or 0, and G, g and the squared noise in the coordinates scaled by it."""
    s = torch.where(size > 0, size, 1).rsqrt() * (size > 0)
    return s, s.unsqueeze(-1) * gram * s.unsqueeze(-2), s.unsqueeze(-1) * rhs, (s * noise) ** 2


def _by_cholesky(gram: Tensor, y: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """G^-1 y, and whether it is to be trusted."""
    x, regular, loss, gain = _cholesky_solution(gram, y, variance)
    return x, regular & (4 * loss <= gain)


def _cholesky_solution(gram: Tensor, y: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G^-1 y, whether G is far from singular, and what rounding costs and the solution gains, summed over the batch.

    An error e of y leaves the quadratic e^T G^-1 e above its minimum: with independent entries of that variance,
    sum_j variance_j (G^-1)_jj.
    """
    n, eps = gram.shape[-1], torch.finfo(gram.dtype).eps
    with suitable_threads(gram):
        L, failed = torch.linalg.cholesky_ex(gram)
        eye = torch.eye(n, dtype=gram.dtype, device=gram.device).expand(gram.shape)
        K = torch.linalg.solve_triangular(L, eye, upper=False)  # L^-1
    Ky, inverse = K @ y, (K * K).sum(-2)  # the diagonal of G^-1
    loss, gain = (inverse * variance).sum(), (Ky * Ky).sum()
    regular = (failed == 0).all() & (inverse.sum(-1) < 1 / (100 * max(n, 1) * eps)).all()
    return K.mT @ Ky, regular, loss, gain


def _by_eigenvectors(gram: Tensor, y: Tensor, variance: Tensor) -> Tensor:
    n, eps = gram.shape[-1], torch.finfo(gram.dtype).eps
    with suitable_threads(gram):
        values, V = torch.linalg.eigh(gram)
    Vy = V.mT @ y  # (..., n, m)
    noise = ((V * V).mT @ variance.unsqueeze(-1)).squeeze(-1).sqrt()
    keep = (values > 10 * n * eps) & (torch.linalg.vector_norm(Vy, dim=-1) > noise)
    x: Tensor = V @ (torch.where(keep, 1 / torch.where(keep, values, 1), 0).unsqueeze(-1) * Vy)
    return x
