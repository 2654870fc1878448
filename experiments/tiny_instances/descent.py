"""Thousands of Levenberg-Marquardt descents at once, from random starts: on all factors, or on triangular frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SCALES = (0.1, 0.3, 0.6)
"""Standard deviations of the entries of all factors at the start, for a stack of norm 1: a third of the starts each."""


@dataclass(frozen=True)
class Model:
    """RaSA factors of n descents as one array (n, parameters): B~, A~, B_S, D and A_S, one after the other."""

    L: int
    b: int
    a: int
    q: int
    R: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        L, b, a, q, R = self.L, self.b, self.a, self.q, self.R
        return (L, b, q), (L, q, a), (b, R), (L, R), (R, a)

    @property
    def parameters(self) -> int:
        return int(sum(np.prod(shape) for shape in self.shapes))

    def factors(self, x: Array) -> list[Array]:
        ends = np.cumsum([0, *(np.prod(shape) for shape in self.shapes)])
        return [x[:, i:j].reshape(len(x), *shape) for (i, j), shape in zip(pairwise(ends), self.shapes, strict=True)]

    def updates(self, x: Array) -> Array:
        """(n, L, b, a)."""
        Bt, At, B, D, A = self.factors(x)
        return Bt @ At + (B[:, None] * D[:, :, None]) @ A[:, None]

    def jacobian(self, x: Array) -> Array:
        """Derivatives of the updates, (n, parameters, L b a)."""
        L, b, a = (np.eye(size) for size in (self.L, self.b, self.a))
        Bt, At, B, D, A = self.factors(x)
        parts = (
            np.einsum("il,cd,niqa->nicqlda", L, b, At, optimize=True),
            np.einsum("il,nibq,cd->niqclbd", L, Bt, a, optimize=True),
            np.einsum("cd,nij,nja->ncjida", b, D, A, optimize=True),
            np.einsum("li,nbj,nja->nljiba", L, B, A, optimize=True),
            np.einsum("nbj,nij,cd->njcibd", B, D, a, optimize=True),
        )
        cells = self.L * self.b * self.a
        sizes = [int(np.prod(shape)) for shape in self.shapes]  # 0 for the private factors where q = 0
        return np.concatenate([part.reshape(len(x), n, cells) for part, n in zip(parts, sizes, strict=True)], 1)

    def balanced(self, x: Array) -> Array:
        """The same updates, the norms of the two or three factors of every term being equal."""
        Bt, At, B, D, A = self.factors(x)
        tiny = np.finfo(np.float64).tiny
        bt, at = np.linalg.norm(Bt, axis=2) + tiny, np.linalg.norm(At, axis=3) + tiny
        b, d, a = np.linalg.norm(B, axis=1) + tiny, np.linalg.norm(D, axis=1) + tiny, np.linalg.norm(A, axis=2) + tiny
        private, pool = np.sqrt(bt * at), np.cbrt(b * d * a)
        scaled = (
            Bt * (private / bt)[:, :, None], At * (private / at)[..., None],
            B * (pool / b)[:, None], D * (pool / d)[:, None], A * (pool / a)[:, :, None],
        )  # fmt: skip
        return np.concatenate([factor.reshape(len(x), -1) for factor in scaled], 1)

    def largest_terms(self, x: Array, norms: Array) -> Array:
        """The largest |d_ij| ||b_j|| ||a_j|| over the norm of layer i, (n,)."""
        _, _, B, D, A = self.factors(x)
        sizes = abs(D) * (np.linalg.norm(B, axis=1) * np.linalg.norm(A, axis=2))[:, None]
        largest: Array = (sizes / norms[:, None]).max((1, 2))
        return largest


@dataclass(frozen=True)
class Descents:
    """Squared errors (n,) of all descents over the squared norm of the stack.

    `capped` is the lowest squared error at any point of any descent whose pool terms are at most `cap` times the norm
    of their layers.
    """

    errors: Array
    capped: float


def descend(
    M: Array,
    rank: int,
    k: int,
    starts: int,
    iterations: int,
    seed: int,
    cap: float = 8.0,
    watch: Callable[[int], None] = lambda starts: None,
) -> Descents:
    """Descend from `starts` random starts; the best few go on for ten times the iterations, for slow valleys."""
    L, b, a = M.shape
    model = Model(L, b, a, rank - k, L * k)
    T = M / np.linalg.norm(M)
    rng = np.random.default_rng(seed)
    points, errors, capped, chunk = [], [], np.inf, 512
    for n in range(0, starts, chunk):
        m = min(chunk, starts - n)
        x = rng.standard_normal((m, model.parameters)) * np.resize(SCALES, (m, 1))
        x, error, lowest = _marquardt(model, T, x, iterations, cap)
        points.append(x)
        errors.append(error)
        capped = min(capped, lowest)
        watch(m)
    all_points, all_errors = np.concatenate(points), np.concatenate(errors)
    best = all_errors.argsort()[:16]
    _, all_errors[best], lowest = _marquardt(model, T, all_points[best], 10 * iterations, cap)
    return Descents(all_errors, min(capped, lowest))


def _marquardt(model: Model, T: Array, x: Array, iterations: int, cap: float) -> tuple[Array, Array, float]:
    """Points, squared errors, and the lowest one under the cap. Each descent has its own damping."""

    def residual(x: Array) -> Array:
        return (T - model.updates(x)).reshape(len(x), -1)

    norms = np.linalg.norm(T, axis=(1, 2))
    x = model.balanced(x)
    E = residual(x)
    error, damping, capped = (E**2).sum(1), np.full(len(x), 0.1), np.inf
    diagonal = np.arange(model.parameters)
    for _ in range(iterations):
        J = model.jacobian(x)
        H = J @ J.transpose(0, 2, 1)
        H[:, diagonal, diagonal] += damping[:, None]
        y = model.balanced(x + np.linalg.solve(H, J @ E[..., None])[..., 0])
        E_y = residual(y)
        error_y = (E_y**2).sum(1)
        lower = error_y < error
        x[lower], E[lower], error[lower] = y[lower], E_y[lower], error_y[lower]
        damping = np.where(lower, 0.3 * damping, 4 * damping).clip(1e-13, 1e6)
        within = model.largest_terms(x, norms) <= cap
        capped = min(capped, float(error[within].min(initial=np.inf)))
    return x, error, capped


def descend_frames(M: Array, starts: int, iterations: int, seed: int) -> Array:
    """Squared errors (starts,) over ||M||^2 of the best upper triangular Q^T M_i Z, for two slices M (2, n, n).

    Their infimum is that of CP rank n; see `branching`. Orthogonal Q and Z are compact: where factors of a descent grow
    without limit and the error creeps, frames converge. Steps turn Q and Z by Cayley transforms of skew matrices.
    """
    _, n, m = M.shape
    if len(M) != 2 or n != m:
        raise ValueError(f"two square slices are expected, got shape {M.shape}")
    T = M / np.linalg.norm(M)
    rng = np.random.default_rng(seed)
    Q, Z = (np.linalg.qr(rng.standard_normal((starts, n, n)))[0] for _ in range(2))
    i, j = np.tril_indices(n, -1)
    skew = np.zeros((len(i), n, n))
    skew[np.arange(len(i)), i, j], skew[np.arange(len(i)), j, i] = 1.0, -1.0

    def turned(X: Array, step: Array) -> Array:
        half = np.einsum("ng,gij->nij", step, skew) / 2
        Y: Array = X @ np.linalg.solve(np.eye(n) - half, np.eye(n) + half)
        return Y

    def slices(Q: Array, Z: Array) -> Array:
        S: Array = Q.transpose(0, 2, 1)[:, None] @ T @ Z[:, None]
        return S

    def below(S: Array) -> Array:
        F: Array = S[..., i, j].reshape(*S.shape[:-3], -1)
        return F

    S = slices(Q, Z)
    F, damping, diagonal = below(S), np.full(starts, 0.1), np.arange(2 * len(i))
    for _ in range(iterations):
        left = -skew[None, :, None] @ S[:, None]
        right = S[:, None] @ skew[None, :, None]
        J = below(np.concatenate([left, right], 1))
        H = J @ J.transpose(0, 2, 1)
        H[:, diagonal, diagonal] += damping[:, None]
        step = np.asarray(np.linalg.solve(H, J @ -F[..., None])[..., 0], dtype=np.float64)
        new_Q, new_Z = turned(Q, step[:, : len(i)]), turned(Z, step[:, len(i) :])
        new_S = slices(new_Q, new_Z)
        new_F = below(new_S)
        lower = (new_F**2).sum(1) < (F**2).sum(1)
        for old, new in ((Q, new_Q), (Z, new_Z), (S, new_S), (F, new_F)):
            old[lower] = new[lower]
        damping = np.where(lower, 0.3 * damping, 4 * damping).clip(1e-13, 1e6)
    errors: Array = (F**2).sum(1)
    return errors
