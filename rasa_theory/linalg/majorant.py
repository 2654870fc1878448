"""Upper bounds on sums of eigenvalues of a symmetric matrix that is only applied, with a certificate.

S (n, n) is symmetric, V (n, w) has orthonormal columns, Theta = V^T S V, Rho = S V - V Theta, and tau is at least the
largest eigenvalue of H = (I - V V^T) S (I - V V^T). For every t > tau, t >= 0,

    S <= t I + V (Theta - t I + Rho^T Rho / (t - tau)) V^T,

which is a `Majorant`. Proof: in the basis [V, W], where W completes V to an orthonormal basis, the right side less S
has the blocks Rho^T Rho / (t - tau), -Rho^T W, and t I - W^T S W >= (t - tau) I. Its Schur complement is at least
Rho^T Rho / (t - tau) - Rho^T W W^T Rho / (t - tau) = 0. Sums of leading eigenvalues rise with the matrix.

**tau.** Omega (n, p) has independent normal entries, drawn after V. H has the largest eigenvalue lambda with unit
eigenvector u. ||u^T Omega||^2 is chi^2_p: it falls below its quantile c with the allowed probability of failure.
Otherwise, for Y_k = T_k(2 H / beta - I) Omega, T_k the Chebyshev polynomial, any beta > 0, and lambda >= beta,

    ||H Y_k||_F >= lambda T_k(2 lambda / beta - 1) sqrt(c),

for every k and beta at once, whether H has negative eigenvalues or not: these can only raise the left side. Solving
for lambda gives tau (or beta itself, if larger). See `lanczos` for the sources.

**Rounding.** A computed product S X is off by at most e ||X||_F, `Operator.error`. V is orthonormal to sqrt(w) n eps in
norm (checked). So Theta, Rho, and a product with H (per unit of ||Y||) are off by less than
d = 4 sqrt(w) (e + n eps ||S||_F). KF_m changes by at most sqrt(m) d. Rho^T Rho is replaced by
1.1 Rho^T Rho + 11 d^2 I. A step of the recurrence is off by 8 (d / beta + eps (1 + ||S||_F / beta)) times
||Y_j|| + ||Y_{j-1}||. Such an error reaches Y_k through U_{k-1-j}, which is at most k T_k where the argument is at
least 1. So sqrt(c) becomes sqrt(c) less k times the sum of these errors, and ||H Y_k|| becomes ||H Y_k|| + d ||Y_k||.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import scipy.special
import torch
from torch import Tensor

from rasa_theory.linalg import dense, orthogonal
from rasa_theory.linalg.chebyshev import largest_argument
from rasa_theory.linalg.krylov import BlockLanczos, Operator

PROBES = 16  # p, the number of columns of Omega
ATTEMPTS = 2  # number of bases before the matrix is decomposed
STEPS = 40  # greatest number of steps of the recurrence

# The numbers below decide how often a certificate is reached and how much work it takes, not whether it is valid.
SEARCH_SHARE = 0.15  # of the goal that the search aims at, so that tau and rounding have the rest
BETA_ABOVE_LAST = 0.05  # position of beta from the last Ritz value to the m-th
_LEAST_GAP = 1e-10  # of the eigenvalue that decides, where eigenvalues coincide
_STEPS_WITHOUT_GOAL = 11  # of the recurrence: on flat spectra more of them hardly gain anything
LARGEST_FORMED = 1024  # rows of a matrix that is formed rather than bounded less well
LEAST_BETA = 1e-3  # of the goal per eigenvalue: beta stays positive where the last Ritz value is 0


class Majorant(NamedTuple):
    """S <= t I + V (diag(theta) - t I + residual_gram / (t - tau)) V^T for every t > tau, t >= 0: see the module.

    - V (n, w): orthonormal Ritz vectors.
    - theta (w,): Ritz values, falling, each within `error` of an exact one of V.
    - residual_gram (w, w): Rho^T Rho in the basis V, raised by its rounding.
    - tau: a bound on what V leaves out, at least 0.
    - error: a bound on the rounding of Theta in the Frobenius norm.
    """

    V: Tensor
    theta: Tensor
    residual_gram: Tensor
    tau: float
    error: float

    def ky_fan(self, m: int, weights: Tensor | None = None, minus: Tensor | None = None) -> float:
        """An upper bound on KF_m(D S D - V `minus` V^T), D = V diag(weights) V^T + I - V V^T.

        `weights` (w,) are in [0, 1], None: 1. `minus` (w, w) is symmetric, None: 0.
        """
        if m == 0:
            return 0.0
        f = torch.ones_like(self.theta) if weights is None else weights
        inner = torch.diag(f * f * self.theta)
        if minus is not None:
            inner = inner - minus
        values = self.theta * f * f if minus is None else dense.symmetric_eigenvalues(inner).flip(0)
        bounds = []
        for gap in self._gaps(float(values[min(m, len(values)) - 1]), m):
            C = inner + f[:, None] * self.residual_gram / gap * f
            bounds.append(self._sum_with_rest(dense.symmetric_eigenvalues((C + C.mT) / 2), self.tau + gap, m))
        return min(bounds) + math.sqrt(m) * self.error

    def _gaps(self, level: float, m: int) -> list[float]:
        """Values of t - tau to try: t at the eigenvalue that decides, or t - tau at the size of the residuals."""
        balance = math.sqrt(max(float(self.residual_gram.diagonal()[:m].sum()), 0.0) / m)
        least = _LEAST_GAP * abs(level) + self.error + float(torch.finfo(torch.float64).tiny)
        return sorted({max(gap, least) for gap in (level - self.tau, balance, 4 * balance, 16 * balance)})

    def _sum_with_rest(self, values: Tensor, t: float, m: int) -> float:
        """The sum of the m largest nonnegative numbers among `values` and n - w times t."""
        rest = len(self.V) - len(values)
        above = values[values > t].flip(0)[:m]
        total, places = float(above.clamp_min(0).sum()), m - len(above)
        total += min(places, rest) * t
        below = values[values <= t].flip(0)[: max(places - rest, 0)]
        return total + float(below.clamp_min(0).sum())

    def ky_fan_sums(self, m: int) -> tuple[Tensor, Tensor]:
        """Bounds on KF_1(S) .. KF_m(S), m <= w, below and above: (m,) each, in float64.

        S is positive semidefinite. As theta_j is not above the j-th eigenvalue of S, what the basis lacks of KF_r grows
        with r. So a bound for a greater r serves a smaller one as well.
        """
        captured = self.theta[:m].clamp_min(0).cumsum(0)
        orders = torch.arange(1, m + 1, dtype=torch.float64, device=captured.device)
        rounding = orders.sqrt() * self.error
        least = torch.full_like(captured, math.inf)
        for gap in self._gaps_for_sums(m):
            C = torch.diag(self.theta) + self.residual_gram / gap
            t = self.tau + gap
            values = dense.symmetric_eigenvalues((C + C.mT) / 2).flip(0)[:m]
            least = torch.minimum(least, orders * t + (values - t).clamp_min(0).cumsum(0))
        lacking = (least - captured + rounding).flip(0).cummin(0).values.flip(0)
        return (captured - rounding).clamp_min(0), captured + rounding + lacking.clamp_min(0)

    def _gaps_for_sums(self, m: int) -> list[float]:
        """Values of t - tau to try for all sums at once: those of some orders up to m."""
        orders = {*(2**n for n in range(m.bit_length())), m}
        return sorted({gap for r in orders for gap in self._gaps(float(self.theta[r - 1]), r)})

    def scaled(self, factor: float) -> Majorant:
        """The majorant of `factor` S, factor > 0."""
        theta, residual_gram = factor * self.theta, factor**2 * self.residual_gram
        return Majorant(self.V, theta, residual_gram, factor * self.tau, factor * self.error)

    def eigenvalue(self, j: int) -> float:
        """An upper bound on the j-th largest eigenvalue of S, j >= 1."""
        bounds = []
        for gap in self._gaps(float(self.theta[min(j, len(self.theta)) - 1]), min(j, len(self.theta))):
            C = torch.diag(self.theta) + self.residual_gram / gap
            values = dense.symmetric_eigenvalues((C + C.mT) / 2).flip(0)
            t = self.tau + gap
            bounds.append(max(t, float(values[j - 1])) if j <= len(values) else t)
        return min(bounds) + self.error


Excess = Callable[[Majorant], float]


def columns_for(m: int) -> int:
    """The number w of columns of V for a sum of m eigenvalues."""
    return m + max(8, m // 2)


def leading_guess(S: Operator, m: int, target: float, generator: torch.Generator, depth: int = 16) -> Tensor:
    """About the leading eigenvectors of S, falling: (n, w) in `S.dtype`, w >= min(m, n).

    They lose about `target` of the Ky Fan sum of order m, or what `depth` blocks leave. Where blocks would take up
    much of the space, S is formed and decomposed.
    """
    w = columns_for(m)
    if 2 * (w + _block(m)) > S.n:
        return dense.leading_eigenpairs(_formed(S, S.dtype).double(), min(w, S.n))[1].flip(1).to(S.dtype)
    search = BlockLanczos(S, _block(m), generator)
    search.run(m, w, target, depth)
    return search.vectors(w)


def _formed(S: Operator, dtype: torch.dtype) -> Tensor:
    """S itself, by n applications."""
    formed = S.apply(torch.eye(S.n, dtype=dtype, device=S.device))
    return (formed + formed.mT) / 2


def ky_fan_excess(m: int) -> Excess:
    """The Ky Fan bound of order m less the energy in the basis, rounding included."""

    def excess(found: Majorant) -> float:
        return found.ky_fan(m) - float(found.theta[:m].clamp_min(0).sum()) + math.sqrt(m) * found.error

    return excess


def majorant(
    S: Operator,
    m: int,
    goal: float,
    failure: float,
    generator: torch.Generator,
    guess: Tensor | None = None,
    excess: Excess | None = None,
    tolerance: float = 10.0,
) -> Majorant:
    """A majorant of S for sums of at most m eigenvalues, whose `excess` is at most `goal` where rounding allows.

    The excess is that of the Ky Fan sum of order m, if None. `guess` (n, w) is a basis to try first, from
    `leading_guess`. The bounds of the result are wrong with probability `failure` at most, over `generator`. Where the
    goal is not reached, or a basis would get too large, S is formed and decomposed: n applications and n^3. Where S has
    more than `LARGEST_FORMED` rows, an excess of `tolerance` times the goal is taken instead.
    """
    if S.norm == 0:
        V = torch.eye(S.n, min(columns_for(m), S.n), dtype=torch.float64, device=S.device)
        return Majorant(V, V.new_zeros(V.shape[1]), V.new_zeros(V.shape[1], V.shape[1]), 0.0, 0.0)
    tolerance = tolerance if S.n > LARGEST_FORMED else 1.0
    found = _by_products(S, m, goal, failure, generator, guess, excess or ky_fan_excess(m), tolerance)
    return found or _by_eigenvectors(S, min(columns_for(m), S.n))


def _by_eigenvectors(S: Operator, w: int) -> Majorant:
    """The majorant from all eigenvectors of S."""
    values, X = dense.symmetric_eigenpairs(_formed(S, torch.float64))
    values, X = values.flip(0), X.flip(1)
    tau = max(float(values[w]), 0.0) if w < S.n else 0.0
    error = math.sqrt(S.n) * S.error + 10 * S.n * float(torch.finfo(torch.float64).eps) * S.norm
    return Majorant(X[:, :w], values[:w], X.new_zeros(w, w), tau, error)


def closest_majorant(
    S: Operator, m: int, goal: float, depth: int, failure: float, generator: torch.Generator
) -> Majorant | None:
    """A majorant of S for sums of at most m eigenvalues, from a search of `depth` blocks at most.

    Its Ky Fan bound of order m exceeds the energy in its basis by `goal`, or by the least that such a search reaches.
    It is None where S is zero, or blocks would take up more than half of the space. The bounds are wrong with
    probability `failure` at most, over `generator`.
    """
    if S.norm == 0:
        return None
    goal = max(goal, 8 * math.sqrt(m) * _rounding(S, columns_for(m)))  # no search gets below rounding
    search = BlockLanczos(S, _block(m), generator)
    if not search.run(m, columns_for(m), SEARCH_SHARE * goal, depth):
        return None
    excess = ky_fan_excess(m)
    best: Majorant | None = None
    least = math.inf
    for n, found in enumerate(_certified(S, search.vectors(columns_for(m)), m, goal, failure, generator)):
        if (value := excess(found)) < least:
            best, least = found, value
        if least <= goal or n == _STEPS_WITHOUT_GOAL:
            break
    return best


def depth_within(n: int, m: int, depth: int) -> int:
    """The number of blocks, at most `depth`, that `closest_majorant` can take for m eigenvalues of n; 0 if too few."""
    most = min(depth, n // (2 * _block(m)))
    return most if (most - 1) * _block(m) >= columns_for(m) else 0


def _certified(
    S: Operator, guess: Tensor, m: int, goal: float, failure: float, generator: torch.Generator
) -> Iterator[Majorant]:
    """Majorants of S in the span of `guess` (n, w), from longer and longer polynomials; none if rounding forbids it.

    All hold at once but for probability `failure`.
    """
    c = 2 * float(scipy.special.gammaincinv(PROBES / 2, failure))
    basis = ritz(S, guess.double())
    if basis is None:
        return
    last, target = float(basis.theta[-1]), float(basis.theta[m - 1])
    beta = max(last + BETA_ABOVE_LAST * (target - last), LEAST_BETA * goal / m)
    omega = torch.randn(S.n, PROBES, generator=generator, dtype=torch.float64).to(S.device)
    for tau in norm_bounds(S, basis.V, omega, beta, c, basis.error):
        if tau < math.inf:
            yield basis._replace(tau=max(tau, 0.0))


def _by_products(
    S: Operator,
    m: int,
    goal: float,
    failure: float,
    generator: torch.Generator,
    guess: Tensor | None,
    excess: Excess,
    tolerance: float,
) -> Majorant | None:
    """`majorant` without forming S; None where `tolerance` times the goal is not reached."""
    width, w = _block(m), columns_for(m)
    if 2 * (w + width) > S.n:
        return None
    goal = max(goal, 8 * math.sqrt(m) * _rounding(S, w))  # no search gets below rounding
    best: tuple[float, Majorant] | None = None
    search: BlockLanczos | None = None
    for _ in range(ATTEMPTS):
        if guess is None:
            search = search or BlockLanczos(S, width, generator)
            if not search.run(m, w, SEARCH_SHARE * goal):
                break
            guess = search.vectors(w)
        for found in _certified(S, guess, m, goal, failure / ATTEMPTS, generator):
            reached = excess(found)
            if reached <= goal:
                return found
            if reached <= (best[0] if best else tolerance * goal):
                best = reached, found
        guess = None
    return best[1] if best else None


def _rounding(S: Operator, w: int) -> float:
    """d for a basis of w columns, see the module."""
    return 4 * math.sqrt(w) * (S.error + S.n * float(torch.finfo(torch.float64).eps) * S.norm)


def ritz(S: Operator, V: Tensor) -> Majorant | None:
    """The majorant of S in the span of V (n, w), with tau = inf; None if V is not orthonormal to rounding."""
    V = orthogonal.thin_qr(V)[0]
    w = V.shape[1]
    d = _rounding(S, w)
    eye = torch.eye(w, dtype=V.dtype, device=V.device)
    if not float(torch.linalg.matrix_norm(V.mT @ V - eye)) <= math.sqrt(w) * S.n * float(torch.finfo(V.dtype).eps):
        return None
    SV = S.apply(V)
    Theta = V.mT @ SV
    theta, X = dense.symmetric_eigenpairs((Theta + Theta.mT) / 2)
    theta, X = theta.flip(0), X.flip(1)
    Rho = orthogonal.outside(V, SV) @ X
    return Majorant(V @ X, theta, 1.1 * Rho.mT @ Rho + 11 * d**2 * eye, math.inf, d)


def norm_bounds(S: Operator, V: Tensor, omega: Tensor, beta: float, c: float, d: float) -> Iterator[float]:
    """Upper bounds on the largest eigenvalue of (I - V V^T) S (I - V V^T) for k = 0, 1, ..

    All hold unless ||u^T omega||^2 < c. Each k costs one product with S. There are no more where rounding permits no
    conclusion.
    """
    eps = float(torch.finfo(torch.float64).eps)
    step = 8 * (d / beta + eps * (1 + S.norm / beta))
    before, Y = torch.zeros_like(omega), orthogonal.outside(V, omega)
    size_before, sizes = 0.0, 0.0
    for k in range(STEPS + 1):
        size = float(torch.linalg.matrix_norm(Y))
        HY = orthogonal.outside(V, S.apply(Y))
        floor = math.sqrt(c) - k * step * sizes
        if not floor > 0:  # nor will it be
            return
        value = (float(torch.linalg.matrix_norm(HY)) + d * size) / floor
        yield largest_argument(k, beta, value, 1.0)
        before, Y = Y, (2 / beta) * HY - Y if k == 0 else (4 / beta) * HY - 2 * Y - before
        Y = orthogonal.outside(V, Y)
        sizes += size + size_before
        size_before = size


def _block(m: int) -> int:
    """The width of a block of the search."""
    return m + 8 if m <= 24 else max(32, m // 2)
