"""A plain search for e_rasa(k) in numpy, written from the definition: nothing of the package is used.

RaSA's updates are a sum of T = L q + R = L r terms b_t a_t^T d_t over the layers. The R terms of the pool are in all
layers, the L q private terms in one each. With a mask of zeros and ones over (L, T),

    X_i = sum_t mask_it d_it b_t a_t^T,    minimise sum_i ||M_i - X_i||_F^2    over B (b, T), A (a, T), D (L, T),

such that ||d_ij b_j a_j^T|| <= c ||M_i|| for all terms j of the pool, and ||B~_i A~_i||_F <= c ||M_i|| for the sum of
the private terms of each layer. Without the bound the infimum need not be attained: terms grow and cancel.

The search is by brute force. Each start runs 40 sweeps of alternating least squares, then L-BFGS, without the bound.
Where that ends outside of it, the point is moved inside, and L-BFGS runs again with a penalty on terms that are too
large. The point is moved inside once more, and improved by least squares steps that stay there. Only points that keep
the bound count. The three lowest points go through the same again, as long as it helps: by trial the way out of the
bound and back leads to lower errors than the penalty from the beginning.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

Array = np.ndarray[Any, np.dtype[np.float64]]
Random = np.random.Generator
Point = tuple[Array, Array, Array]
"""B (b, T), A (a, T) and D (L, T), zero outside the mask."""

LIMIT = 8.0
"""The bound c, that of the solver's default."""
KINDS_OF_STARTS = ("normal", "small pool", "allocation", "greedy", "common subspaces")


