"""Branch and bound over a few angles: the least error of tiny stacks, proved to a tolerance.

For k = r all terms are of the pool, and e_rasa(k) is the distance of the tensor from those of CP rank R. Its closure is
described by orthonormal frames, which are compact, so it does not matter that the infimum may not be attained:

- `two_terms`, R = L = 2: the tensor is projected on W (x) R^a for a plane W of R^b (x) R^2 that two product vectors
  b_j (x) d_j span. With b_1, d_1 and a unit vector u orthogonal to b_1, W is spanned by b_1 (x) d_1 and a vector of the
  span of u (x) d_1, b_1 (x) v, u (x) v, where v is orthogonal to d_1. *Every* such vector occurs, up to limits: it is
  tan(s) u (x) d_1 + tan(t) b_1 (x) v + tan(s) tan(t) u (x) v for b_2 = b_1 cos(s) + u sin(s) and d_2 alike. So the best
  one is an eigenvector, and the angles of (b_1, u) and d_1 are left: two for b = 2, four for b = 3.
- `three_terms`, slices of 3 x 3 and R = 3: B = Q R_B and A = R_A Z^T with triangular R_B and R_A make Q^T M_i Z upper
  triangular for all slices. For two slices the converse holds up to limits (a real generalised Schur form with separate
  eigenvalues is a CP decomposition), and the minimum is e_rasa; for more it is a lower bound. The first column of Z and
  the last of Q fix the rest by two eigenvectors: four angles.

The error is then const - sum_p S_pp - sum_m lambda_max(S[m, m]) with S = U^T K U, U = (Q (x) Z)[:, columns],
and Q and Z are products of Givens rotations. Within a box of half-widths h around its centre S is S_0 + sum_p t_p L_p
plus a remainder of spectral norm at most s (sum h)^2, where s is the largest minus the least eigenvalue of K: each
derivative is a commutator with a skew matrix of norm 1, so the first is at most s, and the second at most 2 s. What is
linear is added up over all parts of the error before its absolute value is taken. So bounds converge quadratically.

All is computed in float64 with an allowance for rounding, not in interval arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ALLOWANCE = 1e-11
"""Subtracted from every bound, in units of the squared norm of the tensor; rounding is about 1e-14."""


@dataclass(frozen=True)
class Chart:
    """Products of Givens rotations of R^n, one for each angle: `planes` from left to right, with ranges of angles."""

    n: int
    planes: tuple[tuple[int, int], ...]
    ranges: tuple[tuple[float, float], ...]

    @classmethod
    def of_lines(cls, n: int) -> Chart:
        """Rotations whose first column runs over all unit vectors of R^n, up to their sign."""
        planes = tuple((j, j + 1) for j in range(n - 2, -1, -1))
        if n == 2:
            return cls(n, planes, ((0.0, math.pi),))
        return cls(n, planes, ((0.0, 2 * math.pi), *((0.0, math.pi),) * (n - 3), (0.0, math.pi / 2)))

    @classmethod
    def of_frames(cls, n: int) -> Chart:
        """Rotations whose first two columns run over all orthonormal pairs of R^n, n <= 3, up to their signs."""
        lines = cls.of_lines(n)
        return lines if n == 2 else cls(n, (*lines.planes, (1, 2)), (*lines.ranges, (0.0, math.pi)))

    def rotations(self, angles: Array) -> tuple[Array, list[Array]]:
        """The rotations (m, n, n) at `angles` (m, number of planes), and their derivative by each angle."""
        eye = np.broadcast_to(np.eye(self.n), (len(angles), self.n, self.n))
        factors = [self._factor(p, angles[:, p], 0.0) for p in range(len(self.planes))]
        before, after = [eye], [eye]
        for factor in factors:
            before.append(before[-1] @ factor)
        for factor in reversed(factors):
            after.append(factor @ after[-1])
        after.reverse()
        slopes = [self._factor(p, angles[:, p] + math.pi / 2, 1.0) for p in range(len(self.planes))]
        return before[-1], [before[p] @ slope @ after[p + 1] for p, slope in enumerate(slopes)]

    def _factor(self, p: int, angle: Array, derived: float) -> Array:
        """One rotation; as its derivative, it is turned on by a right angle and vanishes outside of its plane."""
        i, j = self.planes[p]
        factor = np.zeros((len(angle), self.n, self.n))
        rest = np.arange(self.n)
        factor[:, rest, rest] = 1.0 - derived
        factor[:, i, i] = factor[:, j, j] = np.cos(angle)
        factor[:, j, i] = np.sin(angle)
        factor[:, i, j] = -factor[:, j, i]
        return factor


@dataclass(frozen=True)
class Elimination:
    """An error as a function of angles, the other unknowns being eliminated; see the module for the formula.

    `gram` is K. `columns` are pairs (column of Q, column of Z). `plain` are indices p into `columns`, and `blocks` are
    disjoint tuples m of at least two of them.
    """

    gram: Array
    constant: float
    left: Chart
    right: Chart
    columns: tuple[tuple[int, int], ...]
    plain: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]

    @property
    def ranges(self) -> Array:
        return np.array([*self.left.ranges, *self.right.ranges])

    def bounds(self, angles: Array, half: Array) -> tuple[Array, Array]:
        """The error at the centres `angles` (m, p), and lower bounds on it in boxes of half-widths `half` (m, p)."""
        S, slopes = self._reduced(angles)
        values = np.linalg.eigvalsh(self.gram)
        rest = float(values[-1] - values[0]) * half.sum(1) ** 2
        captured = S[:, self.plain, self.plain].sum(-1)
        gradient = slopes[:, :, self.plain, self.plain].sum(-1)
        gain = len(self.plain) * rest
        for block in self.blocks:
            i, j = np.ix_(block, block)
            top, slope, excess = largest_eigenvalue(S[:, i, j], slopes[:, :, i, j], half, rest)
            captured, gradient, gain = captured + top, gradient + slope, gain + excess
        error = self.constant - captured
        allowance = ALLOWANCE * float(np.trace(abs(self.gram)))
        return error, error - (half * abs(gradient)).sum(1) - gain - allowance

    def _reduced(self, angles: Array) -> tuple[Array, Array]:
        """S (m, c, c), and its derivatives (m, p, c, c)."""
        split = len(self.left.planes)
        Q, dQ = self.left.rotations(angles[:, :split])
        Z, dZ = self.right.rotations(angles[:, split:])
        of_Q, of_Z = ([pair[side] for pair in self.columns] for side in (0, 1))

        def frame(X: Array, Y: Array) -> Array:
            return (X[:, :, None, of_Q] * Y[:, None, :, of_Z]).reshape(len(X), -1, len(of_Q))

        U = frame(Q, Z)
        KU = self.gram @ U
        halves = [dU.transpose(0, 2, 1) @ KU for dU in (*(frame(X, Z) for X in dQ), *(frame(Q, Y) for Y in dZ))]
        return U.transpose(0, 2, 1) @ KU, np.stack([half + half.transpose(0, 2, 1) for half in halves], 1)


def largest_eigenvalue(S: Array, slopes: Array, half: Array, rest: Array) -> tuple[Array, Array, Array]:
    """The largest eigenvalue of S (m, c, c), its derivatives (m, p), and how far it rises above its linearisation.

    For |t_p| <= half_p and a symmetric X of norm at most `rest`, lambda_max(S + sum_p t_p slopes_p + X) is at most
    the eigenvalue plus sum_p t_p times its derivatives plus the excess, which is of second order.
    """
    values, vectors = np.linalg.eigh(S)
    turned = vectors[:, None].transpose(0, 1, 3, 2) @ slopes @ vectors[:, None]
    top, slope = values[:, -1], turned[:, :, -1, -1]
    # norms of the change between the first eigenvector and the others, and among the others
    across = np.linalg.norm((half[:, :, None] * abs(turned[:, :, :-1, -1])).sum(1), axis=1) + rest
    within = (half * np.linalg.norm(turned[:, :, :-1, :-1], axis=(2, 3))).sum(1) + rest
    # lambda_max of [[u, across], [across, v]] is u plus this function of the gap u - v, which falls with the gap
    gap = top - values[:, -2] - (half * abs(slope)).sum(1) - rest - within
    return top, slope, rest + (np.sqrt(gap**2 + 4 * across**2) - gap) / 2


# ------------------------------------------------------------------------------------------------ problems in angles


def two_terms(M: Array) -> Elimination:
    """The distance of (2, b, a), b <= 3, from CP rank 2."""
    L, b, a = M.shape
    if L != 2 or b > 3:
        raise ValueError(f"two slices of 2 or 3 rows are expected, got shape {M.shape}; transpose them")
    rows = M.transpose(1, 0, 2).reshape(b * L, a)
    gram = rows @ rows.T
    columns = ((0, 0), (0, 1), (1, 0), (1, 1))
    return Elimination(gram, float(np.trace(gram)), Chart.of_frames(b), Chart.of_lines(2), columns, (0,), ((1, 2, 3),))


def three_terms(M: Array) -> Elimination:
    """The distance of (n, 3, 3) from upper triangular slices Q^T M_i Z: e_rasa of CP rank 3 for n = 2, below it else.

    Below the diagonal are (3, 1), (2, 1) and (3, 2). The frames begin with the last column of Q, the first of Z.
    """
    if M.shape[1:] != (3, 3):
        raise ValueError(f"slices of 3 x 3 are expected, got shape {M.shape}")
    flat = M.reshape(len(M), 9)
    columns = ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2))
    return Elimination(-flat.T @ flat, 0.0, Chart.of_lines(3), Chart.of_lines(3), columns, (0,), ((1, 2), (3, 4)))


# ---------------------------------------------------------------------------------------------------- branch and bound


@dataclass(frozen=True)
class Enclosure:
    """The minimum is in [low, high]; `boxes` is the number of boxes that were bounded."""

    low: float
    high: float
    boxes: int


def enclose(
    problem: Elimination,
    high: float,
    tolerance: float,
    max_boxes: int,
    watch: Callable[[int, int], None] = lambda boxes, left: None,
) -> Enclosure:
    """Enclose the minimum to within `tolerance`, or as well as `max_boxes` boxes allow.

    `high` is an upper bound on the minimum that is known already, infinity if none is. All boxes of a generation are
    halved along their two longest edges.
    """
    ranges = problem.ranges
    counts = np.ceil((ranges[:, 1] - ranges[:, 0]) / 0.4).astype(int)
    widths = (ranges[:, 1] - ranges[:, 0]) / counts
    grid = np.meshgrid(
        *(low + (np.arange(n) + 0.5) * w for low, n, w in zip(ranges[:, 0], counts, widths, strict=True))
    )
    angles = np.stack([axis.ravel() for axis in grid], 1)
    half = np.broadcast_to(widths / 2, angles.shape).copy()
    done, discarded = 0, math.inf
    while True:
        lows = np.empty(len(angles))
        for part in (slice(n, n + 20_000) for n in range(0, len(angles), 20_000)):
            at_centre, lows[part] = problem.bounds(angles[part], half[part])
            high = min(high, float(at_centre.min()))
        done += len(angles)
        remaining = lows < high - tolerance
        discarded = min(discarded, float(lows[~remaining].min(initial=math.inf)))
        watch(done, int(remaining.sum()))
        if not remaining.any() or done + 4 * int(remaining.sum()) > max_boxes:
            return Enclosure(min(discarded, float(lows.min()), high), high, done)
        angles, half = angles[remaining], half[remaining]
        for _ in range(min(2, angles.shape[1])):
            angles, half = _halved(angles, half)


def _halved(angles: Array, half: Array) -> tuple[Array, Array]:
    """Both halves of each box along its longest edge."""
    each, longest = np.arange(len(half)), half.argmax(1)
    half = half.copy()
    half[each, longest] /= 2
    step = np.zeros_like(half)
    step[each, longest] = half[each, longest]
    return np.concatenate([angles - step, angles + step]), np.concatenate([half, half])
