"""The energy that the leading terms of each layer hold, for all ranks at once, between certified bounds.

Small layers and products of thin factors are decomposed. For a large layer a search of bounded length is made, and the
bounds are as close as it makes them. Unlike in `leading`, no large layer is decomposed where its spectrum is flat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.linalg import Operator, orthogonal
from rasa_theory.problem.stack import LayerStack
from rasa_theory.problem.storage import Factored

GOAL = 1e-3
"""The search ends where the bounds of the greatest rank are this close, in units of ||M_i||^2."""
SMALL = 1024
"""Layers with at most so many rows or columns are decomposed, by the eigenvectors of the smaller Gram matrix."""
_DEPTH = 12  # blocks of a search: for pure noise of 2048 x 2048 the bounds of rank 128 are then 0.4 % apart
_BLOCK = 1 << 20  # entries of a block of rows in float64, 8 MiB: it stays in the cache for both products
_EPS = float(torch.finfo(torch.float64).eps)
_ROUNDING = 10 * _EPS  # times max(b, a) ||M||^2: of a Gram matrix, its eigenvalues and their sums


class LayerEnergies(NamedTuple):
    """The energy in the leading terms of a layer M (b, a), and its leading singular vectors, in float64.

    - `norm_squared`: ||M||_F^2.
    - `low`, `high`: bounds on sum_{j<=r} sigma_j^2 for r = 1, .., n, (n,) each, with n = min(rank, b, a). They are in
      squared units of M, and not above `norm_squared`.
    - `U`, `V`: about the leading left and right singular vectors, (b, d) and (a, d). Columns are 0 where the singular
      value is rounding noise.
    """

    norm_squared: float
    low: Tensor
    high: Tensor
    U: Tensor
    V: Tensor


def layer_energies(stack: LayerStack, rank: int, directions: int, failure: float) -> Iterator[LayerEnergies]:
    """Yield the energies of every local layer for ranks up to `rank`, with `directions` <= rank singular vectors.

    The bounds of one layer are wrong with probability `failure` at most, over random vectors that depend on the name of
    the stack and the number of the layer alone. One pass.
    """
    storage, first = stack.entries.storage, stack.sharding.first
    n = min(rank, *stack.shape)
    if isinstance(storage, Factored) and storage.B.shape[2] <= min(stack.shape):
        B, A = (storage.A.mT, storage.B.mT) if stack.transposed else (storage.B, storage.A)
        for B_i, A_i in zip(B, A, strict=True):
            yield _of_product(B_i.double(), A_i.double(), n, directions)
        return
    for i, _, M in stack.tiles(rows=stack.shape[0]):
        yield _of_matrix(M, n, directions, failure, linalg.stream("energies", stack.name, first + i))


def is_decomposed(shape: tuple[int, int], rank: int) -> bool:
    """Whether a layer (b, a) is so small against `rank` that it is decomposed, with bounds at rounding level."""
    side = min(shape)
    return side <= SMALL or linalg.depth_within(side, min(rank, side), _DEPTH) == 0


def _of_matrix(M: Tensor, n: int, directions: int, failure: float, generator: torch.Generator) -> LayerEnergies:
    """The energies of M (b, a), which is scaled by a power of two, so that squares stay in range."""
    if M.shape[0] < M.shape[1]:
        turned = _of_matrix(M.mT, n, directions, failure, generator)
        return turned._replace(U=turned.V, V=turned.U)
    size = _power_above(M)
    if size == 0:
        return _zero((M.shape[0], M.shape[1]), n, directions, M.device)
    b, a = M.shape
    norm_squared = math.fsum(float((torch.linalg.vector_norm(B, dim=1) ** 2).sum()) for B in _blocks(M, size))
    rounding = _ROUNDING * b * norm_squared
    found = None if is_decomposed((b, a), n) else _searched(M, size, norm_squared, n, failure, generator)
    if found is not None:
        low, high = found.ky_fan_sums(n)
        V = found.V[:, :directions]
    else:
        energies, V = _gram_eigenpairs(M, size)
        low, high = _within(energies[:n].cumsum(0), rounding)
        V = V[:, :directions]
    U = torch.cat([linalg.product(B, V) for B in _blocks(M, size)])
    lengths = torch.linalg.vector_norm(U, dim=0)
    noise = linalg.rounding(float(lengths[0]), (b, a), float(torch.finfo(M.dtype).eps))
    real = lengths > max(noise, math.sqrt(rounding))
    U, V = U / torch.where(real, lengths, 1) * real, V * real
    return _in_range(norm_squared, low, high, a, size**2, U, V)


def _blocks(M: Tensor, size: float) -> Iterator[Tensor]:
    """M / size in float64, in blocks of rows: a copy of a whole output layer would take gigabytes, and more time."""
    step = max(1, _BLOCK // M.shape[1])
    for start in range(0, M.shape[0], step):
        yield M[start : start + step].double() / size


def _searched(
    M: Tensor, size: float, norm_squared: float, n: int, failure: float, generator: torch.Generator
) -> linalg.Majorant | None:
    """The majorant of M^T M / size^2 from products; the search is in single precision, the certificate in float64."""
    single, power = (M, size) if M.dtype == torch.float32 else ((M / size).float(), 1.0)  # M as it is, uncopied

    def apply(X: Tensor) -> Tensor:
        if X.dtype == single.dtype:
            return linalg.product(single.mT, linalg.product(single, X).div_(power)).div_(power)
        result = torch.zeros_like(X)
        for B in _blocks(M, size):
            result += linalg.product(B.mT, linalg.product(B, X))
        return result

    b, a = M.shape
    S = Operator(apply, a, norm_squared, 1.1 * (b + a) * _EPS * norm_squared, single.dtype, M.device)
    return linalg.closest_majorant(S, n, GOAL * norm_squared, linalg.depth_within(a, n, _DEPTH), failure, generator)


def _gram_eigenpairs(M: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues of M^T M / size^2, falling and at least 0, and eigenvectors: (b, a) -> (a,), (a, a)."""
    gram = torch.zeros(M.shape[1], M.shape[1], dtype=torch.float64, device=M.device)
    for B in _blocks(M, size):
        gram += B.mT @ B
    values, vectors = linalg.symmetric_eigenpairs(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _of_product(B: Tensor, A: Tensor, n: int, directions: int) -> LayerEnergies:
    """The energies of B A, from its SVD in the span of the factors (b, m), (m, a), m <= min(b, a).

    At most m directions, also of a layer of zeros: all layers of a stack have equally many.
    """
    directions = min(directions, B.shape[1])
    sizes = _power_above(B), _power_above(A)
    if 0 in sizes:
        return _zero((B.shape[0], A.shape[1]), n, directions, B.device)
    U, S, Vh = orthogonal.product_svd(B / sizes[0], A / sizes[1])
    norm_squared = float((S**2).sum())
    rounding = _ROUNDING * max(B.shape[0], A.shape[1]) * norm_squared
    energies = torch.nn.functional.pad(S**2, (0, max(0, n - len(S))))[:n]
    real = S[:directions] ** 2 > rounding
    U, V = U[:, :directions] * real, Vh.mT[:, :directions] * real
    low, high = _within(energies.cumsum(0), rounding)
    return _in_range(norm_squared, low, high, len(S), (sizes[0] * sizes[1]) ** 2, U, V)


def _power_above(x: Tensor) -> float:
    """The power of two above the largest entry, 0 for zeros."""
    low, high = (float(bound) for bound in torch.aminmax(x))
    return math.ldexp(1.0, math.frexp(max(-low, high))[1]) if low < 0 or high > 0 else 0.0


def _within(energies: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    return energies - rounding, energies + rounding


def _zero(shape: tuple[int, int], n: int, directions: int, device: torch.device) -> LayerEnergies:
    """The energies of a layer of zeros (b, a)."""
    zeros, d = torch.zeros(n, dtype=torch.float64), min(directions, n)
    U, V = (torch.zeros(side, d, dtype=torch.float64, device=device) for side in shape)
    return LayerEnergies(0.0, zeros, zeros, U, V)


def _in_range(
    norm_squared: float, low: Tensor, high: Tensor, terms: int, unit: float, U: Tensor, V: Tensor
) -> LayerEnergies:
    """The energies in units of the input; M has `terms` singular terms, which hold all of the energy together."""
    low, high = (bound.clamp(0, norm_squared).cpu() for bound in (low, high))
    low[terms - 1 :] = high[terms - 1 :] = norm_squared
    return LayerEnergies(norm_squared * unit, low * unit, high * unit, U, V)
