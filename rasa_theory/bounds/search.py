"""The search behind the dual and the two-sided floor: a smoothed sum of eigenvalues, and quasi-Newton steps on it.

Nothing here needs to be right for a floor to be valid: the value is what the formula gives at the point found.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.optimize
import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.common import positive, whole_number
from rasa_theory.problem import LayerStack, RankBudget

_SMOOTHING = (0.3, 0.1, 0.03, 0.01, 0.003)  # in units of the level, the mean of sigma_{i,r+1}^2
_STAGE = 60  # iterations with one smoothing, at most


@dataclass(frozen=True)
class FloorOptions:
    """What a search may spend on each orientation of a stack.

    It stops when what smoothing hides is below `rtol` of e_lora, after `max_iterations` or after `max_seconds`.
    `width`: it looks at so many leading directions of each side (None: 5 L r, where k = r 6 L r). What the others would
    add is little: of 384, looking at 240 only costs the dual floor of fine-tuning updates 0.0002 of e_lora and the
    two-sided one 0.0014 at k = 1; at 160 and 192, 0.0006 and 0.004.
    Raises InputError for a limit that is no number or not positive, and for a number of steps or directions that is
    not whole.
    """

    max_iterations: int = 240
    max_seconds: float = 40.0
    rtol: float = 1e-3
    width: int | None = None

    def __post_init__(self) -> None:
        positive("max_iterations", whole_number("max_iterations", self.max_iterations))
        if self.width is not None:
            positive("width", whole_number("width", self.width))
        positive("max_seconds", self.max_seconds)
        positive("rtol", self.rtol)

    def width_of(self, stack: LayerStack, budget: RankBudget) -> int:
        """The number of directions of each side; a side with fewer takes them all."""
        return self.width or (5 if budget.private_rank else 6) * stack.layers * budget.rank


class SearchProgress(NamedTuple):
    """Which search, how far, and the floor as the search sees it (squared, in the units of the stack searched)."""

    search: str
    iteration: int
    max_iterations: int
    value: float


Vector = npt.NDArray[np.float64]
SearchWatch = Callable[[SearchProgress], None]
Objective = Callable[..., tuple[float, float, list[Tensor]]]
"""Parameters -> smoothed value, the value itself, gradients of the former."""


@dataclass
class Search:
    """Minimise a convex bound on the captured energy, in units of `level`, over several blocks of parameters.

    `level` is that of `level_of`; `total`, `e_lora` and `best` are ||M||^2, e_lora and the lowest bound so far, in its
    units.

    KF_m(S) = max tr(X S) over 0 <= X <= I with tr X <= m has corners where eigenvalues meet, and the minimum lies in
    such corners. Less mu/2 ||X||^2 it has a gradient, the maximiser X, and differs by at most mu m / 2. L-BFGS runs on
    that, with mu falling; the best value without smoothing is kept. At a minimum with smoothing, the minimum without
    it is at most exact - smooth lower than what was found: the gap to stop on.
    """

    name: str
    level: float
    total: float
    e_lora: float
    options: FloorOptions
    watch: SearchWatch | None
    deadline: float  # of time.perf_counter()
    mu: float = _SMOOTHING[0]
    iteration: int = 0
    best: float = math.inf

    @classmethod
    def of(
        cls, name: str, view: LayerStack, budget: RankBudget, options: FloorOptions, watch: SearchWatch | None
    ) -> Search:
        """The search on a stack with e_lora > 0."""
        S = view.spectra.svd().S
        level = level_of(S, budget.rank)
        e_lora = float(linalg.tail_energy(S, budget.rank).sum())
        deadline = time.perf_counter() + options.max_seconds
        return cls(name, level, view.norm_squared / level, e_lora / level, options, watch, deadline)

    def stages(self, objective: Objective, start: list[Tensor]) -> Iterator[list[Tensor]]:
        """After every stage of constant smoothing, the best parameters so far; lower smoothing follows."""
        shapes, sizes = [p.shape for p in start], [p.numel() for p in start]
        x = torch.cat([p.reshape(-1) for p in start]).cpu().numpy()
        kept, gap = start, math.inf

        def unpack(x: Vector) -> list[Tensor]:
            parts = torch.split(torch.from_numpy(x.copy()).to(start[0].device), sizes)
            return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

        def evaluate(x: Vector) -> tuple[float, Vector]:
            nonlocal kept, gap
            parameters = unpack(x)
            smooth, exact, gradients = objective(*parameters)
            gap = exact - smooth
            if exact < self.best:
                self.best, kept = exact, parameters
            return smooth, torch.cat([p.reshape(-1) for p in gradients]).cpu().numpy()

        for self.mu in _SMOOTHING:
            limit = min(_STAGE, self.options.max_iterations - self.iteration)
            settings = {"maxiter": limit, "maxcor": 5, "ftol": 1e-3 * self.options.rtol, "gtol": 0.0}
            try:
                x = scipy.optimize.minimize(
                    evaluate, x, jac=True, method="L-BFGS-B", callback=self._tell, options=settings
                ).x
            except linalg.LinAlgError:
                gap = 0.0  # a line search that left the range of numbers; what was kept is as good as before
            yield kept
            if self._spent() or gap <= self.options.rtol * self.e_lora:
                return

    def _spent(self) -> bool:
        return time.perf_counter() > self.deadline or self.iteration >= self.options.max_iterations

    def _tell(self, _: Vector) -> None:
        self.iteration += 1
        if self.watch is not None:
            value = self.level * (self.total - self.best)
            self.watch(SearchProgress(self.name, self.iteration, self.options.max_iterations, value))
        if self._spent():
            raise StopIteration


def level_of(S: Tensor, rank: int) -> float:
    """The mean over the layers of sigma_{i,r+1}^2, the size of what is decided about: S (L, m)."""
    return float((S[:, rank] ** 2).mean()) if rank < S.shape[1] else 0.0


def leading_basis(view: LayerStack, budget: RankBudget, width: int) -> Tensor:
    """Orthonormal (b, n), n = min(b, width): directions that are leading in some layer, or in the sum of all.

    Eigenvectors of sum_i min(Gamma_i / sigma_{i,r+1}^2, 1)^4 + min(S / t, 1)^4, S = sum_i Gamma_i and t its eigenvalue
    L r + 1: all that reaches its level counts the same, and the power makes what stays below it count little.
    """
    U, S, _ = view.spectra.svd()
    energy = S**2  # (L, m)
    following = energy[:, budget.rank : budget.rank + 1]
    floor = following.clamp_min(torch.finfo(torch.float64).tiny + 1e-12 * float(following.mean()))
    weights = (energy / floor).clamp_max(1) ** 4
    spread = U.new_zeros(U.shape[1], U.shape[1])
    for u, w in zip(U, weights, strict=True):
        spread += (u * w) @ u.mT
    values, X = linalg.symmetric_eigenpairs(view.spectra.gram())
    t = values[max(len(values) - 1 - view.layers * budget.rank, 0)].clamp_min(1e-12 * values[-1])
    spread += (X * (values / t).clamp(0, 1) ** 4) @ X.mT
    return linalg.symmetric_eigenpairs(spread)[1][:, -width:]


def clip_factors(g: Tensor, budget: RankBudget) -> Tensor:
    """F (L, n, p) with F_i F_i^T near the part of g_i above its eigenvalue q + 1, p = min(n, L r).

    Columns that are zero would stay zero, so a little of everything is added (the same on every call). For q = 0 there
    are none, since KF_R(S) <= KF_R(S - Y) + KF_R(Y).
    """
    L, n, _ = g.shape
    q = budget.private_rank
    if q == 0:
        return g[:, :, :0]
    values, X = linalg.symmetric_eigenpairs(g)
    following = values[:, n - q - 1] if q < n else torch.zeros_like(values[:, 0])
    F = X * (values - following[:, None]).clamp_min(0).sqrt()[:, None, :]
    F = F[:, :, -min(n, L * budget.rank) :]
    noise = torch.randn(F.shape, dtype=F.dtype, generator=torch.Generator().manual_seed(0))
    return F + 0.05 * noise.to(F.device)


class Captured(NamedTuple):
    """Of `CapturedEnergy`: smoothed value, value, gradient in g (L, n, n) of the former, and in F (L, n, p)."""

    smooth: float
    exact: float
    Z: Tensor
    slope_F: Tensor


def captured_smoothly(g: Tensor, F: Tensor, budget: RankBudget, mu: float) -> Captured:
    """KF_Lr(sum_i Y_i) + sum_i KF_q(g_i - Y_i) + KF_R(sum_i (g_i - Y_i)), Y_i = F_i F_i^T, smoothed by mu.

    The maximisers P, P_i, Q are its gradients: P + P_i in g_i, and Q - P - P_i in Y_i.
    """
    L = g.shape[0]
    Y = F @ F.mT
    rest = g - Y
    whole = smoothed_ky_fan(Y.sum(0), L * budget.rank if F.shape[2] else 0, mu)
    own = smoothed_ky_fan(rest, budget.private_rank, mu)
    pooled = smoothed_ky_fan(rest.sum(0), budget.pool_rank(L), mu)
    Z = own.X + pooled.X
    terms = (whole, own, pooled)
    slope = 2 * (whole.X - Z) @ F
    return Captured(sum(t.smooth for t in terms), sum(t.exact for t in terms), Z, slope)


class KyFan(NamedTuple):
    """max tr(X S) - mu/2 ||X||^2, KF_m(S), both summed over the batch, and the maximiser X (.., n, n) of the former."""

    smooth: float
    exact: float
    X: Tensor


def smoothed_ky_fan(S: Tensor, m: int, mu: float) -> KyFan:
    """Over 0 <= X <= I, tr X <= m; S (.., n, n) symmetric."""
    if m == 0:
        return KyFan(0.0, 0.0, torch.zeros_like(S))
    values, V = linalg.symmetric_eigenpairs(S)
    x = capped_weights(values / mu, m)
    smooth = (x * (values - mu / 2 * x)).sum()
    exact = linalg.largest_nonnegative(values, m).sum()
    return KyFan(float(smooth), float(exact), (V * x[..., None, :]) @ V.mT)


def capped_weights(w: Tensor, m: int) -> Tensor:
    """The point nearest to w (.., n) with 0 <= x <= 1 and sum x <= m: x = clip(w - tau, 0, 1), the least tau >= 0.

    As tau falls, the sum rises with a slope that goes up by 1 at each w_j, and down by 1 at each w_j - 1.
    """
    breaks, order = torch.cat([w, w - 1], -1).sort(-1, descending=True)
    slopes = torch.where(order < w.shape[-1], 1.0, -1.0).to(w.dtype).cumsum(-1)  # below each break
    steps = slopes[..., :-1] * (breaks[..., :-1] - breaks[..., 1:])
    sums = torch.cat([torch.zeros_like(steps[..., :1]), steps.cumsum(-1)], -1)  # at each break
    last = (sums <= m).sum(-1, keepdim=True) - 1
    at, slope = breaks.gather(-1, last), slopes.gather(-1, last)
    tau = at - (m - sums.gather(-1, last)) / slope.clamp_min(1)
    return (w - tau.clamp_min(0)).clamp(0, 1)