class Model:
    """Masked CP of a stack M (L, b, a): first L q private terms, q of each layer in order, then R shared ones."""

    def __init__(self, M: Array, rank: int, k: int, limit: float = LIMIT) -> None:
        self.M, self.rank, self.limit = M, rank, limit
        self.L, self.b, self.a = M.shape
        self.q, self.R = rank - k, self.L * k
        self.T = self.L * self.q + self.R
        self.mask = np.concatenate([np.kron(np.eye(self.L), np.ones((1, self.q))), np.ones((self.L, self.R))], 1)
        self.own = np.array([np.flatnonzero(row) for row in self.mask])  # the q + R terms of each layer
        self.norms = np.linalg.norm(M, axis=(1, 2))
        tail = np.linalg.svd(M, compute_uv=False)[:, rank:]
        self.e_lora = max(float((tail**2).sum()), 1e-9 * float((self.norms**2).sum()))
        self.private, self.pool = slice(0, self.L * self.q), slice(self.L * self.q, self.T)

    # ---- the objective

    def residual(self, point: Point) -> Array:
        """E_i = M_i - B diag(d_i) A^T: (L, b, a)."""
        B, A, D = point
        X = (D[:, None, :] * B).reshape(self.L * self.b, self.T) @ A.T
        E: Array = self.M - X.reshape(self.M.shape)
        return E

    def error(self, point: Point) -> float:
        return float((self.residual(point) ** 2).sum())

    def gradients(self, E: Array, point: Point) -> Point:
        """Minus half the derivatives of the error by B, A, D: sum_i E_i A D_i, sum_i E_i^T B D_i, b_t^T E_i a_t."""
        B, A, D = point
        EA = (E.reshape(-1, self.a) @ A).reshape(self.L, self.b, self.T)
        DB = (D[:, None, :] * B).reshape(-1, self.T)
        return (EA * D[:, None, :]).sum(0), E.reshape(-1, self.a).T @ DB, (EA * B).sum(1) * self.mask

    # ---- the bound

    def sizes(self, point: Point) -> tuple[Array, Array]:
        """Squared norms over the largest allowed: of pool terms (L, R), and of the layers' private parts (L,)."""
        B, A, D = point
        BB, AA = (B**2).sum(0), (A**2).sum(0)
        largest = (self.limit * self.norms) ** 2
        pool = (D[:, self.pool] ** 2) * (BB * AA)[self.pool] / largest[:, None]
        gram = (B.T @ B) * (A.T @ A)
        P = D[:, self.private]
        private = ((P @ gram[self.private, self.private]) * P).sum(1) / largest
        return pool, private

    def is_inside(self, point: Point) -> bool:
        return self.largest(point) <= 1

    def largest(self, point: Point) -> float:
        """The largest of all sizes."""
        return max(float(part.max(initial=0.0)) for part in self.sizes(point))

    def penalty(self, point: Point) -> tuple[float, Point]:
        """sum (size - 0.98)_+^2 over all sizes, which aims 1 % inside the bound, and half its gradient."""
        B, A, D = point
        largest = (self.limit * self.norms) ** 2
        pool, private = (np.maximum(part - 0.98, 0) for part in self.sizes(point))
        value = float((pool**2).sum() + (private**2).sum())
        if value == 0:
            return 0.0, (np.zeros_like(B), np.zeros_like(A), np.zeros_like(D))
        BB, AA = (B**2).sum(0), (A**2).sum(0)
        p = 2 * pool / largest[:, None]
        Dp = D[:, self.pool]
        by_term = (p * Dp**2).sum(0)
        gB, gA, gD = np.zeros_like(B), np.zeros_like(A), np.zeros_like(D)
        gB[:, self.pool] = B[:, self.pool] * (by_term * AA[self.pool])
        gA[:, self.pool] = A[:, self.pool] * (by_term * BB[self.pool])
        gD[:, self.pool] = p * Dp * (BB * AA)[self.pool]
        # the private part: sum_i w_i sum_tu P_it P_iu (B^T B)_tu (A^T A)_tu
        P = D[:, self.private]
        w = 2 * private / largest
        PP = (P * w[:, None]).T @ P
        GB, GA = (F[:, self.private].T @ F[:, self.private] for F in (B, A))
        gB[:, self.private] = B[:, self.private] @ (PP * GA)
        gA[:, self.private] = A[:, self.private] @ (PP * GB)
        gD[:, self.private] = w[:, None] * (P @ (GB * GA)) * self.mask[:, self.private]
        return value, (gB, gA, gD)

    def moved_inside(self, point: Point) -> Point:
        """Clip the d_ij of the pool, and scale down the private parts that are too large."""
        B, A, D = point
        pool, private = self.sizes(point)
        D = D.copy()
        D[:, self.pool] /= np.sqrt(np.maximum(pool * (1 + 1e-9), 1))
        D[:, self.private] /= np.sqrt(np.maximum(private * (1 + 1e-9), 1))[:, None]
        return B, A, D

    # ---- descent

    def least_squares_step(self, axis: int, point: Point) -> Point:
        """The change of one factor (0: B, 1: A, 2: D) to its least squares solution, a ridge of rounding size apart."""
        B, A, D = point
        g = self.gradients(self.residual(point), point)[axis]
        if axis < 2:
            other = (B, A)[1 - axis]
            step = np.linalg.solve(ridged((other.T @ other) * (D.T @ D)), g.T).T
        else:
            gram = (B.T @ B) * (A.T @ A)
            step = np.zeros_like(D)
            grams = gram[self.own[:, :, None], self.own[:, None, :]]
            solved = np.linalg.solve(ridged(grams), np.take_along_axis(g, self.own, 1)[:, :, None])[:, :, 0]
            np.put_along_axis(step, self.own, solved, 1)
        steps: list[Array] = [np.zeros_like(F) for F in point]
        steps[axis][:] = step
        return steps[0], steps[1], steps[2]

    def sweeps(self, point: Point, count: int, inside: bool = False) -> Point:
        """Alternating least squares for D, B and A. `inside`: a step that leaves the bound is halved until it stays."""
        for _ in range(count):
            for axis in (2, 0, 1):
                step = self.least_squares_step(axis, point)
                following = added(point, step, 1.0)
                if inside:
                    halves = 0
                    while halves < 12 and not self.is_inside(following):
                        halves += 1
                        following = added(point, step, 0.5**halves)
                    if halves == 12:
                        continue
                point = following
            point = balanced(point)
        return point

    def quasi_newton(self, point: Point, iterations: int, weight: float = 0.0) -> Point:
        """L-BFGS on B, A and D, in units of LoRA's error, with `weight` times the penalty. D keeps its zeros."""
        ends = np.cumsum([F.size for F in point])

        def unpacked(x: Array) -> Point:
            B, A, D = x[: ends[0]], x[ends[0] : ends[1]], x[ends[1] :]
            return B.reshape(self.b, self.T), A.reshape(self.a, self.T), D.reshape(self.L, self.T)

        def packed(factors: Point) -> Array:
            return np.concatenate([F.ravel() for F in factors])

        def cost(x: Array) -> tuple[float, Array]:
            here = unpacked(x)
            E = self.residual(here)
            value, slope = float((E**2).sum()) / self.e_lora, packed(self.gradients(E, here)) * (-2 / self.e_lora)
            if weight:
                more, gradients = self.penalty(here)
                if more:
                    value, slope = value + weight * more, slope + 2 * weight * packed(gradients)
            return value, slope

        options = {"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 10, "ftol": 1e-10, "gtol": 1e-7}
        minimum = minimize(cost, packed(balanced(point)), jac=True, method="L-BFGS-B", options=options)
        return unpacked(minimum.x)


def added(point: Point, step: Point, factor: float) -> Point:
    B, A, D = (F + factor * S for F, S in zip(point, step, strict=True))
    return B, A, D


def ridged(G: Array) -> Array:
    """G + 1e-13 trace(G) I, so that a singular matrix of normal equations can be solved."""
    trace = np.trace(G, axis1=-2, axis2=-1)[..., None, None]
    ridge: Array = G + (1e-13 * trace + 1e-300) * np.eye(G.shape[-1])
    return ridge


def balanced(point: Point) -> Point:
    """The same terms with b_t, a_t and d_t of equal norm."""
    norms = np.array([np.linalg.norm(F, axis=0) for F in point])
    safe = np.where(norms > 0, norms, 1)
    B, A, D = (F * (np.prod(norms, 0) ** (1 / 3) / n) for F, n in zip(point, safe, strict=True))
    return B, A, D


# ---- starts


def start(model: Model, kind: str, rng: Random) -> Point:
    """A point to start from."""
    L, b, a, R = model.L, model.b, model.a, model.R
    normal = rng.standard_normal
    if kind == "normal":
        scale = (10 ** rng.uniform(-2, 0) * np.linalg.norm(model.norms) / (L * model.rank * b * a) ** 0.5) ** (1 / 3)
        return normal((b, model.T)) * scale, normal((a, model.T)) * scale, normal((L, model.T)) * scale * model.mask
    if kind == "small pool":
        size = 10 ** rng.uniform(-3, 0)
        B, A, D = normal((b, R)) / b**0.5, normal((a, R)) / a**0.5, size * normal((L, R)) * model.norms[:, None]
        return with_private(model, B, A, D)
    if kind == "allocation":
        return allocation(model, 10 ** rng.uniform(-3, 0.5), rng)
    if kind == "greedy":
        return greedy(model, rng)
    return common_subspaces(model, rng)


def with_private(model: Model, B: Array, A: Array, D: Array) -> Point:
    """Pool B (b, R), A (a, R), D (L, R), and the q leading dyads of each layer's residual."""
    U, S, Vt = np.linalg.svd(model.M - (D[:, None] * B) @ A.T, full_matrices=False)
    q = model.q
    own_B = (U * S[:, None])[:, :, :q].transpose(1, 0, 2).reshape(model.b, -1)
    own_A = Vt[:, :q].reshape(-1, model.a).T
    full = np.concatenate([np.ones((model.L, model.L * q)), D], 1) * model.mask
    return np.concatenate([own_B, B], 1), np.concatenate([own_A, A], 1), full


def allocation(model: Model, noise: float, rng: Random) -> Point:
    """The pool holds the R largest dyads of all layers that are not among the q leading ones of their layer."""
    U, S, Vt = np.linalg.svd(model.M, full_matrices=False)
    rest = S.copy()
    rest[:, : model.q] = -1
    order = np.argsort(rest, axis=None)[::-1][: model.R]
    layers, terms = np.unravel_index(order, rest.shape)
    B, A = U[layers, :, terms].T, Vt[layers, terms].T
    D = np.zeros((model.L, model.R))
    D[layers, np.arange(len(layers))] = np.maximum(S[layers, terms], 0)
    B, A, D = (
        F + noise * size * rng.standard_normal(F.shape)
        for F, size in ((B, model.b**-0.5), (A, model.a**-0.5), (D, S[:, model.rank - 1].mean()))
    )
    return with_private(model, B, A, D)


def greedy(model: Model, rng: Random) -> Point:
    """Terms one by one, each the best of a few power iterations on the residual; private dyads before or after."""
    E = model.M.copy()
    if rng.random() < 0.5:
        U, S, Vt = np.linalg.svd(E, full_matrices=False)
        E -= (U * S[:, None])[:, :, : model.q] @ Vt[:, : model.q]
    B, A, D = np.zeros((model.b, model.R)), np.zeros((model.a, model.R)), np.zeros((model.L, model.R))
    for j in range(model.R):
        d, v = rng.standard_normal(model.L), rng.standard_normal(model.a)
        for _ in range(10):
            u = np.tensordot(d, E, 1) @ v
            u /= np.linalg.norm(u) + 1e-300
            v = np.tensordot(d, E, 1).T @ u
            v /= np.linalg.norm(v) + 1e-300
            d = E @ v @ u
        B[:, j], A[:, j], D[:, j] = u, v, d
        E -= d[:, None, None] * np.outer(u, v)
    return with_private(model, B, A, D)


def common_subspaces(model: Model, rng: Random) -> Point:
    """A pool of random mixtures of the directions that the layers' leading subspaces have most in common."""
    U, S, Vt = np.linalg.svd(model.M, full_matrices=False)
    m = min(model.q + model.R, S.shape[1])
    weights = S[:, :m] if rng.random() < 0.5 else np.ones((model.L, m))
    left = np.concatenate(list(U[:, :, :m] * weights[:, None]), 1)
    right = np.concatenate(list(Vt[:, :m].swapaxes(1, 2) * weights[:, None]), 1)
    B, A = (
        (bases := np.linalg.svd(side, full_matrices=False)[0][:, : model.R])
        @ rng.standard_normal((bases.shape[1], model.R))
        for side in (left, right)
    )
    B, A = B / np.linalg.norm(B, axis=0), A / np.linalg.norm(A, axis=0)
    gram = (B.T @ B) * (A.T @ A)
    D = np.linalg.solve(ridged(gram), np.einsum("bt,lba,at->tl", B, model.M, A)).T
    return with_private(model, B, A, D)


# ---- the search


@dataclass
class Result:
    """Squared errors: the lowest of all, the lowest without the bound, and the end of each start in order.

    `cancellation` is the largest norm of a term at the best point over ||M_i||. `start` is the kind of its start.
    `seconds` are of the processor.
    """

    error: float
    unbounded: float
    errors: list[float]
    start: str
    cancellation: float
    seconds: float
    point: Point


def descended(model: Model, point: Point, iterations: int) -> tuple[Point, float]:
    """A lower point inside the bound, and the squared error that was reached without it."""
    ended = model.quasi_newton(point, iterations)
    error = model.error(ended)
    if not model.is_inside(ended):
        ended = model.quasi_newton(model.moved_inside(ended), iterations, weight=1.0)
        ended = model.sweeps(model.moved_inside(ended), 3, inside=True)
    return ended, min(error, model.error(ended))


def search(
    M: Array, rank: int, k: int, starts: int = 50, seed: int = 0, sweeps: int = 40, iterations: int = 600
) -> Result:
    """The lowest errors of `starts` starts, whose kinds take turns, on a stack M (L, b, a)."""
    model, began = Model(M, rank, k), time.process_time()
    ends: list[tuple[float, str, Point]] = []
    unbounded = np.inf
    for n in range(starts):
        kind = KINDS_OF_STARTS[n % len(KINDS_OF_STARTS)]
        begin = balanced(start(model, kind, np.random.default_rng((seed, n))))
        point, error = descended(model, model.sweeps(begin, sweeps), iterations)
        ends.append((model.error(point), kind, point))
        unbounded = min(unbounded, error)
    best = ends[0]
    for lowest, kind, end in sorted(ends, key=lambda end: end[0])[:3]:
        point = end
        for _ in range(5):
            following, error = descended(model, point, iterations)
            unbounded, after = min(unbounded, error), model.error(following)
            if after > lowest * (1 - 1e-5):
                break
            point, lowest = following, after
        best = min(best, (lowest, kind, point), key=lambda end: end[0])
    freed = model.quasi_newton(best[2], 5 * iterations)
    unbounded = min(unbounded, model.error(freed))
    if not model.is_inside(best[2]):
        raise ArithmeticError("the best point lies outside the bound")
    return Result(
        error=best[0], unbounded=unbounded, errors=[error for error, *_ in ends], start=best[1],
        cancellation=model.limit * model.largest(best[2]) ** 0.5, seconds=time.process_time() - began, point=best[2],
    )  # fmt: skip
